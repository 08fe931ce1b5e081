"""Experience for PPO: the policy's responses, what the other models say of them, and advantages.

Shapes: B rows, R response tokens. Every rank answers and scores its share of the prompts; the
results are gathered, so that all ranks hold the same rollout.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.job import Metrics
from pipeline.settings.ppo import PpoSettings
from stages import ppo_math
from stages.common import gather_list, own_share
from stages.critics import Agent, active
from stages.engines import Engine
from stages.generation import Generated
from stages.prompts import PromptIds
from stages.rewards import RewardModel, Rewards
from stages.rollout import Sequences, all_logprobs, make_sequences, mean_repetition
from stages.rules import Rule
from stages.sharding import whole
from stages.stops import distinct_responses


@dataclass
class Models:
    """All that a rollout needs. reference None: the policy with its adapters off."""

    agent: Agent
    engine: Engine
    reference: PreTrainedModel | None
    rewards: Rewards
    gold: RewardModel | Rule | None
    tokenizer: PreTrainedTokenizerBase

    def watched(self) -> Rewards:
        """What rewards, and gold at weight 0."""
        models, rules = self.rewards.models, self.rewards.rules
        if isinstance(self.gold, RewardModel):
            return Rewards([*models, self.gold], rules)
        return Rewards(models, {**rules, "gold": (self.gold, 0.0)}) if self.gold else self.rewards


class Rollout(NamedTuple):
    """One update's responses and what is known of them, the same on every rank.

    batch: prompts and responses of B rows. logprobs, ref_logprobs, values: `[B, R]`, 0 where not
    valid. scores_B: the weighted sum of all sources with all penalties. parts_B: each source's own
    score by name. ended_B: True where the response stopped by itself.
    """

    batch: Sequences
    logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    values_BR: Tensor
    scores_B: Tensor
    parts_B: dict[str, Tensor]
    ended_B: Tensor
    engine_logprobs_BR: Tensor | None = None


class Experience(NamedTuple):
    """A rollout with what the losses need: whitened advantages, returns and importance weights of
    tokens that another engine sampled (None is 1), `[B, R]`."""

    rollout: Rollout
    advantages_BR: Tensor
    returns_BR: Tensor
    weights_BR: Tensor | None = None


class _Row(NamedTuple):
    """One response of a rank, as plain numbers that can travel to the others."""

    prompt: list[int]
    response: list[int]
    tokens: dict[str, list[float]]
    parts: dict[str, float]
    score: float
    ended: bool


def roll_out(
    models: Models,
    prompts: list[PromptIds],
    seeds: list[int],
    ppo: PpoSettings,
    accelerator: Accelerator,
    with_gold: bool = False,
) -> Rollout:
    """One response to each prompt; the same seed, prompt and policy give the same response."""
    device = accelerator.device
    agent = models.agent
    share = own_share(len(prompts), accelerator)
    # a rank without a prompt does the first one for nothing: shards are gathered by all ranks together
    done = share or range(1)
    own_prompts = [prompts[i] for i in done]
    with whole(agent.policy, *([agent.value_head] if agent.value_head is not None else [])):
        generated = models.engine.generate(
            [prompt.ids for prompt in own_prompts], [seeds[i] for i in done]
        )
    with torch.no_grad(), accelerator.autocast():
        own = _score(models, own_prompts, generated, ppo, device, with_gold)
    rows = gather_list(own if share else [], accelerator)
    batch = make_sequences(
        [row.prompt for row in rows],
        [row.response for row in rows],
        models.tokenizer.pad_token_id,
        device,
    )

    def padded(name: str) -> Tensor:
        values = [value for row in rows for value in row.tokens[name]]
        return batch.spread(torch.tensor(values, device=device))

    return Rollout(
        batch,
        padded("logprobs"),
        padded("ref_logprobs"),
        padded("values"),
        torch.tensor([row.score for row in rows], device=device),
        {
            name: torch.tensor([row.parts[name] for row in rows], device=device)
            for name in rows[0].parts
        },
        torch.tensor([row.ended for row in rows], device=device),
        None if models.engine.same_logprobs else padded("engine_logprobs"),
    )


def _score(
    models: Models,
    prompts: list[PromptIds],
    generated: list[Generated],
    ppo: PpoSettings,
    device: torch.device,
    with_gold: bool,
) -> list[_Row]:
    """What reference, critic and reward sources say of this rank's responses."""
    agent, tokenizer = models.agent, models.tokenizer
    responses = [g.tokens for g in generated]
    ids = [prompt.ids for prompt in prompts]
    batch = make_sequences(ids, responses, tokenizer.pad_token_id, device)
    tokens = {
        "engine_logprobs": [g.logprobs for g in generated],
        "ref_logprobs": batch.as_lists(_ref_logprobs(models, batch, ppo)),
    }
    tokens["logprobs"] = (
        tokens["engine_logprobs"]
        if models.engine.same_logprobs
        else batch.as_lists(agent.logprobs(batch, ppo.rows_per_rank))
    )
    # a critic on the policy's trunk has spoken while the response was decoded
    tokens["values"] = (
        [g.values for g in generated]
        if all(g.values for g in generated)
        else batch.as_lists(agent.values(batch, ppo.rows_per_rank))
    )
    rewards = models.watched() if with_gold else models.rewards
    messages = [list(prompt.prompt.messages) for prompt in prompts]
    scores_B, parts_B = rewards.score(
        ids, messages, responses, tokenizer, device, ppo, ppo.rows_per_rank
    )
    return [
        _Row(
            ids[i],
            responses[i],
            {name: values[i] for name, values in tokens.items()},
            {name: float(values_B[i]) for name, values_B in parts_B.items()},
            float(scores_B[i]),
            g.ended,
        )
        for i, g in enumerate(generated)
    ]


def _ref_logprobs(models: Models, batch: Sequences, ppo: PpoSettings) -> Tensor:
    policy = models.agent.policy
    model = models.reference
    if model is None:
        assert isinstance(policy, PeftModel)
    with whole(model or policy), nullcontext() if model is not None else active(policy, None):
        return all_logprobs(model or policy, batch, ppo.temperature, ppo.rows_per_rank)


def to_experience(rollout: Rollout, kl_coef: float, ppo: PpoSettings) -> Experience:
    """Rewards, advantages and returns of a rollout: the whole of it, so that whitening is global."""
    valid_BR = rollout.batch.valid_BR
    rewards_BR = ppo_math.kl_penalised_rewards(
        rollout.scores_B, rollout.logprobs_BR, rollout.ref_logprobs_BR, valid_BR, kl_coef
    )
    advantages_BR, returns_BR = ppo_math.gae_advantages(
        rewards_BR, rollout.values_BR, valid_BR, ppo.gamma, ppo.lam
    )
    if ppo.lam_value is not None:
        # VC-PPO, arXiv 2503.01491: the critic may learn from less discounted returns than the policy
        _, returns_BR = ppo_math.gae_advantages(
            rewards_BR, rollout.values_BR, valid_BR, ppo.gamma, ppo.lam_value
        )
    if ppo.whiten_advantages:
        advantages_BR = ppo_math.whiten(advantages_BR, valid_BR)
    weights_BR = None
    if rollout.engine_logprobs_BR is not None:
        weights_BR = ppo_math.truncated_importance(
            rollout.logprobs_BR, rollout.engine_logprobs_BR, valid_BR, ppo.rollout.importance_cap
        )
    return Experience(rollout, advantages_BR, returns_BR, weights_BR)


def rollout_metrics(rollout: Rollout, kl_coef: float) -> Metrics:
    """Means over responses; kl in nats a response; see the docstring of `stages.ppo`."""
    valid_BR = rollout.batch.valid_BR
    kl = ppo_math.kl_estimates(rollout.logprobs_BR, rollout.ref_logprobs_BR, valid_BR)
    responses = rollout.batch.as_lists(rollout.batch.responses_BR)
    score, kl_nats = rollout.scores_B.mean().item(), kl.k1_BR.sum(-1).mean().item()
    row = {
        "score": score,
        "kl": kl_nats,
        "kl_k3": kl.k3_BR.sum(-1).mean().item(),
        "reward": score - kl_coef * kl_nats,
        "kl_coef": kl_coef,
        "response_tokens": rollout.batch.response_tokens_B.float().mean().item(),
        "eos_rate": rollout.ended_B.float().mean().item(),
        "repetition": mean_repetition(responses),
        "distinct_responses": distinct_responses(responses),
    }
    if rollout.engine_logprobs_BR is not None:
        apart = ppo_math.kl_estimates(rollout.engine_logprobs_BR, rollout.logprobs_BR, valid_BR)
        row["engine_kl"] = (apart.k3_BR.sum() / valid_BR.sum()).item()
    if len(rollout.parts_B) > 1:
        row |= {f"score/{name}": x_B.mean().item() for name, x_B in rollout.parts_B.items()}
    return row
