"""The length-controlled win rate against closed forms, another optimiser and made-up judges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from stages.length_control import PRIOR_STD, design, fit, length_controlled


def logistic(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def made_up(
    theta: float, phi: float, prompts: int = 800, longer: float = 80.0
) -> tuple[list[float], list[int], list[int]]:
    """Outcomes of a judge who likes length, of a model that is `longer` characters longer."""
    rng = np.random.default_rng(0)
    other = rng.integers(100, 400, prompts)
    own = other + np.round(rng.normal(longer, 60.0, prompts)).astype(int)
    features = design(own.tolist(), other.tolist())
    wins = rng.random(prompts) < logistic(features @ np.array([theta, phi]))
    return wins.astype(float).tolist(), own.tolist(), other.tolist()


def test_equal_lengths_change_nothing() -> None:
    outcomes = [1.0] * 30 + [0.0] * 15 + [0.5] * 5
    found = length_controlled(outcomes, [10] * 50, [10] * 50, seed=0)
    assert found.value == pytest.approx(np.mean(outcomes), abs=1e-3)
    assert found.low < found.value < found.high


def test_two_lengths_by_hand() -> None:
    """Differences of +d and -d with rates a and b: theta is the mean of their log-odds."""
    lengths, other = [20] * 100 + [10] * 100, [10] * 100 + [20] * 100
    outcomes = [1.0] * 80 + [0.0] * 20 + [1.0] * 30 + [0.0] * 70
    theta = (np.log(80 / 20) + np.log(30 / 70)) / 2
    found = length_controlled(outcomes, lengths, other, seed=0)
    assert found.value == pytest.approx(logistic(theta), abs=5e-4)
    # the same with a tie for every win and loss that came together
    halves = [1.0] * 60 + [0.5] * 40 + [0.5] * 60 + [0.0] * 40
    assert length_controlled(halves, lengths, other, seed=0).value == pytest.approx(
        found.value, abs=1e-9
    )


def test_the_fit_is_that_of_a_general_optimiser() -> None:
    outcomes, own, other = made_up(0.4, 1.1, prompts=200)
    features, y = design(own, other), np.array(outcomes)

    def loss(beta: np.ndarray) -> float:
        z = features @ beta
        nats = y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
        return float(nats.sum() + (beta**2).sum() / (2 * PRIOR_STD**2))

    found = fit(features, y, np.ones((1, 200)))[0]
    expected = minimize(loss, np.zeros(2), method="BFGS", tol=1e-12).x
    assert found == pytest.approx(expected, abs=1e-5)
    # a prompt drawn twice is a prompt that stands there twice
    twice = fit(features, y, np.array([[2.0] * 100 + [0.0] * 100]))[0]
    listed = fit(np.tile(features[:100], (2, 1)), np.tile(y[:100], 2), np.ones((1, 200)))[0]
    assert twice == pytest.approx(listed, abs=1e-9)


def test_a_judge_who_only_counts_is_found_out() -> None:
    """Equal quality, one much longer: it wins by length, and half the time without."""
    outcomes, own, other = made_up(0.0, 2.0)
    found = length_controlled(outcomes, own, other, seed=0)
    assert np.mean(outcomes) > 0.7
    assert found.value == pytest.approx(0.5, abs=0.06)
    assert found.low < 0.5 < found.high


def test_a_better_model_stays_better() -> None:
    outcomes, own, other = made_up(1.0, 0.0)
    found = length_controlled(outcomes, own, other, seed=0)
    assert found.value == pytest.approx(logistic(1.0), abs=0.06)
    assert found.low > 0.5


@pytest.mark.parametrize(("outcome", "expected"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_one_who_always_wins_has_a_finite_rate(outcome: float, expected: float) -> None:
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 99, 100).tolist()
    found = length_controlled([outcome] * 100, lengths, [50] * 100, seed=0)
    assert found.value == pytest.approx(expected, abs=1e-3)
    assert 0 <= found.low <= found.value <= found.high <= 1
