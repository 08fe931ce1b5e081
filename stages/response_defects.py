"""What is wrong with the responses of a model, in figures; and the alarms of a policy gone wrong.

The alarms compare the policy with the sft model that it came from, or with a limit. Each is a rule of
thumb of ours: it says where to look, and no figure of a good policy is known that it would spoil.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.job import Metrics
from stages.answering import Answers
from stages.rollout import mean_repetition

Alarm = dict[str, Any]
_MOST_COMMON = 0.1  # of the prompts, and five of them at least
_LEAST_VARIETY = 0.5  # distinct-2 against sft
_MOST_REPETITION = 0.3  # of the 4-grams of tokens
_MORE_SURPRISE = 2.0  # nats a token that sft finds in the policy's responses, above its own
_MORE_PERPLEXITY = 2.0  # times sft's, on held-out text
_GUESSING = 0.5  # perplexity against that of guessing among all tokens
_FEWEST_ENDS = 0.5  # of sft's share of responses that end by themselves
_MOST_EMPTY = 0.1


def measures(said: Answers) -> Metrics:
    """Figures of the responses that one model gave to different prompts, beside `text_metrics`.

    repetition: share of the 4-grams of tokens that stood in the response before.
    empty_rate: responses without a visible character. most_common_rate: how many prompts got the
    commonest response. tokens_p10, tokens_p50, tokens_p90: quantiles of the length.
    entropy_nats: minus the mean logprob of its own tokens, an estimate of its entropy a token.
    """
    texts = [text.strip() for text in said.texts]
    lengths = [len(row) for row in said.tokens]
    low, middle, high = np.percentile(lengths, [10, 50, 90])
    count = sum(lengths)
    return {
        "repetition": mean_repetition(said.tokens),
        "empty_rate": sum(not text for text in texts) / len(texts),
        "most_common_rate": max(Counter(texts).values()) / len(texts),
        "tokens_p10": float(low),
        "tokens_p50": float(middle),
        "tokens_p90": float(high),
        "entropy_nats": -math.fsum(x for row in said.logprobs for x in row) / count,
    }


def surprise(policy: Answers, kl_nats: float) -> float:
    """Nats a token that the sft model finds in the policy's responses: their loss under it.

    kl_nats: mean over responses of sum log policy / sft, on these responses.
    """
    own = math.fsum(x for row in policy.logprobs for x in row)
    count = sum(len(row) for row in policy.tokens)
    return (kl_nats * len(policy.tokens) - own) / count


def find_alarms(metrics: Metrics, vocab_size: int) -> list[Alarm]:
    """What is wrong with the policy: [{alarm, figure, limit, text}], from the metrics of `evaluate`."""
    return [
        {
            "alarm": alarm,
            "figure": figure,
            "limit": limit,
            "text": text.format(figure=figure, limit=limit),
        }
        for alarm, figure, limit, text in _checks(metrics, vocab_size)
        if figure is not None and limit is not None and figure > limit
    ]


def _checks(
    metrics: Metrics, vocab_size: int
) -> Iterator[tuple[str, float | None, float | None, str]]:
    """(name, figure, limit that it must not exceed, words) of every alarm."""
    of = metrics.get
    prompts = of("prompts") or 1
    yield (
        "one_answer",
        of("most_common_rate"),
        max(_MOST_COMMON, 4.5 / prompts),
        "The same answer was given to {figure:.0%} of the prompts: the policy does not read them.",
    )
    yield (
        "little_variety",
        _ratio(of("sft_distinct_2"), of("distinct_2")),
        1 / _LEAST_VARIETY,
        "The responses have {figure:.1f} times fewer different word pairs than sft's (distinct-2).",
    )
    yield (
        "repetition",
        of("repetition"),
        max(_MOST_REPETITION, 2 * (of("sft_repetition") or 0.0)),
        "{figure:.0%} of the 4-grams of tokens in a response stood in it before: it goes in circles.",
    )
    own = of("sft_entropy_nats")
    yield (
        "garbage",
        of("surprise_nats"),
        None if own is None else own + _MORE_SURPRISE,
        "The sft model finds {figure:.1f} nats in a token of these responses, far above the limit of"
        " {limit:.1f}: they are no language that it knows.",
    )
    yield (
        "language_lost",
        _ratio(of("perplexity"), of("sft_perplexity")),
        _MORE_PERPLEXITY,
        "The perplexity on held-out text is {figure:.1f} times that of sft: the policy forgot its language.",
    )
    yield (
        "guessing",
        of("perplexity"),
        _GUESSING * vocab_size,
        "A perplexity of {figure:.0f} on held-out text is little better than guessing tokens.",
    )
    ends, sft_ends = of("eos_rate"), of("sft_eos_rate")
    yield (
        "never_ends",
        None if ends is None else 1 - ends,
        None if not sft_ends else 1 - _FEWEST_ENDS * sft_ends,
        "{figure:.0%} of the responses were cut off: the policy forgot how to end.",
    )
    yield (
        "empty",
        of("empty_rate"),
        max(_MOST_EMPTY, 2 * (of("sft_empty_rate") or 0.0)),
        "{figure:.0%} of the responses are empty.",
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    if above is None or below is None:
        return None
    return above / max(below, 1e-9)
