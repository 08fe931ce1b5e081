"""Which of two responses is better, how sure we are, and what is wrong with a set of responses."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.job import Metrics


class WinRate(NamedTuple):
    """Share of prompts on which the first model won, ties counted one half, with its 95 % interval."""

    rate: float
    low: float
    high: float
    ties: float


def win_rate(scores: list[float], other_scores: list[float], seed: int) -> WinRate:
    """Paired by prompt; percentile bootstrap over prompts (2000 draws)."""
    own, other = np.array(scores), np.array(other_scores)
    outcomes = (own > other) + 0.5 * (own == other)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(outcomes), size=(2000, len(outcomes)))
    low, high = np.percentile(outcomes[picks].mean(1), [2.5, 97.5])
    return WinRate(float(outcomes.mean()), float(low), float(high), float((own == other).mean()))


def text_metrics(responses: list[str], tokens: list[int], ended: list[bool]) -> Metrics:
    """Length, variety and defects of the responses that one model gave to different prompts.

    distinct_1, distinct_2: different words / word pairs per word (Li et al. 2016, arXiv 1510.03055).
    duplicate_rate: responses whose very text another prompt also got.
    degenerate_rate: responses that are empty, repeat themselves or duplicate another one.
    """
    words = [response.split() for response in responses]
    singles = Counter(word for row in words for word in row)
    doubles = Counter(pair for row in words for pair in pairwise(row))
    count = Counter(response.strip() for response in responses)
    is_duplicate = [count[response.strip()] > 1 for response in responses]
    flags = [
        not response.strip() or duplicate or repeats_itself(row)
        for response, row, duplicate in zip(responses, words, is_duplicate, strict=True)
    ]
    return {
        "mean_tokens": float(np.mean(tokens)),
        "eos_rate": float(np.mean(ended)),
        "distinct_1": len(singles) / max(1, singles.total()),
        "distinct_2": len(doubles) / max(1, doubles.total()),
        "duplicate_rate": float(np.mean(is_duplicate)),
        "degenerate_rate": float(np.mean(flags)),
    }


def repeats_itself(words: list[str], n: int = 4) -> bool:
    """Whether more than a third of the n-grams are repeats: a loop, not a refrain."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(grams) >= 2 * n and len(set(grams)) < 2 / 3 * len(grams)
