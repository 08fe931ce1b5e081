"""A share or a mean with its 95 % interval, as it stands in metrics files."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.statistics import mean_with_interval, paired_difference

Figure = dict[str, float | int | None]
"""{"value", "low", "high", "n"}: low and high are the ends of the 95 % interval."""
_Z = 1.959963984540054


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
    """The mean, with the percentile bootstrap over the values; of zeros and ones with Wilson's."""
    if all(value in (0, 1) for value in values):
        return share([value == 1 for value in values])
    return mean_with_interval(values, seed)._asdict()


def difference(own: Sequence[float], other: Sequence[float], seed: int) -> Figure:
    """Mean of own - other over the same items, with the paired bootstrap."""
    return paired_difference(own, other, seed)._asdict()
