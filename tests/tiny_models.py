"""Tiny Llama and GPT-2 models for tests that need exact or double-precision answers.

Both kinds matter: rotary positions are relative, so an error of absolute positions (padding without
position_ids) shows in GPT-2 only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

KINDS = ("llama", "gpt2")
PAD, BOS, EOS = 0, 1, 2


def tiny_config(kind: str, vocab_size: int = 61, width: int = 32) -> PreTrainedConfig:
    """Two layers without dropout."""
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if kind == "llama":
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            **ids,
        )
    return GPT2Config(
        vocab_size=vocab_size,
        n_embd=width,
        n_layer=2,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **ids,
    )


def tiny_model(
    kind: str, *, vocab_size: int = 61, width: int = 32, seed: int = 0, sharpness: float = 4.0
) -> PreTrainedModel:
    """A language model with random weights; `sharpness` scales the matrices.

    At the initial scale all tokens are almost equally probable, and a wrong position hardly shows.
    """
    torch.manual_seed(seed)
    config = tiny_config(kind, vocab_size, width)
    return _sharpened(AutoModelForCausalLM.from_config(config, dtype=torch.float32), sharpness)


def tiny_reward_model(
    kind: str, *, vocab_size: int = 61, width: int = 32, seed: int = 0, sharpness: float = 4.0
) -> PreTrainedModel:
    """A sequence classifier with one label and random weights."""
    torch.manual_seed(seed)
    config = tiny_config(kind, vocab_size, width)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return _sharpened(model, sharpness)


def _sharpened(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor if parameter.dim() > 1 else 1.0)
        # transformers begins the row of the pad token at zero, where the slope of a norm is 1000
        rows = model.get_input_embeddings().weight
        rows[rows.abs().sum(-1) == 0] = rows[-1].clone()
    return model.eval()


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Within: what asks for float32 gets float64, so that a float64 model is one from end to end.

    Norms and rotary angles of transformers, and our own log-softmax, go through float32 whatever the
    weights are. Sums in another order then differ by 1e-7, which would hide small errors of ours.
    """
    float32, to_float = torch.float32, torch.Tensor.float
    torch.float32 = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32 = float32  # type: ignore[misc]
        torch.Tensor.float = to_float  # type: ignore[method-assign]


def all_responses(vocab_size: int, end: int, longest: int) -> list[list[int]]:
    """Every response that can be sampled: ended by `end`, or cut at `longest` tokens."""
    # the pad token can be sampled too, as in any real vocabulary
    others = [token for token in range(vocab_size) if token != end]
    unfinished: list[list[int]] = [[]]
    done: list[list[int]] = []
    for _ in range(longest):
        done += [[*row, end] for row in unfinished]
        unfinished = [[*row, token] for row in unfinished for token in others]
    return done + unfinished


def exact_logprob(
    model: nn.Module, prompt: list[int], response: list[int], temperature: float
) -> Tensor:
    """log p(response | prompt) the slow way: one row, no padding, every position by itself."""
    logits_TV = model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
    at = len(prompt) - 1
    terms = [logits_TV[at + r].log_softmax(-1)[token] for r, token in enumerate(response)]
    return torch.stack(terms).sum()
