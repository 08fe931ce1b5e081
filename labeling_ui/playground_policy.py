"""The pictures of what PPO sees of a response: KL, value, advantage, reward and score."""

from __future__ import annotations

from collections.abc import Sequence

from labeling_ui.playground_parts import (
    Answer,
    both_ways,
    chips,
    escaped,
    note,
    shown,
    signed,
    table,
    tiles,
    title,
    token,
)

_ORDER = (
    ("kl", "KL", "How far the policy's odds at this place are from the reference's, in nats; never below 0."),
    ("k1", "log ratio", "log of how much likelier the policy finds this token than the reference does."),
    ("reward", "reward", "What PPO pays for the token: minus kl_coef × log ratio; the score comes at the end."),
    ("value", "value", "The critic's guess, before the token, of all reward that is still to come."),
    ("advantage", "advantage", "How much better than guessed it went on from here; PPO makes such tokens likelier."),
)  # fmt: skip


def policy(found: Answer) -> str:
    """All of it, for one response."""
    start = found["prompt_tokens"]
    tokens, columns = found["tokens"][start:], found["columns"]
    absent = "".join(
        f"<li><b>{escaped(_WORDS[what])}</b>: {shown(why)}</li>"
        for what, why in found["absent"].items()
    )
    return (
        _tiles(found)
        + "".join(_strip(tokens, columns[key], *words) for key, *words in _ORDER if key in columns)
        + _table(tokens, columns)
        + (f'<ul class="pg-absent">{absent}</ul>' if absent else "")
        + (note(_how(found)) if columns else "")
    )


_WORDS = {"kl": "KL", "value": "Value and advantage", "score": "Score"}


def _tiles(found: Answer) -> str:
    columns, score = found["columns"], found["score"]
    values = []
    if score is not None:
        values.append(
            (
                "Score",
                signed(score["normalised"]),
                "of the reward model, in its standard deviations",
            )
        )
        values.append(("As it says it", signed(score["raw"]), "raw, before normalisation"))
    if "k1" in columns:
        values.append(
            (
                "KL of this text",
                signed(sum(columns["k1"])),
                f"nats, policy against {found['reference']}",
            )
        )
    if "reward" in columns:
        values.append(
            ("Reward", signed(sum(columns["reward"])), "score and penalties, less kl_coef × KL")
        )
    return tiles(values) if values else ""


def _strip(tokens: Sequence[Answer], values: list[float], name: str, meaning: str) -> str:
    # one very large number, such as the score at the end, must not pale all others
    sizes = sorted(abs(value) for value in values)
    most = max(sizes[int(0.95 * (len(sizes) - 1))], 1e-9)
    shades = [abs(value) / most for value in values]
    hues = ["cool" if value >= 0 else "warm" for value in values]
    below = [signed(value)[:-1] if abs(value) >= 0.005 else "" for value in values]
    return (
        title(name[:1].upper() + name[1:])
        + note(meaning)
        + chips(tokens, None, shades, hues, below, name).replace("data-pick", "data-place")
    )


def _table(tokens: Sequence[Answer], columns: dict[str, list[float]]) -> str:
    known = [(key, name) for key, name, _ in _ORDER if key in columns]
    if not known:
        return ""
    most = {key: max(abs(value) for value in columns[key]) for key, _ in known}
    rows = [
        [
            f"{i}",
            f"<kbd>{token(row)}</kbd>",
            *(
                f"{signed(columns[key][i])}{both_ways(columns[key][i], most[key])}"
                for key, _ in known
            ),
        ]
        for i, row in enumerate(tokens)
    ]
    heads = ["place", "token", *(name for _, name in known)]
    return (
        '<details class="pg-more"><summary>All numbers, token by token</summary>'
        + table(heads, rows, "Numbers of each token", "ppo")
        + "</details>"
    )


def _how(found: Answer) -> str:
    parts = [
        "Blue is above zero, orange below; the colour is strongest where the number is largest, also told"
        " below the token."
    ]
    if found["critic_update"] is not None:
        parts.append(
            f"The critic is that of update {found['critic_update']}, the last one in a checkpoint: PPO"
            " publishes the policy only, and the published one may be of another update. Advantages are"
            f" those of GAE (gamma {found['gamma']:g}, lambda {found['lam']:g}), before a batch whitens"
            " them."
        )
    if found["other_rewards"]:
        parts.append(
            f"This policy had {found['other_rewards']} further sources of reward, which are not counted here."
        )
    return " ".join(parts)
