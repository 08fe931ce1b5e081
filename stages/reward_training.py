"""Training a reward model on whole rankings. Used by reward and evaluate.

Shapes: K responses of one prompt, N responses of all rankings of a micro-batch, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.job import Metrics, Out
from pipeline.settings.reward import RewardSettings
from stages.checkpoints import (
    Checkpointer,
    load_optimizer,
    load_trainable,
    optimizer_tensors,
    trainable_tensors,
)
from stages.common import (
    adamw,
    clip_gradients,
    epoch_order,
    generator,
    set_lr,
    stop_if_asked,
    sum_over_ranks,
    warmup_cosine,
)
from stages.models import backbone_and_head
from stages.ranked_data import EncodedRanking, longest_row
from stages.reward_heads import bootstrap_weights
from stages.reward_losses import (
    centering_penalty,
    correct_pairs,
    off_prompt_loss,
    pairwise_loss,
    plackett_luce_loss,
)
from stages.rollout import in_micro_batches
from stages.sharding import accumulate, exchange, most
from stages.shared_prefix import GroupScorer, PromptGroup
from stages.stops import check_finite, check_weights

# prompts that another one is chosen from (of 2 and of 32 a small model learnt the same, of 2 a little more)
_CANDIDATES = 2


def train_reward_model(
    model: nn.Module,
    rankings: list[EncodedRanking],
    settings: RewardSettings,
    accelerator: Accelerator,
    out: Out,
    *,
    pad_id: int,
    seed: int,
    keep_checkpoints: int,
    share_prefix: bool,
    evaluate: Callable[[nn.Module], Metrics],
) -> nn.Module:
    """Train `model` in place on `rankings`; resumes from the newest checkpoint. Returns it unwrapped."""
    steps_per_epoch = -(-len(rankings) // settings.prompts_per_step)
    steps = steps_per_epoch * settings.epochs
    optimizer = adamw(model, settings.lr, settings.weight_decay)
    checkpoints = Checkpointer(out, keep_checkpoints, accelerator)
    begin = skipped = 0
    found = checkpoints.load_latest()
    if found:
        load_trainable(model, found.tensors["model"])
        load_optimizer(optimizer, found.tensors["optimizer"])
        begin = found.step
        # a checkpoint of before this was counted has no number
        skipped = found.state.get("off_prompt_skipped", 0)
    scorer = exchange(GroupScorer(model, pad_id, share_prefix), accelerator)
    others = OtherPrompts(rankings, longest_row(settings, backbone_and_head(model)[0]), seed)
    weights_NH = ranking_weights(rankings, backbone_and_head(model)[1].out_features, seed)

    def save(step: int) -> None:
        groups = {"model": trainable_tensors(model), "optimizer": optimizer_tensors(optimizer)}
        checkpoints.save(step, groups, {"off_prompt_skipped": skipped})

    model.train()
    for step in range(begin, steps):
        stop_if_asked(accelerator, out, partial(save, step))
        epoch, batch = divmod(step, steps_per_epoch)
        at = batch * settings.prompts_per_step
        # the last step of an epoch takes what is left of it
        length = min(settings.prompts_per_step, len(rankings) - at)
        order = epoch_order(
            len(rankings), epoch * len(rankings) + at, length, seed, out.stage, "rankings"
        )
        lr = settings.lr * warmup_cosine(step, steps, settings.warmup_fraction)
        set_lr(optimizer, lr)
        torch.manual_seed(seed + step * 1009 + out.rank)  # dropout
        off_prompt = others.groups(order, step) if settings.off_prompt else []
        skipped += sum(not group.responses for group in off_prompt)
        row = _gradients(
            scorer,
            [rankings[i] for i in order],
            off_prompt,
            weights_NH[order],
            settings,
            accelerator,
        )
        row["grad_norm"] = clip_gradients(model, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        check_finite(out, step + 1, **row)
        row["lr"] = lr
        if (step + 1) % settings.eval_every_steps == 0 or step + 1 == steps:
            row |= evaluate(model)
        out.log(step + 1, row)
        out.progress(step + 1, steps)
        if (step + 1) % settings.checkpoint_every_steps == 0:
            save(step + 1)
    check_weights(out, steps, trainable_tensors(model))
    if settings.off_prompt:
        out.derived["off_prompt_skipped"] = skipped
        if skipped:
            out.say(
                f"reward.off_prompt: left out {skipped} of {len(rankings) * settings.epochs} times: all"
                f" of the {_CANDIDATES} prompts drawn were the ranking's own or too long"
            )
    return model


def ranking_weights(rankings: list[EncodedRanking], heads: int, seed: int) -> Tensor:
    """What each ranking counts for each head, `[N, H]`: its annotators' weights, mean 1, times its
    bootstrap draws."""
    weight_N = torch.tensor([ranking.weight for ranking in rankings])
    relative_N = weight_N / weight_N.mean()
    return relative_N.unsqueeze(1) * bootstrap_weights(len(rankings), heads, seed)


def ranking_loss(scores_KH: Tensor, ranking: EncodedRanking, settings: RewardSettings) -> Tensor:
    """Loss of each head on one ranking, `[H]`: the mean over its votes by their weight."""
    losses_H = torch.zeros_like(scores_KH[0])
    for ranks, weight in ranking.votes:
        ranks_K = torch.tensor(ranks, device=scores_KH.device)
        if settings.loss == "plackett_luce":
            vote_H = plackett_luce_loss(scores_KH, ranks_K)
        else:
            vote_H = pairwise_loss(
                scores_KH, ranks_K, settings.margin, settings.label_smoothing, settings.soft_labels
            )
        losses_H = losses_H + vote_H * (weight / ranking.weight)
    if settings.centering:
        losses_H = losses_H + settings.centering * centering_penalty(scores_KH)
    return losses_H


def _gradients(
    scorer: nn.Module,
    batch: list[EncodedRanking],
    off_prompt: list[PromptGroup],
    weights_BH: Tensor,
    settings: RewardSettings,
    accelerator: Accelerator,
) -> Metrics:
    """Gradients of one optimiser step over the rankings of all ranks, and their metrics.

    batch: the rankings of all ranks; off_prompt: for each, where asked for, its best response behind
    another prompt; weights_BH: what each counts for each head.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    own = list(range(rank, len(batch), world))
    plain: GroupScorer = accelerator.unwrap_model(scorer)
    swapped = {i for i, group in enumerate(off_prompt) if group.responses}
    at_once = -(-len(own) // settings.accumulation_steps)
    costs = [
        plain.cost(batch[i].group) + (plain.cost(off_prompt[i]) if i in swapped else 0) for i in own
    ]
    parts = [
        [own[i] for i in index] for index in in_micro_batches(costs, at_once, accelerator.device)
    ]
    # a rank without rankings still takes part in the exchange of gradients, one of few in each pass
    parts += [[]] * (most(max(1, len(parts)), accelerator) - len(parts))
    nothing = PromptGroup(batch[0].group.prompt, batch[0].group.responses[:1])
    total = torch.zeros(3, device=accelerator.device)  # loss, correct pairs, pairs
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with accelerator.autocast(), accumulate(scorer, last):
            others = [i for i in part if i in swapped]
            groups = [batch[i].group for i in part] + [off_prompt[i] for i in others] or [nothing]
            scores_NH = scorer(groups)
            parts_KH = scores_NH.split([len(group.responses) for group in groups])
            off_H = dict(zip(others, (x_1H[0] for x_1H in parts_KH[len(part) :]), strict=False))
            loss = scores_NH.sum() * 0.0
            # zip is short for a rank without rankings
            for i, scores_KH in zip(part, parts_KH, strict=False):
                losses_H = ranking_loss(scores_KH, batch[i], settings)
                if i in off_H:
                    on_H = scores_KH[best_response(batch[i])]
                    losses_H = losses_H + settings.off_prompt * off_prompt_loss(on_H, off_H[i])
                loss = loss + (losses_H * weights_BH[i].to(losses_H)).mean() / len(batch)
                for ranks, _ in batch[i].votes:
                    ranks_K = torch.tensor(ranks, device=scores_KH.device)
                    total[1:] += correct_pairs(scores_KH.detach().mean(1), ranks_K)
            # gradients are averaged over ranks, hence the factor
            accelerator.backward(loss * world)
        total[0] += loss.detach()
    loss, correct, pairs = sum_over_ranks(accelerator)(total).tolist()
    return {"loss": loss, "accuracy": correct / max(1.0, pairs)}


class OtherPrompts:
    """For each ranking of a step another prompt, one that is easy to mistake for its own.

    longest: tokens that the model can read.
    """

    def __init__(self, rankings: list[EncodedRanking], longest: int, seed: int) -> None:
        self._rankings, self._longest, self._seed = rankings, longest, seed
        self._words = [frozenset(ranking.group.prompt) for ranking in rankings]

    def groups(self, own: list[int], step: int) -> list[PromptGroup]:
        """Each ranking's best response behind another prompt; without responses where none fits."""
        rng = generator(self._seed, "reward", "off_prompt", step)
        drawn_BC = torch.randint(len(self._rankings), (len(own), _CANDIDATES), generator=rng)
        return [self._closest(i, row) for i, row in zip(own, drawn_BC.tolist(), strict=True)]

    def _closest(self, i: int, candidates: list[int]) -> PromptGroup:
        """Of the candidates' prompts the one that shares most words with that of ranking i."""
        ranking = self._rankings[i]
        response = ranking.group.responses[best_response(ranking)]
        found, most = PromptGroup(ranking.group.prompt, []), -1.0
        for j in candidates:
            prompt = self._rankings[j].group.prompt
            if prompt == ranking.group.prompt or len(prompt) + len(response) > self._longest:
                continue
            shared = len(self._words[i] & self._words[j]) / len(self._words[i] | self._words[j])
            if shared > most:
                found, most = PromptGroup(prompt, [response]), shared
        return found


def best_response(ranking: EncodedRanking) -> int:
    """The response that is ranked first by most weight; the first of several."""
    points = [
        sum(vote.weight for vote in ranking.votes if vote.ranks[k] == min(vote.ranks))
        for k in range(len(ranking.group.responses))
    ]
    return points.index(max(points))
