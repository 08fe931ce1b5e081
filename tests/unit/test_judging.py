"""Win rates and defects of responses against hand values."""

from __future__ import annotations

import re

import pytest

from stages.judging import repeats_itself, text_metrics, win_rate


def test_ties_count_one_half() -> None:
    found = win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 9.0, 0.0], seed=0)
    assert found.rate == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found.ties == 0.25
    assert found.low <= found.rate <= found.high


def test_equal_models_win_half_with_no_doubt() -> None:
    assert win_rate([1.0] * 5, [1.0] * 5, seed=0) == (0.5, 0.5, 0.5, 1.0)


def test_the_interval_of_60_wins_in_100_is_the_binomial_one() -> None:
    found = win_rate([1.0] * 60 + [0.0] * 40, [0.5] * 100, seed=0)
    assert found.low == pytest.approx(0.504, abs=0.02)
    assert found.high == pytest.approx(0.696, abs=0.02)


def test_one_answer_to_every_prompt_is_flagged() -> None:
    found = text_metrics(["the same words"] * 10, [4] * 10, [True] * 10)
    assert found["duplicate_rate"] == 1.0
    assert found["degenerate_rate"] == 1.0
    assert found["distinct_1"] == pytest.approx(3 / 30)


def test_different_whole_answers_are_not_flagged() -> None:
    texts = [f"story {i} about a fox and its {i} friends" for i in range(10)]
    found = text_metrics(texts, [8] * 10, [True] * 9 + [False])
    assert found["degenerate_rate"] == 0.0
    assert found["eos_rate"] == 0.9
    assert found["mean_tokens"] == 8.0


def test_an_empty_answer_and_a_loop_are_flagged() -> None:
    loop = "and then the fox ran home " * 8
    found = text_metrics(["", loop, "a fine answer"], [1, 50, 4], [True] * 3)
    assert found["degenerate_rate"] == pytest.approx(2 / 3)


def test_a_refrain_is_not_a_loop() -> None:
    song = (
        "row row row your boat gently down the stream merrily merrily merrily merrily"
        " life is but a dream so row row row your boat again tomorrow morning with me"
    )
    assert not repeats_itself(re.findall("[a-z]+", song))
