"""Where optimising a score stops to help: the peak of gold, and the best-of-n curve to compare with.

Gold is what is watched and not optimised; the proxy is what is optimised (Gao et al. 2022, arXiv
2210.10760). Shapes: S validations, N prompts, D bootstrap draws, n responses of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_DRAWS = 2000


def smoothed(means_S: Sequence[float]) -> list[float]:
    """Mean over a validation and its two neighbours (at the ends: its one), so that a lucky draw of
    responses is no peak. Of values that only rise or only fall, the largest stays at its end."""
    return [
        float(np.mean(means_S[max(0, at - 1) : at + 2], dtype=np.float64))
        for at in range(len(means_S))
    ]


class Peak(NamedTuple):
    """Where gold was highest, and what happened afterwards; intervals are 95 %.

    update, with low and high: of the highest smoothed gold. drop: smoothed gold there minus at the
    end. proxy_gain: the same of the proxy, end minus there. fell: gold fell for certain while the
    proxy did not: the run was optimised too far.
    """

    update: int
    update_low: int
    update_high: int
    drop: float
    drop_low: float
    drop_high: float
    proxy_gain: float
    fell: bool


def find_peak(
    updates_S: Sequence[int],
    gold_SN: Sequence[Sequence[float]],
    proxy_SN: Sequence[Sequence[float]],
    seed: int,
) -> Peak:
    """The first of the highest smoothed validations. All answer the same prompts: a draw takes prompts.

    For `fell` the peak's own interval must end before the last validation, too: the highest of many
    noisy values stands above the last one by chance alone.
    """
    gold, proxy = np.array(gold_SN, dtype=np.float64), np.array(proxy_SN, dtype=np.float64)
    S, N = gold.shape
    window_SS = np.array([smoothed(row) for row in np.eye(S)]).T
    smooth_S = np.array(smoothed([float(np.mean(row)) for row in gold]))
    at = int(smooth_S.argmax())
    rng = np.random.default_rng(seed)
    counts_DN = rng.multinomial(N, np.full(N, 1 / N), size=_DRAWS)
    drawn_DS = counts_DN @ gold.T / N @ window_SS.T
    low, high = np.percentile(drawn_DS.argmax(1), [2.5, 97.5], method="nearest")
    drop_D = drawn_DS[:, at] - drawn_DS[:, -1]
    drop_low, drop_high = np.percentile(drop_D, [2.5, 97.5])
    proxy_S = smoothed([float(np.mean(row)) for row in proxy])
    gain = proxy_S[-1] - proxy_S[at]
    return Peak(
        updates_S[at],
        updates_S[int(low)],
        updates_S[int(high)],
        float(smooth_S[at] - smooth_S[-1]),
        float(drop_low),
        float(drop_high),
        gain,
        bool(drop_low > 0 and high < S - 1 and gain >= 0),
    )


def interval(values_N: Sequence[float], seed: int) -> tuple[float, float]:
    """95 % percentile interval of a mean over prompts."""
    values = np.array(values_N, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(values), size=(_DRAWS, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def expected_of_best(by: Sequence[float], values: Sequence[float], n: int) -> float:
    """The mean of `values` over all ways to draw n of the responses and keep the one highest in `by`.

    Unbiased where the responses are independent samples (Nakano et al. 2021, arXiv 2112.09332, appendix
    I): of N in ascending order the i-th is kept in C(i - 1, n - 1) of C(N, n) draws. Equal ones share.
    """
    by_N, values_N = np.array(by), np.array(values, dtype=np.float64)
    N = len(by_N)
    assert 1 <= n <= N
    order = np.argsort(by_N, kind="stable")
    _, group = np.unique(by_N[order], return_inverse=True)
    own = values_N[order]
    shared = (np.bincount(group, own) / np.bincount(group))[group]
    weights = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
    return float(np.dot(weights, shared))


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, which is the last one in any case."""
    found = [2**k for k in range(most.bit_length()) if 2**k < most]
    return [*found, most]


def gold_at(curve: Sequence[tuple[float, float]], kl: float) -> float | None:
    """Gold of a curve of (KL, gold) at `kl`, between its points on a line; None beyond its end."""
    if not curve or not curve[0][0] <= kl <= curve[-1][0]:
        return None
    return float(np.interp(kl, [x for x, _ in curve], [y for _, y in curve]))
