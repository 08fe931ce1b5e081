"""Shares, differences and agreement with their uncertainty: one definition of each, for all who need it.

An outcome is 1 where the first model won, 0 where it lost, 0.5 for a tie. Outcomes of two models on
the same prompts are paired: only how they differ prompt by prompt counts.

Shapes: N prompts or items, D draws, S seeds (runs), C categories.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
DRAWS = 2000


class Estimate(NamedTuple):
    """A figure with its 95 % interval; `n` is what it is a mean of."""

    value: float
    low: float
    high: float
    n: int


# ---- one set of prompts --------------------------------------------------------------------


def standard_error(values: Sequence[float]) -> float:
    """Of the mean: sample standard deviation (N - 1) / sqrt(N); 0 for a single value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def mean_with_interval(
    values: Sequence[float], seed: int, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """The mean, with a percentile bootstrap over prompts (2000 draws).

    Args:
        values: one a prompt; or several, of which `clusters` says to which prompt each belongs.
            Values of one prompt are not independent: whole prompts are drawn.
    """
    sums_N: Floats = np.asarray(values, dtype=np.float64)
    counts_N: Floats = np.ones_like(sums_N)
    total = len(sums_N)
    if clusters is not None:
        # in the order of the first appearance: what is drawn does not depend on the names
        place: dict[Hashable, int] = {}
        code_N = np.array([place.setdefault(name, len(place)) for name in clusters])
        sums_N = np.bincount(code_N, sums_N).astype(np.float64)
        counts_N = np.bincount(code_N).astype(np.float64)
    low, high = ratio_interval(sums_N, counts_N, seed)
    return Estimate(float(sums_N.sum() / counts_N.sum()), low, high, total)


def ratio_interval(
    numerators_N: NDArray[Any], denominators_N: NDArray[Any], seed: int
) -> tuple[float, float]:
    """95 % percentile interval of sum(numerators) / sum(denominators), by a bootstrap over items."""
    picks_DN = _picks(len(numerators_N), seed)
    ratios_D = numerators_N[picks_DN].sum(1) / denominators_N[picks_DN].sum(1)
    low, high = np.percentile(ratios_D, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int) -> Estimate:
    """Mean of first - second over the same prompts, with a bootstrap over prompts."""
    assert len(first) == len(second), "values of the same prompts"
    return mean_with_interval(np.subtract(first, second).tolist(), seed)


def sign_test(outcomes: Sequence[float]) -> float:
    """Two-sided p of "neither model is better": exact binomial over the prompts without a tie.

    On whether two models' answers are right it is McNemar's exact test: answers on which they agree
    are the ties.
    """
    values = np.asarray(outcomes, dtype=np.float64)
    wins, losses = int((values > 0.5).sum()), int((values < 0.5).sum())
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses).pvalue)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p of "both are right equally often" (McNemar 1947), on the same items."""
    difference = np.subtract(np.asarray(first, dtype=int), np.asarray(second, dtype=int))
    return sign_test((0.5 + 0.5 * difference).tolist())


# ---- several seeds -------------------------------------------------------------------------


def over_seeds(values: Sequence[float]) -> Estimate | None:
    """Mean of one figure a run, with Student's t interval (S - 1 degrees); None below two runs.

    It speaks of other seeds. Two runs give an interval 12.7 standard errors wide on either side.
    """
    if len(values) < 2:
        return None
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * standard_error(values)
    return Estimate(mean, mean - half, mean + half, len(values))


def over_seeds_and_prompts(
    outcomes: Sequence[Sequence[float]], seed: int, same_prompts: bool
) -> Estimate:
    """Mean over runs of the mean over prompts, with a bootstrap that draws runs and prompts.

    Args:
        outcomes: one list a run.
        same_prompts: the n-th outcome of every run is of the same prompt; one draw of prompts then
            holds for all runs (a hard prompt is hard for all). Else each drawn run draws its own.

    With few runs such an interval is too narrow (a bootstrap of S values sees S - 1 of S parts of
    their variance): `over_seeds` beside it is the cautious one.
    """
    rows = [np.asarray(row, dtype=np.float64) for row in outcomes]
    rng = np.random.default_rng(seed)
    means_D = np.empty(DRAWS)
    for draw in range(DRAWS):
        runs = rng.integers(0, len(rows), len(rows))
        if same_prompts:
            prompts = rng.integers(0, len(rows[0]), len(rows[0]))
            means_D[draw] = np.mean([rows[run][prompts].mean() for run in runs])
        else:
            means_D[draw] = np.mean([rng.choice(rows[run], len(rows[run])).mean() for run in runs])
    low, high = np.percentile(means_D, [2.5, 97.5])
    mean = float(np.mean([row.mean() for row in rows]))
    return Estimate(mean, float(low), float(high), len(rows))


# ---- agreement -----------------------------------------------------------------------------


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two annotators on N items beyond chance (Cohen 1960); None where it is undefined.

    (observed - expected) / (1 - expected), expected from how often each uses each category.
    """
    assert len(first) == len(second), "labels of the same items"
    names = {name: code for code, name in enumerate(dict.fromkeys([*first, *second]))}
    table_CC = np.zeros((len(names), len(names)))
    for one, other in zip(first, second, strict=True):
        table_CC[names[one], names[other]] += 1
    table_CC /= table_CC.sum()
    expected = float(table_CC.sum(0) @ table_CC.sum(1))
    return None if expected == 1 else float((np.trace(table_CC) - expected) / (1 - expected))


def nominal_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha of categories without an order, for any number of annotators.

    1 - observed / expected disagreement over the pairs of values within a unit (Krippendorff 2011,
    Computing Krippendorff's Alpha-Reliability, section C). Units with one value say nothing. None
    where there are none left, or all values are equal.
    """
    paired = [unit for unit in units if len(unit) > 1]
    names = {name: code for code, name in enumerate({value: 0 for u in paired for value in u})}
    coincidences_CC = np.zeros((len(names), len(names)))
    for unit in paired:
        counts_C = np.bincount([names[value] for value in unit], minlength=len(names)).astype(float)
        pairs_CC = np.outer(counts_C, counts_C) - np.diag(counts_C)
        coincidences_CC += pairs_CC / (len(unit) - 1)
    totals_C = coincidences_CC.sum(0)
    n = totals_C.sum()
    expected = n * n - (totals_C**2).sum()
    if expected == 0:
        return None
    observed = n - np.trace(coincidences_CC)
    return float(1 - (n - 1) * observed / expected)


# ---- parts ---------------------------------------------------------------------------------


def bootstrap(statistic: Callable[[Floats], Floats], count: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of any statistic of N prompts.

    Args:
        statistic: from how often each prompt was drawn, `[D, N]`, to its values `[D]`.
    """
    picks_DN = _picks(count, seed) + count * np.arange(DRAWS)[:, None]
    times_DN = np.bincount(picks_DN.ravel(), minlength=DRAWS * count).reshape(DRAWS, count)
    low, high = np.percentile(statistic(times_DN.astype(np.float64)), [2.5, 97.5])
    return float(low), float(high)


def _picks(count: int, seed: int) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, count, size=(DRAWS, count))
