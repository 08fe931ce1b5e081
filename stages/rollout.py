"""Prompts and responses as tensors, and what models say of them: logprobs, values, scores.

Shapes: B rows, P prompt, R response tokens, T = P + R, V vocabulary. Rows are right-padded, so a
causal model needs neither a mask nor position ids to be right on the real tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stages.common import micro_batches, pad_right


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
    policy: nn.Module, batch: Sequences, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logprobs of the response tokens at `temperature`, and the entropy, `[B, R]`; float32.

    Not valid slots hold arbitrary finite numbers.
    """
    # logits only from the first response token of the shortest prompt on
    first = int(batch.prompt_tokens_B.min()) - 1
    logits_BTV = policy(
        input_ids=batch.tokens_BT,
        use_cache=False,
        logits_to_keep=batch.tokens_BT.shape[1] - first,
    ).logits
    spots_BR = batch.predict_BR - first
    V = logits_BTV.shape[-1]
    logits_BRV = logits_BTV.gather(1, spots_BR.unsqueeze(-1).expand(-1, -1, V)).float()
    # a bf16 softmax alone costs more accuracy than the whole bf16 forward
    logprobs_BRV = (logits_BRV / temperature).log_softmax(-1)
    logprobs_BR = logprobs_BRV.gather(-1, batch.responses_BR.unsqueeze(-1)).squeeze(-1)
    if not with_entropy:
        return logprobs_BR, None
    with torch.no_grad():
        entropy_BR = -(logprobs_BRV.exp() * logprobs_BRV).sum(-1)
    return logprobs_BR, entropy_BR


class ValueModel(nn.Module):
    """A reward model read at every response token: the value of the state before it.

    mean, std: normalisation of the reward model, so that values start on the scale of the scores.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.mean = mean
        self.std = std

    def forward(self, tokens_BT: Tensor, spots_BR: Tensor) -> Tensor:
        """Values `[B, R]` at positions `spots_BR` of `tokens_BT`; float32."""
        hidden_BTH = self.backbone(input_ids=tokens_BT, use_cache=False).last_hidden_state
        H = hidden_BTH.shape[-1]
        hidden_BRH = hidden_BTH.gather(1, spots_BR.unsqueeze(-1).expand(-1, -1, H))
        return (self.head(hidden_BRH).squeeze(-1).float() - self.mean) / self.std


def last_token_scores(
    reward_model: nn.Module, rows: list[list[int]], pad_id: int, device: torch.device
) -> Tensor:
    """Raw scores `[B]` of a sequence classifier, read at the last real token of each row."""
    tokens_BT = pad_right(rows, pad_id, device)
    # right-padded: the classifier takes the last token that is not pad
    return reward_model(input_ids=tokens_BT, use_cache=False).logits.squeeze(-1).float()


def in_micro_batches(
    lengths: list[int], rows_at_once: int, device: torch.device
) -> Iterator[list[int]]:
    """Row positions in batches of similar length, sized for the device."""
    # measured: short batches win on a CPU, which gains nothing from wide ones
    max_tokens = 1024 if device.type == "cpu" else 16384
    yield from micro_batches(lengths, rows_at_once, max_tokens)


@torch.no_grad()
def score_all(
    reward_model: nn.Module,
    rows: list[list[int]],
    pad_id: int,
    device: torch.device,
    rows_at_once: int = 64,
) -> Tensor:
    """Raw scores `[B]` of all rows (prompt + response ids), in batches of similar length."""
    scores_B = torch.zeros(len(rows), device=device)
    for index in in_micro_batches([len(row) for row in rows], rows_at_once, device):
        batch_B = last_token_scores(reward_model, [rows[i] for i in index], pad_id, device)
        scores_B[torch.tensor(index, device=device)] = batch_B
    return scores_B


@torch.no_grad()
def over_responses(
    function: Callable[[Sequences], Tensor], batch: Sequences, rows_at_once: int = 64
) -> Tensor:
    """`function` (Sequences -> `[b, r]`) over all rows in batches of similar length, as `[B, R]`."""
    lengths = (batch.prompt_tokens_B + batch.response_tokens_B).tolist()
    result_BR = torch.zeros(batch.valid_BR.shape, device=batch.tokens_BT.device)
    for index in in_micro_batches(lengths, rows_at_once, batch.tokens_BT.device):
        part = function(batch.rows(index))
        result_BR[torch.tensor(index, device=part.device), : part.shape[1]] = part
    return result_BR
