"""Which prompts are labelled: those a reward model is least sure of, and a random part.

Why a random part: what is chosen by the model says how the model does on what it finds hard, not how
it does. Held-out prompts, on which it is judged, are therefore never chosen, only drawn; and every
prompt keeps a known probability above zero, so that weights of 1 / probability (Horvitz and Thompson
1952) undo the choice.

Measured in docs/results.md: which way needs fewer labels.

Shapes: K responses of one prompt, N of all, H heads, Q pairs of responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import hypergeom
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.job import Input, Out
from pipeline.records import SampleGroup, content_id
from stages.common import gather_list, num_parameters, own_share
from stages.models import load_reward_model, positions
from stages.ranked_data import encode_group
from stages.reward_heads import head_scores, load_heads
from stages.reward_measures import pair_disagreement
from stages.shared_prefix import GroupScorer, PromptGroup, decide_sharing, score_groups


class Selection(NamedTuple):
    """chosen: positions, ascending. at_random: those of them that were drawn.

    probability: of every candidate, that it is chosen, over the draw; the rest is given.
    """

    chosen: list[int]
    at_random: set[int]
    probability: list[float]


def priorities(
    by: str,
    item: Input,
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[SampleGroup],
    accelerator: Accelerator,
    out: Out,
) -> list[float]:
    """How much each prompt wants a label, on every rank; more is more.

    item: the reward model. groups: two different responses or more each.
    """
    assert item.path is not None
    model = load_reward_model(item).to(accelerator.device)
    longest = positions(model)
    encoded = [
        _cut(
            encode_group(tokenizer, list(g.prompt.messages), [r.text for r in g.responses]), longest
        )
        for g in groups
    ]
    share_prefix = decide_sharing(True, model, encoded, tokenizer.pad_token_id, out)
    scorer = GroupScorer(model, tokenizer.pad_token_id, share_prefix)
    own = [encoded[i] for i in own_share(len(encoded), accelerator)]
    found: list[float] = []
    if own:
        if by == "disagreement":
            scores_NH = head_scores(scorer, load_heads(item.path), own).cpu()
        else:
            scores_NH = score_groups(scorer, own).cpu()
        parts = scores_NH.split([len(group.responses) for group in own])
        found = [priority(by, scores_KH) for scores_KH in parts]
    tokens = sum(scorer.cost(group) for group in encoded)
    out.cost["flops"] += 2.0 * num_parameters(model) * tokens
    return gather_list(found, accelerator)


def _cut(group: PromptGroup, longest: int | None) -> PromptGroup:
    """Responses as far as the model can read; only to choose, so a lost end is no harm."""
    if longest is None:
        return group
    return PromptGroup(
        group.prompt, [ids[: longest - len(group.prompt)] for ids in group.responses]
    )


def priority(by: str, scores_KH: Tensor) -> float:
    """What a label of these responses promises, a mean over all their pairs.

    disagreement: standard deviation over the heads of P(one is better than the other), as Christiano
    et al. 2017 (arXiv 1706.03741, section 2.2.4) choose. margin: how little the mean score differs,
    1 - |2 P - 1|: 1 for equal scores, 0 where one is surely better.
    """
    K = len(scores_KH)
    if by == "disagreement":
        # every pair once, as if ranked in the order of the file; which is better does not matter
        value_Q, _ = pair_disagreement(scores_KH, torch.arange(K))
    else:
        first_Q, second_Q = torch.triu_indices(K, K, 1)
        score_K = scores_KH.mean(1)
        value_Q = 1 - (2 * (score_K[first_Q] - score_K[second_Q]).sigmoid() - 1).abs()
    # rounding of another batch or device must not reorder prompts that are as good as equal
    return round(float(value_Q.mean()), 6)


def select(
    ids: Sequence[str],
    priorities: Sequence[float],
    heldout: Sequence[bool],
    budget: int,
    random_share: float,
    seed: int,
) -> Selection:
    """`budget` of the candidates (2 or more): held-out and training prompts in proportion.

    Held-out prompts are drawn, each as likely as another. Of the training prompts a part of
    `random_share`, rounded up, is drawn; the rest are those of highest priority that were not.
    """
    n = len(ids)
    if n <= budget:
        return Selection(list(range(n)), set(range(n)), [1.0] * n)
    order = sorted(range(n), key=lambda i: content_id("select", seed, ids[i]))
    judged = [i for i in order if heldout[i]]
    train = [i for i in order if not heldout[i]]
    kept = round(budget * len(judged) / n)
    if judged and train:
        # both are asked for, however few
        kept = min(max(kept, 1), budget - 1)
    budget -= kept
    drawn = math.ceil(random_share * budget)
    at_random = {*judged[:kept], *train[:drawn]}
    # equal priorities in an order that knows nothing of the draw
    ranked = sorted(train, key=lambda i: (-priorities[i], content_id("tie", ids[i])))
    by_priority = [i for i in ranked if i not in at_random][: budget - drawn]
    probability = dict.fromkeys(judged, kept / max(1, len(judged)))
    probability |= zip(
        ranked, inclusion_probabilities(len(train), drawn, budget - drawn), strict=True
    )
    return Selection(
        sorted([*at_random, *by_priority]), at_random, [float(probability[i]) for i in range(n)]
    )


def inclusion_probabilities(n: int, drawn: int, top: int) -> list[float]:
    """Of each of n items in the order of priority, that it is drawn, or is among the top.

    `drawn` of the n are drawn without replacement; of those left the first `top` are taken as well.
    Item j, not drawn, is taken if fewer than `top` of the j before it are left: if more than
    j - top of them are among the `drawn` of the n - 1 others, a hypergeometric count.
    """
    if drawn + top >= n:
        return [1.0] * n
    j = np.arange(n)
    taken = hypergeom.sf(j - top, n - 1, j, drawn)
    share = drawn / n
    return (share + (1 - share) * taken).tolist()
