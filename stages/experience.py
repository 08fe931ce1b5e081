"""Experience for PPO: the policy's responses and what the other models say of them.

Shapes: B rows, R response tokens, T = prompt + response. Every rank answers and scores its share of
the prompts; the results are gathered, so that all ranks hold the same rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.settings.ppo import PpoSettings
from stages.common import gather_list, own_share
from stages.generation import Generated, generate
from stages.rollout import (
    Sequences,
    ValueModel,
    make_sequences,
    over_responses,
    response_logprobs,
    score_all,
)


@dataclass
class Models:
    """The four models of PPO. `policy` and `value` are trained; wrapped ones exchange gradients."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    reward: PreTrainedModel
    value: ValueModel
    wrapped_policy: nn.Module
    wrapped_value: nn.Module
    tokenizer: PreTrainedTokenizerBase
    score_mean: float
    score_std: float


class Rollout(NamedTuple):
    """One update's experience, the same on every rank.

    batch: prompts and responses of B rows. logprobs, ref_logprobs, values: `[B, R]`, 0 where not
    valid. scores_B: normalised and clipped, missing-EOS penalty included. ended_B: True where the
    response stopped by itself.
    """

    batch: Sequences
    logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    values_BR: Tensor
    scores_B: Tensor
    ended_B: Tensor


class _Row(NamedTuple):
    """One response of a rank, as lists that can travel to the others."""

    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    ref_logprobs: list[float]
    values: list[float]
    score: float
    ended: bool


def roll_out(
    models: Models,
    prompts: list[list[int]],
    seeds: list[int],
    ppo: PpoSettings,
    accelerator: Accelerator,
) -> Rollout:
    """One response to each prompt; the same seed, prompt and policy give the same response."""
    share = own_share(len(prompts), accelerator)
    own_prompts = [prompts[i] for i in share]
    with torch.no_grad(), accelerator.autocast():
        generated = generate(
            models.policy,
            own_prompts,
            [seeds[i] for i in share],
            eos_id=models.tokenizer.eos_token_id,
            pad_id=models.tokenizer.pad_token_id,
            max_response_tokens=ppo.max_response_tokens,
            temperature=ppo.temperature,
            rows_at_once=ppo.rows_per_rank,
        )
        own = _score(models, own_prompts, generated, ppo, accelerator) if own_prompts else []
    rows = gather_list(own, accelerator)
    device = accelerator.device
    batch = make_sequences(
        [row.prompt for row in rows],
        [row.response for row in rows],
        models.tokenizer.pad_token_id,
        device,
    )
    return Rollout(
        batch,
        _padded([row.logprobs for row in rows], batch),
        _padded([row.ref_logprobs for row in rows], batch),
        _padded([row.values for row in rows], batch),
        torch.tensor([row.score for row in rows], device=device),
        torch.tensor([row.ended for row in rows], device=device),
    )


def _score(
    models: Models,
    prompts: list[list[int]],
    generated: list[Generated],
    ppo: PpoSettings,
    accelerator: Accelerator,
) -> list[_Row]:
    """What reference, value and reward model say of this rank's responses."""
    device, pad_id = accelerator.device, models.tokenizer.pad_token_id
    responses = [g.tokens for g in generated]
    batch = make_sequences(prompts, responses, pad_id, device)

    def logprobs_under(model: nn.Module) -> list[list[float]]:
        found_BR = over_responses(
            lambda b: response_logprobs(model, b, ppo.temperature)[0], batch, ppo.rows_per_rank
        )
        return _unpadded(found_BR, batch)

    # decoding in bf16 rounds otherwise than a whole forward, and the ratio must start at 1
    exact = accelerator.mixed_precision == "no"
    logprobs = [g.logprobs for g in generated] if exact else logprobs_under(models.policy)
    values_BR = over_responses(
        lambda b: models.value(b.tokens_BT, b.predict_BR), batch, ppo.rows_per_rank
    )
    # the reward model was trained on responses that all have an end token; that a response was cut is
    # the penalty's business
    end = [models.tokenizer.eos_token_id]
    rows = [
        prompt + g.tokens + ([] if g.ended else end)
        for prompt, g in zip(prompts, generated, strict=True)
    ]
    raw_B = score_all(models.reward, rows, pad_id, device, ppo.rows_per_rank)
    scores_B = (raw_B - models.score_mean) / models.score_std
    scores_B = scores_B.clamp(-ppo.score_clip, ppo.score_clip)
    is_cut_B = torch.tensor([not g.ended for g in generated], device=device)
    scores_B = scores_B - ppo.missing_eos_penalty * is_cut_B
    columns = (
        prompts,
        responses,
        logprobs,
        logprobs_under(models.reference),
        _unpadded(values_BR, batch),
        scores_B.tolist(),
        [g.ended for g in generated],
    )
    return [_Row(*row) for row in zip(*columns, strict=True)]


def _unpadded(x_BR: Tensor, batch: Sequences) -> list[list[float]]:
    return [
        row[:length].tolist()
        for row, length in zip(x_BR, batch.response_tokens_B.tolist(), strict=True)
    ]


def _padded(rows: list[list[float]], batch: Sequences) -> Tensor:
    valid_BR = batch.valid_BR
    x_BR = torch.zeros(valid_BR.shape, device=valid_BR.device)
    x_BR[valid_BR] = torch.tensor([v for row in rows for v in row], device=valid_BR.device)
    return x_BR
