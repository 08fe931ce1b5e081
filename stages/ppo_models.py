"""The models of PPO: policy, reference, critic and what rewards, loaded and ready."""

from __future__ import annotations

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
from stages.gold import load_gold
from stages.models import (
    add_adapter,
    add_lora,
    backbone_and_head,
    contract_of,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
)
from stages.rewards import RewardModel, load_learned, load_rewards
from stages.sharding import exchange, is_sharded, place


def load_models(settings: Settings, inputs: Inputs, accelerator: Accelerator, out: Out) -> Models:
    ppo, device = settings.ppo, accelerator.device
    tokenizer = load_tokenizer(inputs["model"])
    torch.manual_seed(seed_for(settings.run.seed, "ppo", *later_round(out.round), "adapters"))
    kind = ppo.critic or ("lora" if ppo.lora.rank else "separate")
    if kind == "lora" and is_sharded(accelerator):
        raise ConfigError(
            "ppo.critic: lora puts two adapters on one base, which cannot be sharded",
            "Set ppo.critic=separate or shared, or launch.profile=ddp: adapters have small optimisers.",
        )
    policy = place(add_lora(load_causal_lm(inputs["model"]), ppo.lora, "policy"), accelerator)
    # none where rules or reward models of the user's alone reward
    learned = inputs.get("reward_model")
    on_base = kind == "lora" and put_on_base(policy, inputs["model"], learned)
    agent = make_agent(kind, ppo, policy, inputs["model"], learned, on_base, device)
    if kind != "lora":
        _place_critic(agent, accelerator)
    own = None
    if learned is not None and on_base:
        own = _reward_on_base(learned, ppo.reward_weight, policy, device)
    elif learned is not None:
        own = load_learned(learned, ppo.reward_weight, device)
    # adapters switched off give the reference, where that is what the policy started from
    is_base = ppo.lora.rank > 0 and inputs["reference"].digest == inputs["model"].digest
    reference = None
    if not is_base:
        reference = load_causal_lm(inputs["reference"]).eval().requires_grad_(False)
        reference = place(reference, accelerator)
    out.derived["frozen_models"] = (not is_base) + (learned is not None and not on_base)
    # dropout would make the ratio of an unchanged policy differ from 1
    for part in agent.passes:
        part.eval()
    agent.passes = [exchange(part, accelerator) for part in agent.passes]
    contract = contract_of(tokenizer, policy)
    rewards = load_rewards(ppo, own, inputs, contract, ppo.max_response_tokens, out, device)
    gold = load_gold(settings, inputs, contract, accelerator, out)
    if is_sharded(accelerator):
        for source in [*rewards.models, *([gold] if isinstance(gold, RewardModel) else [])]:
            source.place(accelerator)
    sampling = Sampling.of(ppo, tokenizer)
    folder = out.checkpoints / "weights"
    engine = make_engine(ppo.rollout, policy, sampling, accelerator, folder, agent.value_head)
    return Models(agent, engine, reference, rewards, gold, tokenizer)


def _place_critic(agent: Agent, accelerator: Accelerator) -> None:
    """The parts of the critic one by one, as its pass calls them."""
    if agent.value_head is not None:
        place(agent.value_head, accelerator)
    if agent.critic is not None:
        place(agent.critic.backbone, accelerator)
        place(agent.critic.head, accelerator)


def put_on_base(policy: PeftModel, model: Input, reward_model: Input | None) -> bool:
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


def make_agent(
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


def _reward_on_base(item: Input, weight: float, policy: Any, device: torch.device) -> RewardModel:
    mean, std = item.contract["score_mean"], item.contract["score_std"]
    head = _head(item, device).requires_grad_(False)
    backbone = AdapterBackbone(policy, "reward")
    return RewardModel("reward_model", weight, backbone, head, mean, std)
