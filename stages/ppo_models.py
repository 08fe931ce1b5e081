"""The models of PPO: policy, reference, critic and what rewards, loaded and ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from pipeline.errors import ArtifactError, ConfigError
from pipeline.job import Input, Inputs, Out
from pipeline.settings import Settings
from pipeline.settings.ppo import PpoSettings
from stages.adapters import FOLDER, adapter_base, load_head
from stages.common import later_round, seed_for
from stages.critics import (
    AdapterBackbone,
    Agent,
    ValuePass,
    lora,
    separate,
    shared,
    zero_head,
)
from stages.engines import Sampling, make_engine
from stages.experience import Models
from stages.models import (
    add_adapter,
    add_lora,
    backbone_and_head,
    contract_of,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    positions,
)
from stages.rewards import RewardModel, Rewards, normalisation
from stages.rules import load_rule


def load_models(settings: Settings, inputs: Inputs, accelerator: Accelerator, out: Out) -> Models:
    ppo, device = settings.ppo, accelerator.device
    tokenizer = load_tokenizer(inputs["model"])
    torch.manual_seed(seed_for(settings.run.seed, "ppo", *later_round(out.round), "adapters"))
    policy = add_lora(load_causal_lm(inputs["model"]), ppo.lora, "policy").to(device)
    kind = ppo.critic or ("lora" if ppo.lora.rank else "separate")
    # none where rules or reward models of the user's alone reward
    learned = inputs.get("reward_model")
    on_base = kind == "lora" and _put_on_base(policy, inputs["model"], learned)
    agent = _make_agent(kind, ppo, policy, inputs["model"], learned, on_base, device)
    own = []
    if learned is not None:
        own = [_reward_model(learned, ppo.reward_weight, policy, on_base, device)]
    # adapters switched off give the reference, where that is what the policy started from
    is_base = ppo.lora.rank > 0 and inputs["reference"].digest == inputs["model"].digest
    reference = None
    if not is_base:
        reference = load_causal_lm(inputs["reference"]).to(device).eval().requires_grad_(False)
    out.derived["frozen_models"] = (not is_base) + (learned is not None and not on_base)
    # dropout would make the ratio of an unchanged policy differ from 1
    for part in agent.passes:
        part.eval()
    agent.passes = [accelerator.prepare_model(part) for part in agent.passes]
    paths = inputs["reward_models"].sources if "reward_models" in inputs else ()
    contract = contract_of(tokenizer, policy)
    # by place, not by folder: those that we publish are all called `artifact`
    others = [
        _user_reward_model(f"reward_models[{i}]", path, weight, contract, ppo, out).to(device)
        for i, (path, weight) in enumerate(zip(paths, ppo.reward_model_weights, strict=True))
    ]
    gold = None
    if "gold" in inputs:
        path = inputs["gold"].sources[0]
        gold = _user_reward_model("gold", path, 0.0, contract, ppo, out).to(device)
    sampling = Sampling(
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        max_response_tokens=ppo.max_response_tokens,
        temperature=ppo.temperature,
        rows_at_once=ppo.rows_per_rank,
    )
    folder = out.checkpoints / "weights"
    engine = make_engine(ppo.rollout, policy, sampling, accelerator, folder, agent.value_head)
    rules = {name: (load_rule(name, "ppo.rules"), weight) for name, weight in ppo.rules.items()}
    # a rule is code: its package and version say which, as digests do of data
    out.derived["rules"] = {name: rule.origin for name, (rule, _) in rules.items()}
    rewards = Rewards([*own, *others], rules)
    return Models(agent, engine, reference, rewards, gold, tokenizer)


def _put_on_base(policy: PeftModel, model: Input, reward_model: Input | None) -> bool:
    """Put the reward model's adapter on the policy's base, frozen as `reward` and trained as `value`.

    False, and a fresh `value` instead, where there is none, or it was trained without adapters or on
    another model.
    """
    folder = reward_model.path if reward_model else None
    if folder is None or adapter_base(folder) != model.digest:
        add_adapter(policy, "value")
        return False
    trainable = [p for p in policy.parameters() if p.requires_grad]
    for name in ("reward", "value"):
        loaded = policy.load_adapter(
            str(folder / FOLDER), adapter_name=name, is_trainable=name == "value"
        )
        # peft only warns of names that it does not know
        if [key for key in loaded.missing_keys if f".{name}." in key] or loaded.unexpected_keys:
            raise ArtifactError(f"{folder}: its adapter does not fit the policy's base")
    for parameter in trainable:
        parameter.requires_grad_(True)
    return True


def _make_agent(
    kind: str,
    ppo: PpoSettings,
    policy: Any,
    model: Input,
    reward_model: Input | None,
    on_base: bool,
    device: torch.device,
) -> Agent:
    bonus = ppo.entropy_coef > 0
    if kind == "shared":
        return shared(policy, ppo.temperature, bonus)
    if kind == "lora" and not on_base:
        return lora(policy, zero_head(policy), ppo.temperature, entropy_gradient=bonus)
    if reward_model is None:
        # nothing has learned to score yet: the policy's own features, and a head that says 0
        critic = ValuePass(load_causal_lm(model).to(device).base_model, zero_head(policy))
        return separate(policy, critic, ppo.temperature, bonus, from_zero=True)
    mean, std = reward_model.contract["score_mean"], reward_model.contract["score_std"]
    if kind == "lora":
        return lora(policy, _head(reward_model, device), ppo.temperature, mean, std, bonus)
    learned = load_reward_model(reward_model).to(device)
    critic = ValuePass(*backbone_and_head(learned), mean, std)
    return separate(policy, critic, ppo.temperature, bonus)


def _head(reward_model: Input, device: torch.device) -> nn.Linear:
    """A trainable copy of the scalar head that belongs to the reward model's adapter."""
    assert reward_model.path is not None
    tensors = load_head(reward_model.path)
    head = nn.Linear(tensors["weight"].shape[1], 1, bias="bias" in tensors)
    head.load_state_dict(tensors)
    return head.to(device)


def _reward_model(
    item: Input, weight: float, policy: Any, on_base: bool, device: torch.device
) -> RewardModel:
    mean, std = item.contract["score_mean"], item.contract["score_std"]
    if on_base:
        head = _head(item, device).requires_grad_(False)
        backbone: nn.Module = AdapterBackbone(policy, "reward")
        return RewardModel("reward_model", weight, backbone, head, mean, std)
    model = load_reward_model(item).to(device).eval().requires_grad_(False)
    return RewardModel("reward_model", weight, *backbone_and_head(model), mean, std)


def _user_reward_model(
    name: str, path: str, weight: float, contract: dict[str, Any], ppo: PpoSettings, out: Out
) -> RewardModel:
    """A reward model that settings name, checked against the policy's contract.

    Raises:
        ConfigError: not a folder here.
        ArtifactError: no reward model, or one that reads other tokens or shorter texts.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"ppo.{name}: {path} is no folder",
            "Give the artifact folder of a reward step (prefline status RUN --json shows it).",
        )
    item = Input(name, "", path=folder)
    model = load_reward_model(item).eval().requires_grad_(False)
    other = contract_of(load_tokenizer(item), model)
    for key in ("tokenizer", "bos_id", "eos_id", "pad_id"):
        if other[key] != contract[key]:
            raise ArtifactError(
                f"ppo.{name}: {path} has another {key} than the policy: {other[key]} and"
                f" {contract[key]}",
                "It reads the policy's token ids, so it needs the same tokenizer.",
            )
    limit, needed = positions(model), ppo.max_response_tokens + 2
    if limit is not None and limit < needed:
        raise ArtifactError(f"ppo.{name}: {path} reads {limit} tokens, less than a response takes")
    stated = normalisation(folder)
    if stated is None:
        out.say(f"ppo.{name}: {path} has no reward.json; its scores are taken as they are")
    return RewardModel(name, weight, *backbone_and_head(model), *(stated or (0.0, 1.0)))
