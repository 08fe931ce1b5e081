"""Scores of the K responses of a prompt, the prompt read once.

A row is the prompt and then all its responses, one behind the other. A token attends to the prompt
and to its own response only, and counts its position from the prompt's end, so every response is
computed as if it stood there alone: the same numbers up to rounding, K - 1 readings of the prompt
saved, and no padding between responses. The mask is that of tree attention (SpecInfer, arXiv
2305.09781), here in training.

Measured on one CPU thread, 7 M Llama, prompts of 64 and responses of 32 tokens on average, forward
and backward per ranking: separate rows 0.34 s (K=4) and 0.84 s (K=9), the prompt's key-value cache
expanded to the responses 0.27 s and 0.46 s, this 0.16 s and 0.36 s.

Shapes: G prompts, K responses of one prompt, N responses of all of them, T row, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.job import Out
from stages.common import pad_right
from stages.models import backbone_and_head
from stages.rollout import in_micro_batches

# the attention of a row costs its length squared, most of it masked
_ROW_TOKENS = 1024


# with short prompts before long responses the mask costs more than the prompts: measured 173 s against
# about 140 s at a saving of 1.2, and half the time at 2
_WORTH_IT = 1.4


class PromptGroup(NamedTuple):
    """The token ids of a prompt and of its responses; a response ends with the end token."""

    prompt: list[int]
    responses: list[list[int]]


class Rows(NamedTuple):
    """What a backbone reads, and where the last token of each response stands.

    attends_GTT: True where a token (dimension 1) attends to another; None is causal attention.
    """

    tokens_GT: Tensor
    positions_GT: Tensor | None
    attends_GTT: Tensor | None
    row_N: Tensor
    last_N: Tensor


def shared_rows(groups: Sequence[PromptGroup], pad_id: int, device: torch.device) -> Rows:
    """Rows of prompt, response, response, ...: one for each prompt, more where it grows too long."""
    tokens, positions, parts, row, last = [], [], [], [], []
    for number, (prompt, responses) in enumerate(_rows(groups)):
        ids, position, part = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for index, response in enumerate(responses, 1):
            ids += response
            position += range(len(prompt), len(prompt) + len(response))
            part += [index] * len(response)
            row.append(number)
            last.append(len(ids) - 1)
        tokens.append(ids)
        positions.append(position)
        parts.append(part)
    tokens_GT = pad_right(tokens, pad_id, device)
    part_GT = pad_right(parts, -1, device)
    T = tokens_GT.shape[1]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    same_GTT = part_GT.unsqueeze(2) == part_GT.unsqueeze(1)
    attends_GTT = causal_TT & (same_GTT | (part_GT == 0).unsqueeze(1))
    return Rows(
        tokens_GT,
        pad_right(positions, 0, device),
        attends_GTT,
        torch.tensor(row, device=device),
        torch.tensor(last, device=device),
    )


def _rows(groups: Sequence[PromptGroup]) -> Iterator[PromptGroup]:
    """The groups, those of too many tokens as several with the same prompt."""
    for prompt, responses in groups:
        limit = max(_ROW_TOKENS, 2 * len(prompt))
        part: list[list[int]] = []
        length = len(prompt)
        for response in responses:
            if part and length + len(response) > limit:
                yield PromptGroup(prompt, part)
                part, length = [], len(prompt)
            part.append(response)
            length += len(response)
        yield PromptGroup(prompt, part)


def separate_rows(groups: Sequence[PromptGroup], pad_id: int, device: torch.device) -> Rows:
    """One row for each response, with its prompt."""
    rows = [prompt + response for prompt, responses in groups for response in responses]
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    row = torch.arange(len(rows), device=device)
    return Rows(pad_right(rows, pad_id, device), None, None, row, last)


class GroupScorer(nn.Module):
    """A sequence classifier, reading groups: the module that DDP wraps.

    share_prefix: read each prompt once (`cannot_share_prefix` says whether the model is able to).
    """

    def __init__(self, model: nn.Module, pad_id: int, share_prefix: bool) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id
        self.share_prefix = share_prefix

    def forward(self, groups: Sequence[PromptGroup]) -> Tensor:
        """Raw scores `[N, H]` at the last token of each response, group by group; float32."""
        backbone, head = backbone_and_head(self.model)
        make = shared_rows if self.share_prefix else separate_rows
        rows = make(groups, self.pad_id, head.weight.device)
        extra = {}
        if rows.attends_GTT is not None:
            extra = {
                "attention_mask": _mask(backbone, rows.attends_GTT),
                "position_ids": rows.positions_GT,
            }
        hidden_GTD = backbone(input_ids=rows.tokens_GT, use_cache=False, **extra).last_hidden_state
        scores_NH: Tensor = head(hidden_GTD[rows.row_N, rows.last_N])
        return scores_NH.float()

    def cost(self, group: PromptGroup) -> int:
        """Padded tokens of a group, for micro-batches of similar size."""
        if self.share_prefix:
            return sum(len(row.prompt) + sum(map(len, row.responses)) for row in _rows([group]))
        longest = max(map(len, group.responses))
        return len(group.responses) * (len(group.prompt) + longest)


def _mask(backbone: nn.Module, attends_GTT: Tensor) -> Tensor:
    """The mask `[G, 1, T, T]` as the model's attention takes it: transformers hands it on as it is."""
    attends_G1TT = attends_GTT.unsqueeze(1)
    if getattr(backbone.config, "_attn_implementation", "eager") == "sdpa":
        return attends_G1TT
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(attends_G1TT.shape, device=attends_GTT.device).masked_fill(
        ~attends_G1TT, lowest
    )


@torch.no_grad()
def score_groups(scorer: GroupScorer, groups: Sequence[PromptGroup], at_once: int = 64) -> Tensor:
    """Raw scores `[N, H]` of all groups in their order, in micro-batches of similar size."""
    device = backbone_and_head(scorer.model)[1].weight.device
    found: dict[int, Tensor] = {}
    for index in in_micro_batches([scorer.cost(group) for group in groups], at_once, device):
        scores_NH = scorer([groups[i] for i in index])
        sizes = [len(groups[i].responses) for i in index]
        found |= dict(zip(index, scores_NH.split(sizes), strict=True))
    return torch.cat([found[i] for i in range(len(groups))])


@torch.no_grad()
def cannot_share_prefix(model: nn.Module, groups: Sequence[PromptGroup], pad_id: int) -> str | None:
    """Why this model cannot read a prompt once for all responses; None if it can.

    Tries it on the largest of `groups`: recurrent layers, position biases that the mask carries and
    attention kernels of their own ignore or refuse a mask.
    """
    config = backbone_and_head(model)[0].config
    longest = max(len(g.prompt) + max(map(len, g.responses)) for g in groups)
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        # such layers would see the whole mask instead of their window
        if window is not None and window < longest:
            return f"rows of {longest} tokens are longer than its {name} of {window}"
    largest = max(groups, key=lambda g: (len(g.responses) > 1, len(g.prompt) + len(g.responses)))
    was_training = model.training
    model.eval()
    try:
        alone = GroupScorer(model, pad_id, False)([largest])
        together = GroupScorer(model, pad_id, True)([largest])
    except Exception as error:  # noqa: BLE001 - whatever an architecture says to such a mask
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        model.train(was_training)
    difference = float((alone - together).abs().max())
    allowed = 1e-4 * (1 + float(alone.abs().max()))
    # not <=: a NaN must not pass
    return None if difference <= allowed else f"scores differ by {difference:.2g}"


def _saving(groups: Sequence[PromptGroup]) -> float:
    """Tokens read by separate rows for each token read by shared ones."""
    apart = sum(len(g.responses) * len(g.prompt) + sum(map(len, g.responses)) for g in groups)
    together = sum(len(g.prompt) + sum(map(len, g.responses)) for g in groups)
    return apart / max(1, together)


def decide_sharing(
    wanted: bool, model: nn.Module, groups: Sequence[PromptGroup], pad_id: int, out: Out
) -> bool:
    """Whether to read prompts once: where it pays; says so where the model cannot."""
    if not wanted or _saving(groups) < _WORTH_IT:
        return False
    reason = cannot_share_prefix(model, groups, pad_id)
    if reason:
        out.say(f"the prompt is read again for each response: {reason}")
        out.derived["share_prefix"] = reason
    return reason is None
