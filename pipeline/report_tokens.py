"""The policy's answers token by token: where it left the sft model, and what moved the reward model's score.

Shown by classes of the page's own style: the background is the distance (orange: the policy says the
token more readily than sft, blue: less), the line below is the change of the running score (solid: up,
dashed: down), each in three strengths. The figures stand in the tooltip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from markupsafe import Markup, escape

from pipeline.report_plots import Row, finite, number

# nats a token; normalised score
KL_STEPS = (0.1, 0.5, 1.5)
SCORE_STEPS = (0.1, 0.3, 0.8)


def token_views(rows: Sequence[Row], visible: Callable[[str], str]) -> dict[str, Markup]:
    """The shaded text of each prompt's answer; rows that are not whole are left out."""
    found = {}
    for row in rows:
        tokens, kl, scores = (row.get(key) for key in ("tokens", "kl", "scores"))
        prompt = row.get("prompt")
        if not (isinstance(prompt, str) and isinstance(tokens, list) and isinstance(kl, list)):
            continue
        whole = scores if isinstance(scores, list) and len(scores) == len(tokens) else []
        if tokens and len(tokens) == len(kl):
            found[prompt] = _shaded([visible(str(token)) for token in tokens], kl, whole)
    return found


def _shaded(tokens: list[str], kl: list[object], scores: list[object]) -> Markup:
    values = [finite(score) for score in scores]
    changes = [None, *(_change(a, b) for a, b in pairwise(values))]
    parts = []
    for i, token in enumerate(tokens):
        distance = finite(kl[i])
        change = changes[i] if i < len(changes) else None
        classes = [
            *_class("ku", "kd", distance, KL_STEPS),
            *_class("su", "sd", change, SCORE_STEPS),
        ]
        told = f"log p/q {number(distance) or '?'} nats"
        if i < len(values) and values[i] is not None:
            told += f"; score here {number(values[i])}"
        named = f' class="{" ".join(classes)}"' if classes else ""
        parts.append(f'<span{named} title="{escape(told)}">{escape(token)}</span>')
    return Markup("".join(parts))


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _class(up: str, down: str, value: float | None, steps: Sequence[float]) -> list[str]:
    level = sum(abs(value) >= step for step in steps) if value is not None else 0
    return [f"{up if (value or 0) > 0 else down}{level}"] if level else []
