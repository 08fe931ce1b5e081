"""The work of the benchmarks: a 7 M Llama, prompts of mixed length, responses of prescribed length.

Lengths are prescribed because speed depends on them: two samplers would otherwise be compared on
different work. The mix is that of a chat model: most responses are short, some are cut at the limit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LogitsProcessor,
)

from stages import generation

VOCABULARY = 2048
# the end token is the last one: see `prescribed`
PAD, BOS, EOS = 0, 1, VOCABULARY - 1
MAX_RESPONSE = 64
_MAX_PROMPT = 32


def small_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """8 layers of width 256 and 2048 words: 7.0 M parameters, of which 0.5 M are the tied head."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}, **ids)).eval()


def scalar_llama(seed: int) -> LlamaForSequenceClassification:
    """The same with a scalar head: a reward model or a critic."""
    config = small_llama().config.to_dict()
    shape = {k: v for k, v in config.items() if k not in ("id2label", "label2id")}
    # small_llama seeds the generator as well
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1)).eval()


def response_lengths(count: int, longest: int = MAX_RESPONSE) -> list[int]:
    """Quantiles of an exponential with mean 0.45 x longest, cut at `longest`: mean 0.4 x longest."""
    lengths = [-0.45 * longest * math.log1p(-(i + 0.5) / count) for i in range(count)]
    return _shuffled([min(longest, max(1, round(length))) for length in lengths], seed=1)


def prompts(count: int, longest: int = _MAX_PROMPT) -> list[list[int]]:
    """Random words; lengths of longest / 8 to `longest`, mean about 0.4 x longest."""
    rng = torch.Generator().manual_seed(3)
    shortest = max(1, longest // 8)
    lengths = [
        round(shortest + (longest - shortest) * ((i + 0.5) / count) ** 2) for i in range(count)
    ]
    # the longest is there whatever the count
    lengths[-1] = longest
    return [
        torch.randint(2, EOS, (length,), generator=rng).tolist()
        for length in _shuffled(lengths, seed=2)
    ]


def _shuffled(items: list[int], seed: int) -> list[int]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]


@contextlib.contextmanager
def prescribed(lengths: dict[int, int]) -> Iterator[None]:
    """Inside, our `generate` ends the row of seed s with an end token after lengths[s] tokens.

    A token is chosen by inverting the cumulative distribution, and the end token is the last one: a
    uniform number just below 1 takes it, and one below 0.99 never does while its probability is
    below 0.01. Nothing is added to what is timed.
    """
    draw = generation.uniforms

    def forced(seeds: list[int], count: int) -> Tensor:
        uniforms_BN = draw(seeds, count) * 0.99
        for row, seed in enumerate(seeds):
            if lengths[seed] <= count:
                uniforms_BN[row, lengths[seed] - 1] = 1 - 2**-40
        return uniforms_BN

    with mock.patch.object(generation, "uniforms", forced):
        yield


class PrescribedLengths(LogitsProcessor):
    """The same for `generate` of transformers: touches one column of the scores."""

    def __init__(self, lengths: list[int], prompt_width: int) -> None:
        self.is_last_BN = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
        for row, length in enumerate(lengths):
            self.is_last_BN[row, length - 1] = True
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_width
        scores[:, EOS] = torch.where(self.is_last_BN[:, step], 1e4, -1e4)
        return scores
