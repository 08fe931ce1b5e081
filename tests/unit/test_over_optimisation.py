"""Where gold peaks, and what the best of n is worth: by hand, by brute force, and by what is known."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest

from stages.over_optimisation import (
    expected_of_best,
    find_peak,
    gold_at,
    powers_of_two,
    smoothed,
)


def test_a_validation_counts_with_its_neighbours() -> None:
    assert smoothed([1.0, 4.0, 1.0, 7.0]) == [2.0, 2.5, 3.25, 5.0]
    assert smoothed([3.0]) == [3.0]


@pytest.mark.parametrize("length", [2, 3, 7])
def test_what_only_rises_or_only_falls_peaks_at_its_end(length: int) -> None:
    rising = [math.sqrt(k) for k in range(length)]
    assert np.argmax(smoothed(rising)) == length - 1
    assert np.argmax(smoothed(rising[::-1])) == 0


def same_for_all(means: list[float], prompts: int = 40, noise: float = 0.0) -> list[list[float]]:
    rng = random.Random(0)
    return [[value + rng.gauss(0, noise) for _ in range(prompts)] for value in means]


def test_a_peak_inside_is_found_with_what_was_lost_since() -> None:
    """Smoothed: 1/3, 1, 7/4, 2, 7/4, 1, 1/3; the score is 3 at the peak and 17/3 at the end."""
    gold = same_for_all([0, 1, 2, 2, 2, 1, 0])
    found = find_peak([0, 10, 20, 30, 40, 50, 60], gold, same_for_all([0, 1, 2, 3, 4, 5, 6]), 0)
    assert (found.update, found.update_low, found.update_high) == (30, 30, 30)
    assert found.drop == pytest.approx(5 / 3)
    assert (found.drop_low, found.drop_high) == pytest.approx((5 / 3, 5 / 3))
    assert found.proxy_gain == pytest.approx(8 / 3)
    assert found.fell


def test_one_lucky_validation_is_no_peak() -> None:
    gold = same_for_all([0.0, 1.0, 2.0, 3.0, 5.5, 4.0, 5.0, 5.2])
    assert find_peak(range(8), gold, gold, 0).update == 7


def test_gold_that_still_rises_has_its_peak_at_the_end_and_nothing_fell() -> None:
    gold = same_for_all([0.0, 1.0, 2.0, 3.0])
    found = find_peak([0, 1, 2, 3], gold, gold, 0)
    assert (found.update, found.drop, found.fell) == (3, 0.0, False)


def test_noise_is_no_fall() -> None:
    """Of gold that stands still the highest is above the last by chance: some 5 of 100 are believed."""
    believed = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        gold = rng.normal(0, 1, (10, 60)).tolist()
        proxy = same_for_all(list(range(10)))
        found = find_peak(range(10), gold, proxy, seed)
        believed += found.fell
        assert found.update_low <= found.update <= found.update_high
    assert believed <= 6


def test_each_half_of_the_prompts_measures_from_the_peak_of_the_other() -> None:
    """Even prompts peak at 1, odd ones at 3, and all end at 0: smoothed, each finds 3 / 4 or nothing."""
    even, odd = [0.0, 3.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0, 0.0, 0.0]
    found = find_peak(range(6), np.array([even, odd] * 10).T.tolist(), same_for_all([0] * 6, 20), 0)
    assert found.drop == pytest.approx(0.0)
    assert not found.fell


def test_gold_that_falls_along_with_the_score_is_not_over_optimisation() -> None:
    gold = same_for_all([0, 1, 2, 2, 2, 1, 0])
    found = find_peak(range(7), gold, gold, 0)
    assert found.drop_low > 0
    assert not found.fell


def test_the_interval_of_the_peak_is_that_of_prompts_drawn_again() -> None:
    """Half of the prompts peak at 1, half at 3: which half is drawn more often decides."""
    one, three = [0.0, 3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0, 0.0]
    gold = np.array([one] * 21 + [three] * 20).T.tolist()
    found = find_peak(range(5), gold, gold, 0)
    assert found.update_low < found.update_high
    slow = []
    rng = np.random.default_rng(5)
    for _ in range(2000):
        drawn = np.array(gold)[:, rng.integers(0, 41, 41)].mean(1)
        slow.append(int(np.argmax(smoothed(drawn.tolist()))))
    low, high = np.percentile(slow, [2.5, 97.5], method="nearest")
    assert (found.update_low, found.update_high) == (low, high)


# ---- best of n -------------------------------------------------------------------------------


def by_brute_force(by: list[float], values: list[float], n: int) -> float:
    """Every way to draw n of them; equal ones win equally often."""
    outcomes = []
    for drawn in itertools.combinations(range(len(by)), n):
        best = max(by[i] for i in drawn)
        outcomes.append(np.mean([values[i] for i in drawn if by[i] == best]))
    return float(np.mean(outcomes))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_best_of_n_is_the_mean_over_all_draws(n: int) -> None:
    by = [0.3, -1.0, 2.5, 0.9, 1.1, 0.2]
    values = [5.0, 1.0, -2.0, 7.0, 3.0, 0.5]
    assert expected_of_best(by, by, n) == pytest.approx(by_brute_force(by, by, n))
    assert expected_of_best(by, values, n) == pytest.approx(by_brute_force(by, values, n))


def test_by_hand_the_best_of_two_of_three() -> None:
    """Pairs (1,2), (1,3), (2,3): 2, 3, 3."""
    assert expected_of_best([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 2) == pytest.approx(8 / 3)
    assert expected_of_best([1.0, 2.0, 3.0], [9.0, 0.0, 6.0], 3) == 6.0
    assert expected_of_best([1.0, 2.0, 3.0], [9.0, 0.0, 6.0], 1) == 5.0


def test_equal_scores_share_what_they_are_worth() -> None:
    """Drawn with equal scores, each of them is as likely; over pairs: (a,b) 5, (a,c) 10, (b,c) 0."""
    # where all are equal, any n is the mean
    for n in (1, 2, 3):
        assert expected_of_best([1.0, 1.0, 1.0], [9.0, 0.0, 6.0], n) == pytest.approx(5.0)
    by, values = [2.0, 2.0, 1.0], [10.0, 0.0, 99.0]
    assert expected_of_best(by, values, 2) == pytest.approx((5.0 + 10.0 + 0.0) / 3)


def test_of_many_uniform_scores_the_best_of_n_is_the_known_mean() -> None:
    """The largest of n uniform draws has the mean n / (n + 1)."""
    values = [(k + 0.5) / 1000 for k in range(1000)]
    for n in (1, 2, 4, 16):
        assert expected_of_best(values, values, n) == pytest.approx(n / (n + 1), abs=2e-3)


def test_the_sizes_are_doubled_and_end_with_all() -> None:
    assert powers_of_two(16) == [1, 2, 4, 8, 16]
    assert powers_of_two(12) == [1, 2, 4, 8, 12]
    assert powers_of_two(1) == [1]


@pytest.mark.parametrize(
    ("kl", "expected"), [(0.0, 1.0), (0.5, 1.5), (2.0, 4.0), (2.01, None), (-0.1, None)]
)
def test_a_curve_is_read_between_its_points_and_nowhere_else(kl: float, expected: Any) -> None:
    curve = [(0.0, 1.0), (1.0, 2.0), (2.0, 4.0)]
    assert gold_at(curve, kl) == expected
    assert gold_at([], kl) is None
