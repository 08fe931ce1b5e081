"""Defects of responses against hand values."""

from __future__ import annotations

import re

import pytest

from stages.text_metrics import repeats_itself, text_metrics


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
