"""A run that goes wrong is noticed once, when it begins; a healthy one is left in peace."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stages.alarms import Alarms

HEALTHY: dict[str, Any] = {
    "kl": 2.0,
    "approx_kl": 0.005,
    "entropy": 1.5,
    "explained_variance": 0.3,
    "response_tokens": 60.0,
    "eos_rate": 0.95,
    "repetition": 0.05,
    "score": 0.5,
}


def said(rows: list[dict[str, Any]], alarms: Alarms | None = None) -> list[tuple[int, str]]:
    alarms = alarms or Alarms("ppo", 12.0, 0.04)
    for update, row in enumerate(rows, 1):
        alarms.check(update, row)
    return [(entry["update"], entry["alarm"]) for entry in alarms.said]


def test_a_healthy_run_is_left_in_peace() -> None:
    assert said([HEALTHY] * 30) == []


@pytest.mark.parametrize(
    ("alarm", "bad"),
    [
        ("kl", {"kl": 13.0}),
        ("update", {"approx_kl": 0.05}),
        ("entropy", {"entropy": 0.2}),
        ("value", {"explained_variance": -0.8}),
        ("length", {"response_tokens": 95.0, "score": 0.9}),
        ("short", {"response_tokens": 20.0}),
        ("repetition", {"repetition": 0.4}),
        ("eos", {"eos_rate": 0.5}),
    ],
)
def test_each_alarm_is_said_once_when_the_mean_of_three_updates_is_bad(
    alarm: str, bad: dict[str, Any]
) -> None:
    rows = [HEALTHY] * 12 + [{**HEALTHY, **bad}] * 6
    assert said(rows) == [(said(rows)[0][0], alarm)]
    assert 13 <= said(rows)[0][0] <= 15


def test_one_bad_update_is_noise() -> None:
    assert said([HEALTHY] * 5 + [{**HEALTHY, "repetition": 0.4}] + [HEALTHY] * 5) == []


def test_longer_responses_that_score_no_better_are_no_hacking() -> None:
    longer = {**HEALTHY, "response_tokens": 95.0, "score": 0.4}
    assert said([HEALTHY] * 5 + [longer] * 5) == []


def test_an_alarm_that_ended_can_begin_again() -> None:
    bad = {**HEALTHY, "kl": 20.0}
    found = said([HEALTHY] * 5 + [bad] * 4 + [HEALTHY] * 4 + [bad] * 4)
    assert [alarm for _, alarm in found] == ["kl", "kl"]


def test_a_critic_may_be_bad_at_first() -> None:
    bad = {**HEALTHY, "explained_variance": -20.0}
    assert said([bad] * 9) == []


def test_a_stop_in_between_changes_nothing() -> None:
    rows = [HEALTHY] * 5 + [{**HEALTHY, "kl": 20.0}] * 6
    first = Alarms("ppo", 12.0, 0.04)
    for update, row in enumerate(rows[:7], 1):
        first.check(update, row)
    second = Alarms("ppo", 12.0, 0.04)
    second.restore(json.loads(json.dumps(first.state())))
    for update, row in enumerate(rows[7:], 8):
        second.check(update, row)
    assert [(e["update"], e["alarm"]) for e in second.said] == said(rows)
