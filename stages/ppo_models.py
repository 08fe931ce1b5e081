"""The models of PPO: policy, reference, critic and what rewards, loaded and ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.errors import ArtifactError
from pipeline.job import Input, Inputs, Out
from pipeline.settings import Settings
from pipeline.settings.ppo import PpoSettings
from stages.common import seed_for
from stages.critics import Agent, ValuePass, lora, separate, shared, zero_head
from stages.engines import Sampling, make_engine
from stages.experience import Models
from stages.models import (
    add_adapter,
    add_lora,
    backbone_and_head,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
)
from stages.rewards import RewardModel, Rewards, load_rules, normalisation


def load_models(settings: Settings, inputs: Inputs, accelerator: Accelerator, out: Out) -> Models:
    ppo, device = settings.ppo, accelerator.device
    tokenizer = load_tokenizer(inputs["model"])
    torch.manual_seed(seed_for(settings.run.seed, "ppo", "adapters"))
    policy = add_lora(load_causal_lm(inputs["model"]), ppo.lora, "policy").to(device)
    # adapters switched off give the reference, where that is what the policy started from
    is_base = ppo.lora.rank > 0 and inputs["reference"].digest == inputs["model"].digest
    reference = None
    if not is_base:
        reference = load_causal_lm(inputs["reference"]).to(device).eval().requires_grad_(False)
    agent = _make_agent(ppo, policy, inputs["reward_model"], device)
    # dropout would make the ratio of an unchanged policy differ from 1
    for part in agent.passes:
        part.eval()
    agent.passes = [accelerator.prepare_model(part) for part in agent.passes]
    rewards = Rewards(_reward_models(ppo, inputs, device), load_rules(ppo.rules))
    gold = None
    if "gold" in inputs:
        gold = _user_reward_model("gold", inputs["gold"].sources[0], 0.0, device)
    for source in [*rewards.models, *([gold] if gold else [])]:
        _check_vocabulary(source, tokenizer)
    sampling = Sampling(
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        max_response_tokens=ppo.max_response_tokens,
        temperature=ppo.temperature,
        rows_at_once=ppo.rows_per_rank,
    )
    folder = out.checkpoints / "weights"
    engine = make_engine(ppo.rollout, policy, sampling, accelerator, folder, agent.value_head)
    return Models(agent, engine, reference, rewards, gold, tokenizer)


def _make_agent(ppo: PpoSettings, policy: Any, reward_model: Input, device: torch.device) -> Agent:
    bonus = ppo.entropy_coef > 0
    kind = ppo.critic or ("lora" if ppo.lora.rank else "separate")
    if kind == "shared":
        return shared(policy, ppo.temperature, bonus)
    if kind == "lora":
        add_adapter(policy, "value")
        return lora(policy, zero_head(policy), ppo.temperature, entropy_gradient=bonus)
    contract = reward_model.contract
    model = load_reward_model(reward_model).to(device)
    critic = ValuePass(*backbone_and_head(model), contract["score_mean"], contract["score_std"])
    return separate(policy, critic, ppo.temperature, bonus)


def _reward_models(ppo: PpoSettings, inputs: Inputs, device: torch.device) -> list[RewardModel]:
    own = inputs["reward_model"]
    model = load_reward_model(own).to(device).eval().requires_grad_(False)
    mean, std = own.contract["score_mean"], own.contract["score_std"]
    found = [RewardModel("reward_model", ppo.reward_weight, model, mean, std)]
    paths = inputs["reward_models"].sources if "reward_models" in inputs else ()
    for path, weight in zip(paths, ppo.reward_model_weights, strict=True):
        found.append(_user_reward_model(Path(path).name, path, weight, device))
    return found


def _user_reward_model(name: str, path: str, weight: float, device: torch.device) -> RewardModel:
    item = Input("reward_models", "", path=Path(path))
    model = load_reward_model(item).to(device).eval().requires_grad_(False)
    return RewardModel(name, weight, model, *normalisation(Path(path)))


def _check_vocabulary(source: RewardModel, tokenizer: Any) -> None:
    config = source.model.config
    if config.vocab_size != len(tokenizer) or config.pad_token_id != tokenizer.pad_token_id:
        raise ArtifactError(
            f"ppo: the reward model {source.name} has {config.vocab_size} tokens and pads with"
            f" {config.pad_token_id}; the policy has {len(tokenizer)} and {tokenizer.pad_token_id}",
            "It reads the policy's token ids, so it needs the same tokenizer.",
        )
