"""The arithmetic of the study of which prompts to label (tests/learning/labels.py)."""

from __future__ import annotations

import math

import pytest

from tests.learning.labels import random_labels, summary


def test_an_accuracy_is_worth_the_random_labels_that_reach_it() -> None:
    curve = {100: 0.6, 400: 0.7}
    assert random_labels(curve, 0.6) == pytest.approx(100)
    # half way up is half way on a scale of logarithms
    assert random_labels(curve, 0.65) == pytest.approx(200)
    assert random_labels(curve, 0.71) is None
    assert random_labels(curve, 0.59) is None


def test_ways_are_compared_within_a_world_and_whole_worlds_only() -> None:
    accuracy = {
        ("a", "random"): (0.60, 0.70),
        ("a", "margin"): (0.60, 0.72),
        ("b", "random"): (0.50, 0.64),
        ("b", "margin"): (0.50, 0.68),
        ("c", "random"): (0.10, 0.10),
    }
    rows = [
        {"world": world, "way": way, "labels": labels, "heldout_accuracy": value}
        for (world, way), values in accuracy.items()
        for labels, value in zip((100, 200), values, strict=True)
    ]
    lines = {(line["way"], line["labels"]): line for line in summary(rows)}
    assert lines["random", 200]["accuracy"] == pytest.approx(0.67)
    assert lines["random", 200]["gain"] == 0
    margin = lines["margin", 200]
    # gains 0.02 and 0.04; Student's t of one degree of freedom is 12.706
    assert margin["gain"] == pytest.approx(0.03)
    assert margin["half"] == pytest.approx(12.706 * 0.02 / math.sqrt(2) / math.sqrt(2), rel=1e-3)
    assert margin["worth"] is None
    assert lines["margin", 100]["worth"] == pytest.approx(100)
