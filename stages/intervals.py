"""A share or a mean with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Figure = dict[str, float | int | None]
"""{"value", "low", "high", "n"}: low and high are the ends of the 95 % interval."""
_Z = 1.959963984540054
_DRAWS = 2000


def share(flags: Sequence[bool]) -> Figure:
    """How many of the flags are true, with the interval of Wilson (1927)."""
    n = len(flags)
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    p = sum(map(bool, flags)) / n
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # at 0 and 1 the formula touches the value but for rounding
    low, high = min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))
    return {"value": p, "low": low, "high": high, "n": n}


def mean(values: Sequence[float], seed: int) -> Figure:
    """The mean, with the percentile bootstrap over the values (2000 draws)."""
    if all(value in (0, 1) for value in values):
        return share([value == 1 for value in values])
    found = np.array(values)
    return bootstrap(len(found), lambda pick: float(found[pick].mean()), seed)


def bootstrap(
    n: int, statistic: Callable[[np.ndarray], float | None], seed: int, draws: int = _DRAWS
) -> Figure:
    """`statistic` of items 0 .. n-1 with its percentile bootstrap; it takes an array of positions.

    A draw on which the statistic is not defined (None) is left out of the interval.
    """
    value = statistic(np.arange(n)) if n else None
    if value is None:
        return {"value": None, "low": None, "high": None, "n": n}
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(0, n, size=n)) for _ in range(draws)]
    low, high = np.percentile([found for found in drawn if found is not None], [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high), "n": n}


def difference(own: Sequence[float], other: Sequence[float], seed: int) -> Figure:
    """Mean of own - other over the same items, with the paired bootstrap."""
    gap = np.array(own, dtype=float) - np.array(other, dtype=float)
    return bootstrap(len(gap), lambda pick: float(gap[pick].mean()), seed)
