"""Prompts and responses as tensors, and what models say of them: logprobs, values, scores.

Shapes: B rows, P prompt, R response tokens, T = P + R, H hidden width, V vocabulary, N the valid
response tokens of all rows, one after the other. Rows are right-padded, so a causal model needs
neither a mask nor position ids to be right on the real tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.common import micro_batches, pad_right
from stages.models import backbone_and_head


class Sequences(NamedTuple):
    """Prompt and response of B rows.

    tokens_BT: prompt then response, right-padded with the pad token.
    prompt_tokens_B, response_tokens_B: their lengths; the end token belongs to the response.
    """

    tokens_BT: Tensor
    prompt_tokens_B: Tensor
    response_tokens_B: Tensor

    @property
    def valid_BR(self) -> Tensor:
        """True on response tokens."""
        R = int(self.response_tokens_B.max())
        return torch.arange(R, device=self.tokens_BT.device) < self.response_tokens_B.unsqueeze(-1)

    @property
    def predict_BR(self) -> Tensor:
        """Position in T whose output predicts response token r; clamped where not valid."""
        R = int(self.response_tokens_B.max())
        spots_BR = (
            self.prompt_tokens_B.unsqueeze(-1) - 1 + torch.arange(R, device=self.tokens_BT.device)
        )
        return spots_BR.clamp(max=self.tokens_BT.shape[1] - 1)

    @property
    def responses_BR(self) -> Tensor:
        """Response tokens; arbitrary where not valid."""
        spots_BR = (self.predict_BR + 1).clamp(max=self.tokens_BT.shape[1] - 1)
        return self.tokens_BT.gather(-1, spots_BR)

    @property
    def predicts_BT(self) -> Tensor:
        """True where the output predicts a response token: in the order of rows, N times."""
        T = self.tokens_BT.shape[1]
        first_B1 = self.prompt_tokens_B.unsqueeze(-1) - 1
        spots_T = torch.arange(T, device=self.tokens_BT.device)
        return (spots_T >= first_B1) & (spots_T < first_B1 + self.response_tokens_B.unsqueeze(-1))

    def spread(self, x_N: Tensor) -> Tensor:
        """Numbers of the N valid response tokens as `[B, R]`, 0 elsewhere."""
        valid_BR = self.valid_BR
        zeros_BR = torch.zeros(valid_BR.shape, dtype=x_N.dtype, device=x_N.device)
        return zeros_BR.masked_scatter(valid_BR, x_N)

    def as_lists(self, x_BR: Tensor) -> list[list[Any]]:
        """What `x_BR` holds for the response tokens of each row, without the padding."""
        lengths = self.response_tokens_B.tolist()
        return [row[:length].tolist() for row, length in zip(x_BR, lengths, strict=True)]

    def rows(self, index: list[int]) -> Sequences:
        """Some rows, cut to the longest of them."""
        at = torch.tensor(index, device=self.tokens_BT.device)
        prompt_B, response_B = self.prompt_tokens_B[at], self.response_tokens_B[at]
        width = int((prompt_B + response_B).max())
        return Sequences(self.tokens_BT[at, :width], prompt_B, response_B)


def make_sequences(
    prompts: list[list[int]], responses: list[list[int]], pad_id: int, device: torch.device
) -> Sequences:
    """Sequences from token lists; every response has at least one token."""
    assert all(responses), "a response without tokens"
    rows = [p + r for p, r in zip(prompts, responses, strict=True)]
    return Sequences(
        pad_right(rows, pad_id, device),
        torch.tensor([len(p) for p in prompts], device=device),
        torch.tensor([len(r) for r in responses], device=device),
    )


def response_logprobs(
    policy: nn.Module,
    batch: Sequences,
    temperature: float,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Logprobs of the response tokens at `temperature`, and the entropy, `[B, R]`; float32.

    Slots that are not valid hold 0. entropy_gradient: it costs time, so only for a bonus in the loss.
    """
    # only what predicts a response token passes the output head: logits [N, V], not [B, T, V]
    logits_NV = policy(
        input_ids=batch.tokens_BT, use_cache=False, logits_to_keep=batch.predicts_BT
    ).logits
    # a bf16 softmax alone costs more accuracy than the whole bf16 forward
    logits_NV = logits_NV.float()
    if temperature != 1:
        logits_NV = logits_NV / temperature
    total_N = logits_NV.logsumexp(-1)
    targets_N1 = batch.responses_BR[batch.valid_BR].unsqueeze(-1)
    logprobs_N = logits_NV.gather(-1, targets_N1).squeeze(-1) - total_N
    if not with_entropy:
        return batch.spread(logprobs_N), None
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        # -sum p log p = log Z - sum p logit
        entropy_N = total_N - (logits_NV.softmax(-1) * logits_NV).sum(-1)
    return batch.spread(logprobs_N), batch.spread(entropy_N)


def rows_to_score(
    prompts: list[list[int]], responses: list[list[int]], eos_id: int
) -> tuple[list[list[int]], list[bool]]:
    """Rows as a reward model reads them, and which responses were cut.

    It was trained on responses that all have an end token, so those that were cut get one; that they
    were is the business of a penalty.
    """
    is_cut = [response[-1] != eos_id for response in responses]
    rows = [
        prompt + response + [eos_id] * cut
        for prompt, response, cut in zip(prompts, responses, is_cut, strict=True)
    ]
    return rows, is_cut


def mean_repetition(responses: list[list[int]], n: int = 4) -> float:
    """Share of the n-grams of a response that stood in it before, mean over responses."""
    shares = []
    for row in responses:
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(shares) / len(shares)


def last_token_scores(
    backbone: nn.Module, head: nn.Module, rows: list[list[int]], pad_id: int, device: torch.device
) -> Tensor:
    """Raw scores `[B]` of a scalar head on a transformer, read at the last token of each row."""
    tokens_BT = pad_right(rows, pad_id, device)
    # by length: a sampled pad token is a token like any other
    last_B = torch.tensor([len(row) - 1 for row in rows], device=device)
    hidden_BTH = backbone(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return in_full(head, hidden_BTH[torch.arange(len(rows), device=device), last_B])


def in_full(head: nn.Module, hidden_NH: Tensor) -> Tensor:
    """A scalar head in float32 whatever the autocast, `[N]` or, of several heads, `[N, heads]`.

    Rounded to bf16, scores with a mean of 8 and a spread of 1 would have some thirty values.
    """
    with torch.autocast(hidden_NH.device.type, enabled=False):
        found_N: Tensor = head(hidden_NH.float())
    return found_N.squeeze(-1)


def in_micro_batches(
    lengths: list[int], rows_at_once: int, device: torch.device, vocab_size: int = 1
) -> Iterator[list[int]]:
    """Row positions in batches of similar length, sized for the device."""
    yield from micro_batches(lengths, rows_at_once, tokens_at_once(device, vocab_size))


def tokens_at_once(device: torch.device, vocab_size: int = 1) -> int:
    """Padded tokens of a micro-batch; the logits of vocab_size for each stay below 2^27 numbers."""
    # measured: short batches win on a CPU, which gains nothing from wide ones
    most = 512 if device.type == "cpu" else 16384
    return min(most, max(1, 2**27 // vocab_size))


def score_all(
    reward_model: nn.Module,
    rows: list[list[int]],
    pad_id: int,
    device: torch.device,
    rows_at_once: int = 64,
) -> Tensor:
    """Raw scores `[B]` of all rows (prompt + response ids) by a sequence classifier."""
    return score_rows(*backbone_and_head(reward_model), rows, pad_id, device, rows_at_once)


@torch.no_grad()
def score_rows(
    backbone: nn.Module,
    head: nn.Module,
    rows: list[list[int]],
    pad_id: int,
    device: torch.device,
    rows_at_once: int = 64,
) -> Tensor:
    """Raw scores `[B]` of all rows, in batches of similar length."""
    scores_B = torch.zeros(len(rows), device=device)
    for index in in_micro_batches([len(row) for row in rows], rows_at_once, device):
        picked = [rows[i] for i in index]
        scores_B[torch.tensor(index, device=device)] = last_token_scores(
            backbone, head, picked, pad_id, device
        )
    return scores_B


def all_logprobs(
    model: nn.Module, batch: Sequences, temperature: float, rows_at_once: int = 64
) -> Tensor:
    """`response_logprobs` of all rows, `[B, R]`, without a gradient, in batches of similar length."""
    return over_responses(
        lambda b: response_logprobs(model, b, temperature)[0],
        batch,
        rows_at_once,
        model.config.vocab_size,  # type: ignore[union-attr, arg-type]
    )


@torch.no_grad()
def over_responses(
    function: Callable[[Sequences], Tensor],
    batch: Sequences,
    rows_at_once: int = 64,
    vocab_size: int = 1,
) -> Tensor:
    """`function` (Sequences -> `[b, r]`) over all rows in batches of similar length, as `[B, R]`."""
    lengths = (batch.prompt_tokens_B + batch.response_tokens_B).tolist()
    device = batch.tokens_BT.device
    result_BR = torch.zeros(batch.valid_BR.shape, device=device)
    for index in in_micro_batches(lengths, rows_at_once, device, vocab_size):
        part_BR = function(batch.rows(index))
        result_BR[torch.tensor(index, device=device), : part_BR.shape[1]] = part_BR
    return result_BR
