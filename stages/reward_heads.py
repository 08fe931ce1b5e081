"""Several scalar heads on one trunk: an ensemble that says how sure a score is.

The heads differ in their start and in the rankings they see (bootstrap). A head is linear, so the
mean of the heads' scores is the score of the mean head: that one is published as the only label of a
plain sequence classifier, the heads lie beside it in `heads.safetensors`.

Heads on one trunk share its errors: their spread is a lower bound of what is unknown (Gleave and
Irving 2022, arXiv 2203.07472).

Shapes: N responses or rankings, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import ArtifactError
from stages.common import generator
from stages.models import backbone_and_head
from stages.shared_prefix import GroupScorer, PromptGroup, score_groups

NAME = "heads.safetensors"


class Heads(NamedTuple):
    """weight_HD, bias_H: the heads. mean_H: raw score of each on the sft samples; std: of their mean."""

    weight_HD: Tensor
    bias_H: Tensor
    mean_H: Tensor
    std: Tensor


def add_heads(model: nn.Module, count: int, seed: int) -> None:
    """Further random heads beside that of a sequence classifier, which stays the first; in place."""
    head = backbone_and_head(model)[1]
    own_1D, D = head.weight.detach(), head.weight.shape[1]
    more = [
        # as new_reward_model starts the first: Stiennon et al. 2020, appendix B.1
        torch.randn(1, D, generator=generator(seed, "head", number)) / (D + 1) ** 0.5
        for number in range(1, count)
    ]
    bias_H = None if head.bias is None else head.bias.detach().expand(count)
    _set(head, torch.cat([own_1D, *(row.to(own_1D) for row in more)]), bias_H)


def mean_head(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Replace the heads by their mean, in place; the heads themselves as weight_HD and bias_H."""
    head = backbone_and_head(model)[1]
    weight_HD = head.weight.detach().clone()
    bias_H = torch.zeros_like(weight_HD[:, 0]) if head.bias is None else head.bias.detach().clone()
    _set(
        head,
        weight_HD.mean(0, keepdim=True),
        None if head.bias is None else bias_H.mean(0, keepdim=True),
    )
    return weight_HD, bias_H


def _set(head: nn.Linear, weight_HD: Tensor, bias_H: Tensor | None) -> None:
    # the layer stays: hooks on it (dropout) and its place in the model are kept
    trainable = head.weight.requires_grad
    head.out_features = len(weight_HD)
    head.weight = nn.Parameter(weight_HD.clone(), requires_grad=trainable)
    if bias_H is not None:
        head.bias = nn.Parameter(bias_H.clone(), requires_grad=trainable)


def bootstrap_weights(rankings: int, heads: int, seed: int) -> Tensor:
    """How often each head sees each ranking, `[N, H]`; all ones for one head.

    Poisson(1), the limit of drawing N of N with replacement (Oza and Russell 2001, Online bagging).
    """
    if heads == 1:
        return torch.ones(rankings, 1)
    rate_NH = torch.ones(rankings, heads)
    return torch.poisson(rate_NH, generator=generator(seed, "bootstrap", heads))


def save_heads(heads: Heads, folder: Path) -> None:
    tensors = {name: t.detach().cpu().contiguous() for name, t in heads._asdict().items()}
    save_file(tensors, folder / NAME)


def load_heads(folder: Path) -> Heads:
    """The heads of a reward model's artifact.

    Raises:
        ArtifactError: it was trained with one head.
    """
    if not (folder / NAME).exists():
        raise ArtifactError(
            f"{folder}: this reward model has one head and says nothing of its uncertainty",
            "Train it with reward.heads=4.",
        )
    return Heads(**load_file(folder / NAME))


def score_with_uncertainty(
    scorer: GroupScorer, heads: Heads, groups: Sequence[PromptGroup]
) -> tuple[Tensor, Tensor]:
    """Normalised score and its standard deviation over the heads, both `[N]`, group by group.

    The score is what the published label gives, normalised as reward.json says. Each head is centred
    by its own mean on the sft samples: a head that likes everything a little more is not unsure.
    """
    raw_NH = head_scores(scorer, heads, groups)
    scores_NH = (raw_NH - heads.mean_H.to(raw_NH)) / heads.std.to(raw_NH)
    return scores_NH.mean(1), scores_NH.std(1)


def head_scores(scorer: GroupScorer, heads: Heads, groups: Sequence[PromptGroup]) -> Tensor:
    """Raw scores of every head `[N, H]`, group by group, on the trunk of a published reward model."""
    head = backbone_and_head(scorer.model)[1]
    plain = head.weight.detach(), None if head.bias is None else head.bias.detach()
    bias_H = None if head.bias is None else heads.bias_H.to(head.weight)
    _set(head, heads.weight_HD.to(head.weight), bias_H)
    try:
        return score_groups(scorer, groups)
    finally:
        _set(head, *plain)
