"""The report's section on behaviour: alarms in words, intervals, marks, and nothing hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.report import write_report
from tests.unit.fake_run import HOSTILE, make_run


def figure(value: float, low: float, high: float, chance: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": 40, "chance": chance}


METRICS: dict[str, Any] = {
    "alarms": [{"alarm": "one_answer", "figure": 0.9, "limit": 0.1, "text": f"The same {HOSTILE}"}],
    "sft_perplexity": 4.31,
    "repetition": 0.31,
    "sft_repetition": 0.02,
    "tasks": {
        HOSTILE: {
            "items": 40,
            "models": {
                "policy": {
                    "accuracy": figure(0.25, 0.142, 0.402, 1 / 3),
                    "groups": {"ambig": {"accuracy": figure(0.1, 0.0, 0.2, 1 / 3)}},
                },
                "sft": {"accuracy": figure(0.5, 0.352, 0.648, 1 / 3)},
            },
            "policy_minus_sft": {"accuracy": figure(-0.25, -0.4, -0.1)},
            "too_long": {"policy": 3, "sft": 0},
        }
    },
    "refusals": {"policy": {"safe": {"prompts": 250, "full_refusal": figure(0.064, 0.04, 0.1)}}},
    "toxicity": {"policy": {"mean": figure(0.2, 0.1, 0.3)}},
    "toxicity_scorer": HOSTILE,
    "context": {"policy": {"limit": 64, "unread": ["needle: 24 tokens: too short"]}},
}


def page(folder: Path, rows: list[dict[str, Any]], **metrics: Any) -> str:
    run = make_run(folder, **metrics)
    [artifact] = run.glob("evaluate/*/artifact")
    # the report reads what is there; the digest is the business of verify
    (artifact / "context.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_report(run).read_text(encoding="utf-8")


def test_alarms_figures_intervals_and_marks_are_shown(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"model": "policy", "kind": "needle", "length": n, "depth": 0.5, "value": 0.75, "n": 4}
        for n in (32, 96)
    ]
    rows += [
        {"model": "policy", "kind": "position", "from": a, "to": a + 3, "nats": 3 - a / 40}
        for a in range(1, 96, 4)
    ]
    html = page(tmp_path, rows, **METRICS)
    section = html.split('<section id="behaviour">')[1].split("</section>")[0]
    assert "1 alarm: something is wrong with the policy" in section
    assert "14.2\u202f% to 40.2\u202f%" in section
    assert "33.3\u202f%" in section
    assert 'title="differs from sft">▼' in section  # the accuracy fell
    assert 'title="differs from sft">▲' in section  # the repetition rose
    assert "40 items" in section
    assert "policy 3 items" in section
    assert "6.4\u202f%" in section
    assert "past limit" in section
    assert "the model&#39;s limit" in section
    assert "24 tokens: too short" in section
    # and among what a careful reader should know
    assert "The same" in html.split('<section id="care"')[1].split("</ul>")[0]
    assert "<script>" not in html
    assert "onerror=alert(2)>" not in html


def test_without_alarms_it_says_so_and_without_the_metric_it_says_nothing(tmp_path: Path) -> None:
    quiet = page(tmp_path / "a", [], alarms=[])
    assert "No alarm" in quiet
    assert "No alarm" not in page(tmp_path / "b", [])


def test_figures_of_the_wrong_kind_do_not_break_the_page(tmp_path: Path) -> None:
    html = page(
        tmp_path,
        [{"model": "policy", "kind": "needle", "length": "x", "depth": None}, {"kind": "position"}],
        alarms="no",
        tasks={"a": None, "b": {"models": []}},
        refusals=[1],
        toxicity={"policy": {"mean": "high"}},
        context={"policy": {"limit": "far", "unread": 3}},
    )
    assert '<section id="behaviour">' in html
