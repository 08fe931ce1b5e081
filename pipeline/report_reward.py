"""The report's look into a reward model: its accuracy beside people's, its sureness, its mistakes."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from pipeline.files import read_json
from pipeline.report_data import StepView, mapping, read_jsonl
from pipeline.report_plots import (
    Point,
    Row,
    Series,
    chart,
    finite,
    interval_bar,
    number,
    percent,
)

SHOWN_MISTAKES = 8


def reward_view(step: StepView) -> Row:
    """What the template shows of one reward step; every part may be missing (older runs have none)."""
    found = mapping(read_json(step.work / "diagnosis.json")) if step.work else {}
    mistakes = read_jsonl(step.work / "worst_mistakes.jsonl") if step.work else []
    return {
        "accuracies": _accuracies(step.metrics, mapping(found.get("agreement"))),
        "overlap": finite(mapping(found.get("agreement")).get("pairs")) or 0.0,
        "calibration": _calibration(mapping(found.get("calibration"))),
        "ece": finite(mapping(found.get("calibration")).get("ece")),
        "follows": _follows(found),
        "eos": _end_token(mapping(found.get("eos"))),
        "mistakes": [_mistake(row) for row in mistakes[:SHOWN_MISTAKES]],
        "all_mistakes": len(mistakes),
    }


def _accuracies(metrics: Row, people: Row) -> list[tuple[str, str, str, Markup]]:
    """(name, share, interval, bar): the model, and what it can be compared with."""
    rows = [
        ("The model, on all held-out pairs", _three(metrics, "heldout_accuracy"), "orange"),
        ("The model, on pairs that several people ordered", _three(people, "model"), "orange"),
        ("One person predicting another, on those", _three(people, "people"), "blue"),
        (
            "The majority of people, on those: no model can do better",
            _three(people, "best"),
            "grey",
        ),
    ]
    return [
        (name, percent(value) or "", _between(low, high), interval_bar(value, low, high, colour))
        for name, (value, low, high), colour in rows
        if value is not None
    ]


def _three(row: Row, name: str) -> tuple[float | None, float | None, float | None]:
    low, high = finite(row.get(f"{name}_low")), finite(row.get(f"{name}_high"))
    return finite(row.get(name)), *((None, None) if low is None or high is None else (low, high))


def _between(low: float | None, high: float | None, form: Any = percent) -> str:
    return "" if low is None or high is None else f"{form(low)} to {form(high)}"


def _calibration(found: Row) -> Markup | None:
    """Over how sure the model is, how often it is right: on the grey line it means what it says."""
    bins = found.get("bins")
    curve: list[Point] = []
    bars: list[Point] = []
    for row in bins if isinstance(bins, list) else []:
        row = mapping(row)
        x, (y, low, high) = finite(row.get("confidence")), _three(row, "accuracy")
        if x is not None and y is not None:
            curve.append((x, y))
            bars.append((y if low is None else low, y if high is None else high))
    if not curve:
        return None
    ends = (0.5, max(x for x, _ in curve))
    line = [(x, x) for x in ends] if ends[1] > 0.5 else []
    return chart(
        "Calibration",
        "share of pairs ordered rightly, with 95 % intervals",
        "how sure the model is: \u03c3 of the score difference",
        [
            Series("as sure as right", line, "grey", "thin"),
            Series("held-out pairs, equally many a dot", curve, "blue", "dotted", tuple(bars)),
        ],
    )


def _follows(found: Row) -> list[tuple[str, str, str, str, str]]:
    """(feature, correlation of scores, interval, of people's ranks, interval)."""
    rows = []
    for name, words in (
        ("length", "length in tokens"),
        ("position", "place in the list (1 is first)"),
    ):
        sides = [_three(mapping(found.get(name)), side) for side in ("score", "people")]
        if sides[0][0] is not None:
            cells = [
                cell
                for v, low, high in sides
                for cell in (_signed(v), _between(low, high, _signed))
            ]
            rows.append((words, *cells))
    return rows  # type: ignore[return-value]


def _signed(value: Any) -> str:
    found = finite(value)
    return "" if found is None else f"{found:+.2f}".replace("-", "\u2212")


def _end_token(found: Row) -> Row | None:
    gain, low, high = _three(found, "gain")
    if gain is None:
        return None
    return {
        "gain": _signed(gain),
        "interval": _between(low, high, _signed),
        "preferred": percent(found.get("preferred")),
        "responses": number(found.get("responses")),
    }


def _mistake(row: Row) -> Row:
    """One row of the table; the prompt is the last turn."""
    messages = row.get("messages")
    last = mapping(messages[-1]) if isinstance(messages, list) and messages else {}
    return {
        "prompt": str(last.get("content", "")),
        "people": str(row.get("preferred_by_people", "")),
        "model": str(row.get("preferred_by_model", "")),
        "people_score": number(row.get("score_of_people_s"), 2),
        "model_score": number(row.get("score_of_model_s"), 2),
        "probability": percent(row.get("probability"), 0),
        "votes": f"{number(row.get('votes_for_people_s'))} to {number(row.get('votes_for_model_s'))}",
    }
