"""Training a reward model on whole rankings, and measuring one. Used by reward and evaluate.

Shapes: N rankings, K responses of one prompt, B rows (all responses of a batch of rankings).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.job import Metrics, Out
from pipeline.records import Ranking, Tally
from pipeline.settings.reward import RewardSettings
from stages.chat import encode_completion, encode_prompt
from stages.checkpoints import (
    Checkpointer,
    load_optimizer,
    load_trainable,
    optimizer_tensors,
    trainable_tensors,
)
from stages.common import (
    adamw,
    check_finite,
    clip_gradients,
    epoch_order,
    set_lr,
    stop_if_asked,
    sum_over_ranks,
    warmup_cosine,
)
from stages.models import positions
from stages.rollout import last_token_scores, score_all


class RankedRows(NamedTuple):
    """One ranking as token rows. rows: K lists of prompt + response + end token; ranks: 1 is best."""

    rows: list[list[int]]
    ranks: list[int]
    response_tokens: list[int]
    prompt_id: str


def longest_row(settings: RewardSettings, model: PreTrainedModel) -> int:
    """Tokens of prompt and response: by the setting, and by what the model can read."""
    return min(settings.max_length, positions(model) or settings.max_length)


def encode_rankings(
    rankings: list[Ranking], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[RankedRows], Tally]:
    """Token rows of the rankings that have a strict pair; what is left out is counted by reason."""
    tally = Tally()
    encoded = []
    for ranking in rankings:
        prompt = encode_prompt(tokenizer, list(ranking.messages))
        responses = [encode_completion(tokenizer, text, eos=True) for text in ranking.responses]
        fits = [i for i, ids in enumerate(responses) if len(prompt) + len(ids) <= max_length]
        if len(fits) < len(responses):
            lost = len(responses) - len(fits)
            tally.reasons[f"response longer than {max_length} tokens with its prompt"] += lost
        ranks = [ranking.ranks[i] for i in fits]
        if len(fits) < 2:
            tally.drop("fewer than two responses fit", ranking.id)
        elif len(set(ranks)) == 1:
            tally.drop("all responses tied", ranking.id)
        else:
            tally.use()
            rows = [prompt + responses[i] for i in fits]
            lengths = [len(responses[i]) for i in fits]
            encoded.append(RankedRows(rows, ranks, lengths, ranking.prompt_id))
    return encoded, tally


def pairwise_loss(scores_K: Tensor, ranks_K: Tensor) -> Tensor:
    """Mean of -log sigmoid(better - worse) over the strict pairs of one ranking; ties are left out.

    InstructGPT (arXiv 2203.02155), eq. 1: all pairs of a prompt are one batch element.
    """
    difference_KK = scores_K.unsqueeze(1) - scores_K.unsqueeze(0)
    is_better_KK = ranks_K.unsqueeze(1) < ranks_K.unsqueeze(0)
    return -logsigmoid(difference_KK[is_better_KK]).mean()


def train_reward_model(
    model: nn.Module,
    rankings: list[RankedRows],
    settings: RewardSettings,
    accelerator: Accelerator,
    out: Out,
    *,
    pad_id: int,
    seed: int,
    keep_checkpoints: int,
    evaluate: Callable[[nn.Module], Metrics],
) -> nn.Module:
    """Train `model` in place on `rankings`; resumes from the newest checkpoint. Returns it unwrapped."""
    steps_per_epoch = -(-len(rankings) // settings.prompts_per_step)
    steps = steps_per_epoch * settings.epochs
    optimizer = adamw(model, settings.lr, settings.weight_decay)
    checkpoints = Checkpointer(out, keep_checkpoints, accelerator)
    begin = 0
    found = checkpoints.load_latest()
    if found:
        load_trainable(model, found.tensors["model"])
        load_optimizer(optimizer, found.tensors["optimizer"])
        begin = found.step
    wrapped = accelerator.prepare_model(model)

    def save(step: int) -> None:
        groups = {"model": trainable_tensors(model), "optimizer": optimizer_tensors(optimizer)}
        checkpoints.save(step, groups, {})

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
        row = _step(
            wrapped, model, optimizer, [rankings[i] for i in order], settings, accelerator, pad_id
        )
        check_finite(step + 1, "reward", **row)
        row["lr"] = lr
        if (step + 1) % settings.eval_every_steps == 0 or step + 1 == steps:
            row |= evaluate(model)
        out.log(step + 1, row)
        out.progress(step + 1, steps)
        if (step + 1) % settings.checkpoint_every_steps == 0:
            save(step + 1)
    return model


def _step(
    wrapped: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: list[RankedRows],
    settings: RewardSettings,
    accelerator: Accelerator,
    pad_id: int,
) -> Metrics:
    """One optimiser step over the rankings of all ranks; each ranking weighs the same."""
    world, rank = accelerator.num_processes, accelerator.process_index
    own = batch[rank::world]
    chunk = -(-len(own) // settings.accumulation_steps) if own else 1
    chunks = [own[i : i + chunk] for i in range(0, len(own), chunk)]
    total = torch.zeros(3, device=accelerator.device)  # loss, correct pairs, pairs
    for number in range(max(1, len(chunks))):
        part = chunks[number] if chunks else []
        last = number == max(1, len(chunks)) - 1
        with accelerator.autocast(), _sync(wrapped, accelerator, last):
            # a rank without rankings still takes part in the gradient's all-reduce
            rows = [row for item in part for row in item.rows] or batch[0].rows[:1]
            scores_B = last_token_scores(wrapped, rows, pad_id, accelerator.device)
            losses, at = [scores_B.sum() * 0.0], 0
            for item in part:
                scores_K = scores_B[at : at + len(item.rows)]
                at += len(item.rows)
                ranks_K = torch.tensor(item.ranks, device=scores_K.device)
                losses.append(pairwise_loss(scores_K, ranks_K))
                total[1:] += _correct_pairs(scores_K.detach(), ranks_K)
            # gradients are averaged over ranks, hence the factor
            loss = torch.stack(losses).sum() / len(batch)
            accelerator.backward(loss * world)
        total[0] += loss.detach()
    grad_norm = clip_gradients(model, settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss, correct, pairs = sum_over_ranks(accelerator)(total).tolist()
    return {"loss": loss, "accuracy": correct / max(1.0, pairs), "grad_norm": grad_norm}


def _sync(
    wrapped: nn.Module, accelerator: Accelerator, last: bool
) -> contextlib.AbstractContextManager[None]:
    """Exchange gradients with the other ranks in the last micro-batch only."""
    return contextlib.nullcontext() if last else accelerator.no_sync(wrapped)


def _correct_pairs(scores_K: Tensor, ranks_K: Tensor) -> Tensor:
    """(pairs in the right order, strict pairs); equal scores count half."""
    difference_KK = scores_K.unsqueeze(1) - scores_K.unsqueeze(0)
    is_better_KK = ranks_K.unsqueeze(1) < ranks_K.unsqueeze(0)
    right_KK = (difference_KK > 0).float() + 0.5 * (difference_KK == 0).float()
    return torch.stack([(right_KK * is_better_KK).sum(), is_better_KK.sum().float()])


def measure(
    model: nn.Module, rankings: list[RankedRows], pad_id: int, device: torch.device, seed: int
) -> Metrics:
    """How well the model orders rankings it has not seen.

    accuracy over strict pairs with its 95 % interval (bootstrap over prompts: pairs of one prompt are
    not independent), kendall_tau (tau-b on rank vectors, mean over rankings), length_correlation
    (Pearson, score against response tokens, both centred within each ranking).
    """
    was_training = model.training
    model.eval()
    scores = score_all(model, [row for r in rankings for row in r.rows], pad_id, device).cpu()
    model.train(was_training)
    counts: dict[str, Tensor] = {}
    taus, centred_scores, centred_lengths, at = [], [], [], 0
    for ranking in rankings:
        K = len(ranking.rows)
        own = scores[at : at + K]
        at += K
        pair_counts = _correct_pairs(own, torch.tensor(ranking.ranks))
        counts[ranking.prompt_id] = counts.get(ranking.prompt_id, torch.zeros(2)) + pair_counts
        tau = kendalltau(own.numpy(), -np.array(ranking.ranks)).statistic
        taus.append(0.0 if np.isnan(tau) else float(tau))
        lengths = np.array(ranking.response_tokens, dtype=float)
        centred_scores.append(own.numpy() - own.numpy().mean())
        centred_lengths.append(lengths - lengths.mean())
    table = torch.stack(list(counts.values())).numpy()
    low, high = bootstrap_ratio(table[:, 0], table[:, 1], seed)
    return {
        "accuracy": float(table[:, 0].sum() / table[:, 1].sum()),
        "accuracy_low": low,
        "accuracy_high": high,
        "kendall_tau": float(np.mean(taus)),
        "length_correlation": _correlation(
            np.concatenate(centred_scores), np.concatenate(centred_lengths)
        ),
        "pairs": int(table[:, 1].sum()),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def bootstrap_ratio(
    numerator: np.ndarray, denominator: np.ndarray, seed: int, draws: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of sum(numerator) / sum(denominator), resampling the items."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(numerator), size=(draws, len(numerator)))
    ratios = numerator[picks].sum(1) / denominator[picks].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
