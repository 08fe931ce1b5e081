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
    """A validation twice and its neighbours once (at the ends: the one), so that a lucky draw of
    responses is no peak. Of values that only rise or only fall, the largest stays at its end."""
    found = []
    for at, own in enumerate(means_S):
        window = [*means_S[max(0, at - 1) : at], own, own, *means_S[at + 1 : at + 2]]
        found.append(math.fsum(window) / len(window))
    return found


class Peak(NamedTuple):
    """Where gold was highest, and what happened afterwards; intervals are 95 %.

    update, with low and high: of the highest smoothed gold. drop: from there to the end, as the other
    half of the prompts sees it. proxy_gain: what the proxy gained in that time. fell: gold fell for
    certain while the proxy did not: the run was optimised too far.
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

    The highest of many noisy values stands above the last one by chance alone. So the drop of each half
    of the prompts is taken from the peak that the other half has. Measured on gold that stands still, 5
    of 100 runs are called fallen.
    """
    gold, proxy = np.array(gold_SN, dtype=np.float64), np.array(proxy_SN, dtype=np.float64)
    S, N = gold.shape
    window_SS = np.array([smoothed(row) for row in np.eye(S).tolist()]).T
    at = int(np.argmax(smoothed([mean(row) for row in gold_SN])))
    rng = np.random.default_rng(seed)
    counts_DN = rng.multinomial(N, np.full(N, 1 / N), size=_DRAWS)
    peaks_D = (counts_DN @ gold.T / N @ window_SS.T).argmax(1)
    low, high = np.percentile(peaks_D, [2.5, 97.5], method="nearest")
    smooth_SN = window_SS @ gold
    drop_N = np.zeros(N)
    for half in (0, 1) if N > 1 else ():
        peak = int(smooth_SN[:, 1 - half :: 2].mean(1).argmax())
        drop_N[half::2] = smooth_SN[peak, half::2] - smooth_SN[-1, half::2]
    drop_low, drop_high = np.percentile(counts_DN @ drop_N / N, [2.5, 97.5])
    proxy_S = window_SS @ proxy.mean(1)
    gain = float(proxy_S[-1] - proxy_S[at])
    return Peak(
        updates_S[at],
        updates_S[int(low)],
        updates_S[int(high)],
        float(drop_N.mean()),
        float(drop_low),
        float(drop_high),
        gain,
        bool(drop_low > 0 and high < S - 1 and gain >= 0),
    )


def mean(values: Sequence[float]) -> float:
    """The same to the last bit wherever a peak is looked for."""
    return math.fsum(values) / len(values)


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
