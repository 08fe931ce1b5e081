"""One conversation at a time, token by token, for people who watch: the playground's decode loop.

The same seed, prompt and weights give the same text, and where nothing but temperature and top_p
shape the odds it is the text that `generation.generate` gives.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.chat import decode_response
from stages.generation import choose, uniforms
from stages.probe import Shaping, penalised, top_k_only

_HALF = "\ufffd"


@dataclass
class Said:
    """A response so far. ended: it stopped by itself; text holds no half characters until then."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    seconds: float = 0.0


def speak(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    shaping: Shaping,
    seed: int,
    max_tokens: int,
    lock: AbstractContextManager[Any],
) -> Iterator[Said]:
    """The response after each of its tokens; the same object, grown.

    lock: held while the model works, so that others may use it between two tokens.
    """
    said, started = Said(), time.perf_counter()
    uniform_N = uniforms([seed], max_tokens)[0].to(model.device)
    past, ids = None, prompt
    for step in range(max_tokens):
        with lock:
            logits_V, past = _read(model, ids, past)
        logits_V = penalised(logits_V, prompt + said.tokens, shaping.repetition_penalty)
        logits_1V = top_k_only(logits_V, shaping.top_k).unsqueeze(0)
        chosen_1, _ = choose(
            logits_1V, uniform_N[step : step + 1], shaping.temperature, shaping.top_p
        )
        token = int(chosen_1)
        said.tokens.append(token)
        said.ended = token == tokenizer.eos_token_id
        is_last = said.ended or step == max_tokens - 1
        text = decode_response(tokenizer, said.tokens)
        said.text = text if is_last else text.rstrip(_HALF)
        said.seconds = time.perf_counter() - started
        yield said
        if said.ended:
            return
        ids = [token]


@torch.no_grad()
def _read(model: PreTrainedModel, ids: list[int], past: Any) -> tuple[Tensor, Any]:
    """Logits `[V]` behind `ids`, and what the model remembers of all so far."""
    tokens_1T = torch.tensor([ids], device=model.device)
    found = model(input_ids=tokens_1T, past_key_values=past, use_cache=True)
    return found.logits[0, -1].float(), found.past_key_values
