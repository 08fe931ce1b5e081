"""The report's section on behaviour: alarms, the models side by side, benchmarks, refusals, toxicity, context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from pipeline.report_data import StepView, mapping, read_jsonl
from pipeline.report_plots import Mark, Row, Series, chart, finite, number, percent

MODELS = ("policy", "sft", "base")
_COLOURS = {"policy": "orange", "sft": "blue", "base": "grey"}
# a figure without an interval is marked when it moved by so much; a rule of thumb of ours
_MOVED = 0.2
_FIGURES: tuple[tuple[str, str, bool], ...] = (
    # metric, words, whether it is a share
    ("perplexity", "Perplexity, held-out text", False),
    ("bits_per_byte", "Bits per byte, held-out text", False),
    ("mean_tokens", "Tokens a response, mean", False),
    ("tokens_p10", "Tokens, shortest tenth", False),
    ("tokens_p90", "Tokens, longest tenth", False),
    ("eos_rate", "Ended by themselves", True),
    ("repetition", "Repeated 4-grams of tokens", True),
    ("distinct_1", "Distinct words", False),
    ("distinct_2", "Distinct word pairs", False),
    ("duplicate_rate", "Said to another prompt too", True),
    ("most_common_rate", "Got the commonest answer", True),
    ("empty_rate", "Empty", True),
    ("degenerate_rate", "Empty, looping or duplicate", True),
    ("entropy_nats", "Entropy, nats a token", False),
)
_WORDS = {
    "accuracy": "accuracy",
    "accuracy_per_token": "accuracy, per token",
    "accuracy_per_byte": "accuracy, per byte",
    "true_probability": "probability of the true answers",
    "more_likely": "more stereotyping sentence is likelier",
    "exact_match": "exact match",
    "answered": "gave an answer",
    "bias_ambig": "bias, ambiguous (−1 to 1)",
    "bias_disambig": "bias, disambiguated (−1 to 1)",
    "mean": "mean toxicity",
    "share_toxic": "share at least 0.5",
    "expected_maximum": "expected maximum",
    "any_toxic": "prompts with a toxic one",
    "compliance": "complied",
    "full_refusal": "refused",
    "partial_refusal": "refused in part",
}


class Cell(NamedTuple):
    """A figure, its interval in words, and how it differs from sft: "", "▲", "▼"."""

    text: str | None
    interval: str | None = None
    mark: str = ""


class Line(NamedTuple):
    """One row of a table: a name and a cell for each model; chance only for benchmarks."""

    name: str
    cells: list[Cell]
    chance: str | None = None


def behaviour(step: StepView | None) -> Row | None:
    """Everything that the section shows of the last evaluation; None where it says nothing of it."""
    if step is None:
        return None
    metrics = step.metrics
    rows = read_jsonl(step.work / "artifact" / "context.jsonl") if step.work else []
    return {
        "alarms": alarms(metrics),
        "checked": "alarms" in metrics,
        "figures": _figures(metrics),
        "tasks": _tasks(mapping(metrics.get("tasks"))),
        "refusals": _refusals(mapping(metrics.get("refusals"))),
        "annotations": mapping(metrics.get("refusal_annotations")),
        "toxicity": _of_models(mapping(metrics.get("toxicity"))),
        "scorer": metrics.get("toxicity_scorer"),
        "loss_by_position": _loss_by_position(rows, mapping(metrics.get("context"))),
        "needles": _needles(rows, mapping(metrics.get("context"))),
        "unread": _unread(mapping(metrics.get("context"))),
        "harness": _harness(step),
    }


def alarms(metrics: Row) -> list[str]:
    """The words of every alarm; a file may hold anything."""
    found = metrics.get("alarms")
    said = [mapping(alarm).get("text") for alarm in found] if isinstance(found, list) else []
    return [str(text) for text in said if text]


def _figures(metrics: Row) -> list[Line]:
    lines = []
    for name, words, is_share in _FIGURES:
        values = [
            finite(metrics.get(name if who == "policy" else f"{who}_{name}")) for who in MODELS
        ]
        if values[0] is None:
            continue
        own, sft = values[0], values[1]
        mark = ""
        if sft is not None and abs(own - sft) > _MOVED * max(abs(sft), 0.05 if is_share else 0.0):
            mark = _arrow(own - sft)
        show = percent if is_share else number
        cells = [Cell(show(value), None, mark * (i == 0)) for i, value in enumerate(values)]
        lines.append(Line(words, cells))
    return lines


def _tasks(tasks: Row) -> list[Row]:
    found = []
    for name, task in tasks.items():
        task = mapping(task)
        models = mapping(task.get("models"))
        gaps = mapping(task.get("policy_minus_sft"))
        lines = _lines(models, gaps)
        groups = {
            str(group): _lines(
                {
                    who: mapping(mapping(mapping(models.get(who)).get("groups")).get(group))
                    for who in models
                },
                {},
            )
            for group in mapping(mapping(models.get("policy")).get("groups"))
        }
        cut = mapping(task.get("too_long"))
        found.append(
            {
                "name": name,
                "count": finite(task.get("items")),
                "lines": lines,
                "groups": groups,
                "cut": ", ".join(f"{who} {number(n)}" for who, n in cut.items() if n),
            }
        )
    return found


def _refusals(refusals: Row) -> dict[str, list[Line]]:
    policy = mapping(refusals.get("policy"))
    return {
        str(group): _lines(
            {who: mapping(mapping(refusals.get(who)).get(group)) for who in refusals},
            mapping(mapping(policy.get(group)).get("minus_sft")),
        )
        for group in policy
    }


def _of_models(models: Row) -> list[Line]:
    return _lines({who: mapping(found) for who, found in models.items()}, {})


def _lines(models: Row, gaps: Row) -> list[Line]:
    """A line for each figure {value, low, high, chance} that the policy has."""
    lines = []
    for name, figure in mapping(models.get("policy")).items():
        if name not in _WORDS:
            continue
        share = "bias" not in name
        cells = []
        for who in MODELS:
            own = mapping(mapping(models.get(who)).get(name))
            gap = mapping(gaps.get(name)) if who == "policy" else {}
            cells.append(Cell(_show(own.get("value"), share), _interval(own, share), _mark(gap)))
        lines.append(Line(_WORDS[name], cells, _show(mapping(figure).get("chance"), share)))
    return lines


def _show(value: Any, share: bool) -> str | None:
    return percent(value) if share else number(value, 2)


def _interval(figure: Row, share: bool) -> str | None:
    low, high = (_show(figure.get(end), share) for end in ("low", "high"))
    return f"{low} to {high}" if low and high else None


def _mark(gap: Row) -> str:
    """An arrow where the whole interval of the paired difference lies on one side of 0."""
    low, high = finite(gap.get("low")), finite(gap.get("high"))
    if low is None or high is None or low <= 0 <= high:
        return ""
    return _arrow(low)


def _arrow(change: float) -> str:
    return "▲" if change > 0 else "▼"


# ---- the context window --------------------------------------------------------------------


def _loss_by_position(rows: Sequence[Row], context: Row) -> Markup | None:
    limit = finite(mapping(context.get("policy")).get("limit"))
    series = []
    for who in ("base", "sft", "policy"):
        curve = [
            ((a + b) / 2, nats)
            for row in rows
            if row.get("kind") == "position" and row.get("model") == who
            for a, b, nats in [
                (finite(row.get("from")), finite(row.get("to")), finite(row.get("nats")))
            ]
            if a is not None and b is not None and nats is not None
        ]
        look = {"base": "thin", "sft": "line", "policy": "dotted"}[who]
        series.append(Series(who, curve, _COLOURS[who], look))  # type: ignore[arg-type]
    own = series[-1].points
    inside = [point for point in own if limit is not None and point[0] <= limit]
    past = limit is not None and any(x > limit for x, _ in own)
    mark = Mark(*inside[-1], "the model's limit") if past and inside else None
    return chart("Loss by position", "nats per token", "position, tokens", series, mark)


def _needles(rows: Sequence[Row], context: Row) -> list[tuple[str, Markup]]:
    """A heat table of each model: how often the needle was found, by length and depth."""
    found = []
    for who in MODELS:
        cells = {
            (finite(row.get("length")), finite(row.get("depth"))): row
            for row in rows
            if row.get("kind") == "needle" and row.get("model") == who
        }
        if cells:
            limit = finite(mapping(context.get(who)).get("limit"))
            found.append((who, _heat(cells, limit, who)))
    return found


def _heat(cells: dict[tuple[Any, Any], Row], limit: float | None, who: str) -> Markup:
    lengths = sorted({length for length, _ in cells if length is not None})
    depths = sorted({depth for _, depth in cells if depth is not None})
    left, top, wide, high = 74, 20, 74, 30
    width, height = left + wide * len(lengths) + 6, top + high * len(depths) + 40
    parts = [f'<text x="{left - 8}" y="12" text-anchor="end">depth</text>']
    for j, depth in enumerate(depths):
        y = top + high * j
        parts.append(
            f'<text x="{left - 8}" y="{y + 20}" text-anchor="end">{percent(depth, 0)}</text>'
        )
        for i, length in enumerate(lengths):
            value = finite(mapping(cells.get((length, depth))).get("value"))
            if value is None:
                continue
            x = left + wide * i
            parts.append(
                f'<rect class="heat" x="{x}" y="{y}" width="{wide - 3}" height="{high - 3}" rx="4"'
                f' fill-opacity="{0.08 + 0.72 * min(1.0, max(0.0, value)):.2f}"/>'
                f'<text class="cell" x="{x + wide / 2 - 1.5}" y="{y + 19}" text-anchor="middle">'
                f"{percent(value, 0)}</text>"
            )
    bottom = top + high * len(depths)
    for i, length in enumerate(lengths):
        middle = left + wide * i + wide / 2 - 1.5
        parts.append(
            f'<text x="{middle}" y="{bottom + 14}" text-anchor="middle">{number(length, 6)}</text>'
        )
        if limit is not None and length > limit:
            parts.append(
                f'<text x="{middle}" y="{bottom + 29}" text-anchor="middle">past limit</text>'
            )
    return Markup(
        f'<svg class="needles" viewBox="0 0 {width} {height}" width="{width}" role="img"'
        f' aria-label="{escape(who)}: needles found, by length and depth">{"".join(parts)}</svg>'
    )


def _unread(context: Row) -> list[str]:
    found = []
    for who, figures in context.items():
        said = mapping(figures).get("unread")
        found += [f"{who}: {text}" for text in said] if isinstance(said, list) else []
    return found


def _harness(step: StepView) -> list[Row]:
    """The figures of the LM Evaluation Harness, where somebody asked for them."""
    try:
        said = json.loads((step.work / "lm_eval.json").read_text("utf-8")) if step.work else {}
    except (OSError, ValueError):
        return []
    rows = mapping(said).get("rows")
    return [mapping(row) for row in rows] if isinstance(rows, list) else []
