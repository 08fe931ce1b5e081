"""The pictures of attention: what a head looks at, all heads of a pair, and the arithmetic of one pair."""

from __future__ import annotations

from labeling_ui.playground_parts import (
    Answer,
    bar,
    both_ways,
    chips,
    note,
    table,
    title,
    token,
)

# of the heat map: a larger one cannot be read
_MOST_DRAWN = 48
_CELL, _LABEL = 22, 92


def attention(found: Answer) -> str:
    """All pictures of one head, one query (`at`) and one key (`to`)."""
    at, to, tokens = found["at"], found["to"], found["tokens"]
    row = found["weights"][at]
    shades = [weight**0.7 for weight in row]
    below = [f"{100 * weight:.0f}" if i <= at else "" for i, weight in enumerate(row)]
    own = f"<kbd>{token(tokens[at])}</kbd>"
    return (
        f'<h3 class="pg-title">What does {own} look at, in head {found["head"]} of layer'
        f" {found['layer']}?</h3>"
        + chips(tokens, at, shades, None, below, "Attention weights in percent")
        + note(
            "The numbers are percent, and add up to 100: shares of attention. A token sees itself and"
            " what stands before it, never what comes after. Choose another token to see where it looks;"
            " many heads rest on the first token when they have nothing to do."
        )
        + '<div class="pg-pair">'
        + f"<div>{_heat_map(found)}</div><div>{_grid(found)}</div></div>"
        + (
            _by_hand(found)
            if found["by_hand"]
            else note(
                "This architecture computes its attention in a way of its own, and tells the weights only:"
                " queries and keys cannot be shown."
            )
        )
        + (_products(found) if found["by_hand"] else "")
        + f'<p class="pg-note">The pair is <kbd>{token(tokens[at])}</kbd> → <kbd>{token(tokens[to])}</kbd>;'
        " choose another in the heat map or in the table.</p>"
    )


def _heat_map(found: Answer) -> str:
    tokens, at, to = found["tokens"], found["at"], found["to"]
    first = max(0, min(len(tokens) - _MOST_DRAWN, at - _MOST_DRAWN // 2))
    spots = range(first, min(len(tokens), first + _MOST_DRAWN))
    parts = []
    for y, query in enumerate(spots):
        top = _LABEL + y * _CELL
        parts.append(
            f'<text x="{_LABEL - 5}" y="{top + 15}" text-anchor="end">{_short(tokens[query])}</text>'
            f'<text transform="translate({_LABEL + y * _CELL + 15} {_LABEL - 5}) rotate(-60)">'
            f"{_short(tokens[query])}</text>"
        )
        for x, key in enumerate(spots):
            if key > query:
                break
            weight = found["weights"][query][key]
            chosen = " chosen" if (query, key) == (at, to) else ""
            parts.append(
                f'<rect class="cell{chosen}" x="{_LABEL + x * _CELL}" y="{top}" width="{_CELL - 1}"'
                f' height="{_CELL - 1}" style="--shade:{weight:.3f}" data-pick="pair,{query},{key}">'
                f"<title>{token(tokens[query])} → {token(tokens[key])}: {100 * weight:.1f} %</title></rect>"
            )
    size = _LABEL + len(spots) * _CELL + 4
    cut = f" Tokens {first} to {spots[-1]} of {len(tokens)}." if len(spots) < len(tokens) else ""
    return (
        title("The whole head")
        + '<div class="pg-scroll" tabindex="0" role="region" aria-label="Heat map of the head">'
        f'<svg class="pg-heat" width="{size + 30}" height="{size}" role="img"'
        f' aria-label="Attention of every token (rows) to every earlier one (columns)">{"".join(parts)}'
        "</svg></div>"
        + note(
            f"A row is a token that looks, a column one that is looked at; more colour is more.{cut}"
        )
    )


def _grid(found: Answer) -> str:
    """How much each head of each layer looks from the query to the key of the pair."""
    tokens, rows = found["tokens"], found["grid"]
    cells = "".join(
        f'<tr><th scope="row">{layer}</th>'
        + "".join(
            f'<td><button type="button" class="pg-head" style="--shade:{weight:.3f}"'
            f' data-pick="head,{layer},{head}" title="layer {layer}, head {head}: {100 * weight:.1f} %"'
            f' aria-pressed="{str((layer, head) == (found["layer"], found["head"])).lower()}">'
            f"{100 * weight:.0f}</button></td>"
            for head, weight in enumerate(row)
        )
        + "</tr>"
        for layer, row in enumerate(rows)
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in range(len(rows[0])))
    pair = f"<kbd>{token(tokens[found['at']])}</kbd> → <kbd>{token(tokens[found['to']])}</kbd>"
    return (
        f'<h3 class="pg-title">Every head on {pair}</h3>'
        '<div class="pg-scroll" tabindex="0" role="region" aria-label="All heads">'
        f'<table class="pg-grid"><thead><tr><th><span>layer</span></th>{heads}</tr></thead>'
        f"<tbody>{cells}</tbody></table></div>"
        + note(
            "Percent of attention on this pair in each head (columns) of each layer (rows), counted from 0."
            " Heads divide the work: some look at the token before, some at the same word, some at what a"
            " word refers to. Choose a head to see it."
        )
    )


def _by_hand(found: Answer) -> str:
    """The row of the query: product, scaling, mask, exp, weight, in numbers."""
    told, tokens, at, to = found["by_hand"], found["tokens"], found["at"], found["to"]
    rows = []
    for i, row in enumerate(told["rows"]):
        if i > at + 1 and i < len(tokens):
            continue
        hidden = row["logit"] is None
        rows.append(
            [
                f'<button type="button" class="pg-link" data-pick="pair,{at},{i}"'
                f' aria-pressed="{str(i == to).lower()}">{token(tokens[i])}</button>'
                if i <= at
                else f"{token(tokens[i])}",
                _number(row["product"]),
                _number(row["scaled"]),
                "hidden" if hidden else _added(row["logit"] - row["scaled"]),
                "0" if hidden else f"{row['exp']:.4f}",
                f"{100 * row['weight']:.1f} %",
                bar(row["weight"]),
            ]
        )
    if at + 2 < len(tokens):
        rows.append([f"… {len(tokens) - at - 2} more", "", "", "hidden", "0", "0.0 %", bar(0)])
    pair = told["rows"][to]
    shared = told["groups"] < found["heads"]
    group = f"; keys of group {told['group']}, which several heads share" if shared else ""
    cap = f", capped softly at {told['softcap']:g}" if told["softcap"] else ""
    sink = (
        f" The head has a sink of logit {told['sink']:.3f}, which takes the rest of the weight."
        if told["sink"] is not None
        else ""
    )
    size = told["head_size"]
    return (
        f'<h3 class="pg-title">The arithmetic of <kbd>{token(tokens[at])}</kbd></h3>'
        f'<p class="pg-sum"><span>q · k = {_number(pair["product"])}</span>'
        f"<span>× {told['scaling']:.4f} = {_number(pair['scaled'])}</span>"
        f"<span>e<sup>{_number(pair['logit'] or 0.0)} − {_number(told['largest'])}</sup> ="
        f" {pair['exp']:.4f}</span>"
        f"<span>÷ {told['total']:.4f} = <b>{100 * pair['weight']:.1f} %</b></span></p>"
        + table(
            ["key", "q · k", "scaled", "mask", "exp", "weight", ""],
            rows,
            "Scores of all keys for this query",
            "sums",
        )
        + note(
            f"Each token makes a query, “what do I look for”, and a key, “what am I”: {size} numbers each,"
            f" turned by their place in the text where the model has rotary positions{group}. Their product"
            f" is the score. It is scaled{cap} (1/√{size} = {size**-0.5:.4f}): longer vectors would make"
            " larger products, and the softmax too sure of itself. The mask hides what comes later."
            f" Softmax makes shares of the scores: e to each one, divided by the sum of all.{sink}"
        )
    )


def _products(found: Answer) -> str:
    """Which of the numbers of query and key made the score."""
    told = found["by_hand"]
    products = told["products"]
    most = max(abs(value) for value in products) or 1.0
    order = sorted(range(len(products)), key=lambda i: -abs(products[i]))[:8]
    rows = [
        [
            f"{i}",
            _number(told["query"][i]),
            _number(told["key"][i]),
            _number(products[i]),
            both_ways(products[i], most),
        ]
        for i in order
    ]
    return (
        '<details class="pg-more"><summary>Which numbers made q · k of this pair?</summary>'
        + table(
            ["number", "q", "k", "q × k", ""],
            rows,
            "The largest products",
            "narrow",
        )
        + note(
            f"The {len(order)} largest of {len(products)} products; all of them add up to"
            f" {sum(products):.3f}."
        )
        + "</details>"
    )


def _added(value: float) -> str:
    """What a mask adds: nothing, or with positions as a bias a little."""
    return "0" if abs(value) < 1e-6 else _number(value)


def _number(value: float) -> str:
    return f"{value:.3f}".replace("-", "\u2212")


def _short(row: Answer) -> str:
    text = row["text"]
    return token({**row, "text": text if len(text) <= 9 else text[:8] + "…"})
