"""What is wrong with a set of responses: their length, variety and defects."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np

from pipeline.job import Metrics


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
