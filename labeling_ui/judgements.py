"""What annotators said, as plain values: the input of agreement.py and quality.py.

Shapes: N judgements, K responses of one task, Q pairs of responses, P prompts, C columns, D draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
DRAWS = 2000
MOST_DRAWN = 1000
_Z95 = 1.959964


@dataclass(frozen=True)
class Task:
    """Responses to one prompt, each with a stored place that never changes."""

    id: str
    prompt_id: str
    """What the intervals resample: all that was said about one prompt stays together."""
    lengths: tuple[int, ...] = ()
    """Of each response, in any unit (characters do); empty where unknown."""
    gold: tuple[int, ...] | None = None
    """The right ranks of a hidden test item; None for work."""


@dataclass(frozen=True)
class Judgement:
    """One annotator's answer to one task.

    ranks: by stored place, 1 is best, equal numbers are ties; None where they skipped it.
    shown: shown place -> stored place; None where nobody knows (imported rankings).
    """

    task: Task
    annotator: str
    ranks: tuple[int, ...] | None
    shown: tuple[int, ...] | None = None
    active_seconds: float | None = None
    repeat: bool = False
    """The same person ranked this task before. It tells their consistency, and is no second voice."""

    def __post_init__(self) -> None:
        if self.ranks is not None:
            for other in (self.task.lengths or None, self.task.gold, self.shown):
                assert other is None or len(other) == len(self.ranks), self.task.id


@dataclass(frozen=True)
class Estimate:
    """A share or a coefficient with its 95 % interval.

    An interval from below about 20 prompts is too narrow; all alike, it has no width at all.
    """

    value: float
    low: float
    high: float
    count: int
    """What `value` is a mean of: pairs, or what the function says."""
    prompts: int
    """Independent units behind it."""


class Block(NamedTuple):
    """Judgements that rank the same number of responses."""

    rows_N: Ints
    """Where each stands in the list that was given."""
    ranks_NK: NDArray[np.int16]


def blocks(judgements: Sequence[Judgement]) -> Iterator[Block]:
    """The judgements that have ranks, of one K after the other."""
    by_size: dict[int, list[int]] = {}
    for row, judgement in enumerate(judgements):
        if judgement.ranks is not None and len(judgement.ranks) > 1:
            by_size.setdefault(len(judgement.ranks), []).append(row)
    for size in sorted(by_size):
        rows = by_size[size]
        ranks = np.array([judgements[row].ranks for row in rows], dtype=np.int16)
        yield Block(np.array(rows), ranks)


def pair_signs(ranks_NK: NDArray[Any]) -> NDArray[np.int8]:
    """For each pair of places (i < j): 1 where i has the smaller number, -1 where j has, 0 for equal."""
    first_Q, second_Q = np.triu_indices(ranks_NK.shape[1], 1)
    signs_NQ = np.sign(ranks_NK[:, second_Q] - ranks_NK[:, first_Q])
    return np.asarray(signs_NQ, dtype=np.int8)


def codes(keys: Sequence[str]) -> tuple[Ints, int]:
    """A number for each key, and how many different ones there are; by sorted key, so that what is
    drawn from them does not depend on the order of the input."""
    code_of = {key: code for code, key in enumerate(sorted(set(keys)))}
    return np.fromiter(map(code_of.__getitem__, keys), np.int64, len(keys)), len(code_of)


def sums_by(code_N: Ints, values_NC: NDArray[Any], size: int) -> Floats:
    """The sum of the rows of each code, `[size, C]`."""
    columns = [np.bincount(code_N, weights=column, minlength=size) for column in values_NC.T]
    return np.stack(columns, axis=1)


def bootstrap(
    sums_PC: Floats, statistic: Callable[[Floats], Floats], count: float, seed: int
) -> Estimate:
    """`statistic` of the column sums, with its percentile interval over resampled prompts.

    Pairs of one prompt are strongly correlated, so whole prompts are drawn with replacement (Efron
    and Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 13).

    Args:
        sums_PC: what each prompt adds to each column.
        statistic: from sums `[D, C]` to values `[D]`; NaN where a draw says nothing.
    """
    drawable = _in_bags(sums_PC, seed)
    drawn = _draws(len(drawable), seed).astype(float) @ drawable
    low, high = np.nanpercentile(statistic(drawn), [2.5, 97.5])
    value = float(statistic(sums_PC.sum(0, keepdims=True))[0])
    return Estimate(value, float(low), float(high), round(count), len(sums_PC))


# with many prompts all statistics have the same number of bags: drawn once, they take a tenth
@lru_cache(maxsize=8)
def _draws(prompts: int, seed: int) -> NDArray[np.int16]:
    """How often each draw with replacement takes each prompt, `[D, P]`."""
    picks_DP = np.random.default_rng(seed).integers(0, prompts, size=(DRAWS, prompts))
    picks_DP += np.arange(DRAWS)[:, None] * prompts
    times = np.bincount(picks_DP.ravel(), minlength=DRAWS * prompts)
    times_DP: NDArray[np.int16] = times.reshape(DRAWS, prompts).astype(np.int16)
    return times_DP


def _in_bags(sums_PC: Floats, seed: int) -> Floats:
    """Prompts added up at random to at most `MOST_DRAWN` bags of nearly equal size.

    Sums of independent prompts are independent too, so drawing bags gives the same interval (its
    width is known to 1 / sqrt(2 * bags), 2 %), in a time that does not grow with the prompts.
    """
    prompts = len(sums_PC)
    if prompts <= MOST_DRAWN:
        return sums_PC
    bag_P = np.arange(prompts) * MOST_DRAWN // prompts
    # another stream than that of the draws
    mixed_P = np.random.default_rng([seed, 1]).permutation(prompts)
    return sums_by(bag_P, sums_PC[mixed_P], MOST_DRAWN)


def ratio(sums_PC: Floats, seed: int) -> Estimate | None:
    """First column over second, with its interval; None where the second is 0 everywhere.

    Prompts whose second column is 0 say nothing and are not drawn.
    """
    telling = sums_PC[sums_PC[:, 1] > 0]
    if not len(telling):
        return None
    return bootstrap(telling, lambda sums: sums[:, 0] / sums[:, 1], telling[:, 1].sum(), seed)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of `n` independent trials (Wilson 1927); never without width."""
    z2 = _Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * (share * (1 - share) / n + z2 / (4 * n * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
