"""The pictures of `prefline inspect` but attention and PPO: tokens, odds, losses, neighbours, stages."""

from __future__ import annotations

from collections.abc import Callable

from labeling_ui.playground_parts import (
    Answer,
    bar,
    chips,
    escaped,
    note,
    percent,
    shown,
    table,
    tiles,
    title,
    token,
)


def facts(found: Answer, label: str) -> str:
    """One line that says what sort of model it is."""
    sizes = [
        f"{found['parameters']:,} parameters",
        f"{found['layers']} layers",
        f"{found['heads']} heads"
        + (
            f" on {found['kv_heads']} groups of keys" if found["kv_heads"] != found["heads"] else ""
        ),
        f"width {found['hidden_size']}",
        f"{found['vocabulary']:,} tokens in the vocabulary ({found['tokenizer']})",
        f"reads up to {found['positions']} tokens" if found["positions"] else "",
    ]
    said = ", ".join(size for size in sizes if size)
    return f'<p class="pg-facts"><b>{shown(label)}</b> {shown(found["architecture"])}: {escaped(said)}</p>'


def tokens(found: list[Answer], at: int, merges: Answer) -> str:
    """The chosen token and how it was merged; all tokens with ids and bytes."""
    own = merges["token"]
    steps = "".join(
        "<li>"
        + "".join(f"<kbd>{token({**own, 'text': part})}</kbd>" for part in step["parts"])
        + (f" <small>merge {step['rank'] + 1:,}</small>" if step["rank"] is not None else "")
        + "</li>"
        for step in merges["steps"]
    )
    how = f'<ol class="pg-merges">{steps}</ol>' if steps else ""
    why = note(merges["why"][:1].upper() + merges["why"][1:] + ".") if merges["why"] else ""
    rows = [
        [
            _place(i, i == at, row),
            token(row),
            f"{row['id']}",
            f"<code>{escaped(row['bytes'])}</code>",
            "control" if row["special"] else "",
        ]
        for i, row in enumerate(found)
    ]
    return (
        title(f"How token {at} came to be")
        + f'<p class="pg-own"><kbd>{token(own)}</kbd> is number {own["id"]} of the vocabulary,'
        f" {len(own['bytes'].split())} bytes: <code>{escaped(own['bytes'])}</code></p>"
        + how
        + why
        + note(
            "A model reads numbers, not letters. The tokenizer splits text into single bytes and then"
            " merges the pair that it learned first, again and again, until no learned pair is left. The"
            " number behind a step says which merge it was: a small one was frequent in its text. A dot"
            " is a space; most words have theirs in front."
        )
        + title("All tokens")
        + table(["place", "token", "id", "bytes", ""], rows, "All tokens of the text", "narrow")
    )


def odds(found: Answer, at: int) -> str:
    """Before and after: how probable each next token is, and what may be drawn."""
    tokens = found["tokens"]
    most = max(max(row["before"], row["after"]) for row in found["rows"]) or 1.0
    rows = []
    for row in found["rows"]:
        cut = f'<span class="pg-cut">cut by {row["cut"]}</span>' if row["cut"] else ""
        follows = '<span class="pg-next">is next</span>' if row["id"] == found["follows"] else ""
        both = bar(row["before"] / most) + bar(row["after"] / most, "orange")
        rows.append(
            [
                f"<kbd>{token(row)}</kbd>",
                both,
                escaped(percent(row["before"])),
                "" if row["cut"] else escaped(percent(row["after"])),
                cut + follows,
            ]
        )
    said = (
        f"{found['kept']:,} of {found['vocabulary']:,} tokens can be drawn;"
        f" {percent(found['cut_mass'])} of the odds are cut off."
        f" The {len(rows)} here hold {percent(1 - found['rest'])}."
    )
    return (
        f'<h3 class="pg-title">What comes after <kbd>{token(tokens[at])}</kbd>?</h3>'
        + '<p class="pg-legend"><i class="blue"></i> as the model says'
        ' <i class="orange"></i> as it is drawn, with the settings above</p>'
        + table(["token", "odds", "before", "after", ""], rows, "Odds of the next token", "odds")
        + note(said)
        + tiles(
            [
                ("Uncertainty before", f"{found['entropy_before']:.2f}", "nats of entropy"),
                ("Uncertainty after", f"{found['entropy_after']:.2f}", "nats of entropy"),
            ]
        )
        + note(
            "The model gives every token a score; softmax makes odds of the scores. Temperature divides"
            " the scores first: below 1 the likely get likelier, above 1 all get more equal. Top-k keeps"
            " the k likeliest; top-p keeps the likeliest until they hold the share p. Then one token is"
            " drawn, and all begins anew behind it."
        )
    )


def losses(found: Answer) -> str:
    """How surprised the model was by each token."""
    tokens, rows = found["tokens"], found["rows"]
    if found["mean"] is None:
        return note("One token has nothing before it from which it could be told. Write more.")
    worst = max(row["loss"] for row in rows[1:]) or 1.0
    scale = max(worst, found["uniform"])
    shades = [0.0 if row["loss"] is None else row["loss"] / scale for row in rows]
    below = ["–" if row["loss"] is None else f"{row['loss']:.1f}" for row in rows]
    most = sorted(range(1, len(rows)), key=lambda i: -rows[i]["loss"])[:8]
    hardest = [
        [
            f'<button type="button" class="pg-link" data-pick="at,{i}">{i}</button>',
            f"<kbd>{token(tokens[i])}</kbd>",
            bar(rows[i]["loss"] / scale, "orange"),
            f"{rows[i]['loss']:.2f}",
            f"{rows[i]['rank']:,}",
            f"<kbd>{token(rows[i]['guess'])}</kbd> {escaped(percent(rows[i]['guess_prob']))}",
        ]
        for i in most
    ]
    perplexity = found["perplexity"]
    return (
        tiles(
            [
                ("Loss", f"{found['mean']:.3f}", "nats a token, on average"),
                (
                    "Perplexity",
                    f"{perplexity:,.1f}" if perplexity < 1e6 else f"{perplexity:.1e}",
                    "tokens it hesitates between, so to say",
                ),
                ("Bits per byte", f"{found['bits_per_byte']:.3f}", "comparable between tokenizers"),
            ]
        )
        + title("Where it was surprised")
        + chips(tokens, None, shades, None, below, "Loss of each token")
        + note(
            "The loss of a token is minus the logarithm of the odds it was given: 0 where it was certain,"
            f" {found['uniform']:.1f} where all tokens of the vocabulary were equally likely. Training"
            " lowers the mean of these numbers, and nothing else; perplexity is e to that mean."
        )
        + title("The hardest tokens")
        + table(
            ["place", "token", "loss", "nats", "rank", "the model's guess"],
            hardest,
            "The hardest tokens",
            "hard",
        )
    )


def neighbours(found: Answer) -> str:
    """Tokens with similar embeddings."""
    own = found["token"]
    rows = [
        [
            f"<kbd>{token(row)}</kbd>",
            bar(max(0.0, row["cosine"])),
            f"{row['cosine']:.3f}",
            f"{row['id']}",
        ]
        for row in found["rows"]
    ]
    return (
        f'<h3 class="pg-title">Nearest to <kbd>{token(own)}</kbd></h3>'
        + table(["token", "cosine", "", "id"], rows, "Nearest tokens", "narrow near")
        + note(
            "Each token is a row of numbers, its embedding: all that the first layer knows of it. The"
            " cosine is 1 where two rows point the same way, 0 where they have nothing in common. Tokens"
            " that stand in the same places of texts come to lie near each other. In a small model the"
            " nearest are often strange: it has seen too little."
        )
    )


def stages(found: Answer, label_of: Callable[[str], str]) -> str:
    """The same text before each model: next tokens and continuation."""
    cards = []
    for row in found["rows"]:
        most = max(item["before"] for item in row["top"]) or 1.0
        top = table(
            ["next", "odds", ""],
            [
                [
                    f"<kbd>{token(item)}</kbd>",
                    bar(item["before"] / most),
                    escaped(percent(item["before"])),
                ]
                for item in row["top"]
            ],
            f"Next tokens of {label_of(row['model'])}",
            "top5",
        )
        end = "ended by itself" if row["ended"] else "cut"
        cards.append(
            f'<section class="pg-card"><h4>{shown(label_of(row["model"]))}</h4>{top}'
            f'<p class="pg-said">{shown(row["text"]) or "<i>nothing</i>"}</p>'
            f"<footer>{row['tokens']} tokens, {end}; entropy {row['entropy']:.2f} nats</footer></section>"
        )
    return f'<div class="pg-cards">{"".join(cards)}</div>' + note(
        "The same words, the same seed, one model after the other. Pretraining teaches how text goes on;"
        " sft teaches to answer, and when to stop; the policy's odds are moved towards what people"
        " preferred, and held near sft by the KL penalty."
    )


def _place(at: int, chosen: bool, row: Answer) -> str:
    pressed = "true" if chosen else "false"
    return (
        f'<button type="button" class="pg-link" data-pick="at,{at}" aria-pressed="{pressed}"'
        f' aria-label="{escaped(f"choose token {at}: ")}{token(row)}">{at}</button>'
    )
