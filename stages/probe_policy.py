"""What PPO sees of one response, token by token: KL to the reference, reward, value, advantage, score.

The critic is not published: it is read from the newest checkpoint of the ppo step, which is some
updates older than, or newer than, the published policy. Advantages are shown as they are before a
batch whitens them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline import manifest
from pipeline.errors import ToolkitError
from pipeline.inventory import Offered
from pipeline.job import Input
from pipeline.settings.ppo import PpoSettings
from stages import ppo_math
from stages.checkpoints import damage, load_trainable
from stages.critics import Agent
from stages.models import add_lora, load_causal_lm
from stages.ppo_models import make_agent, put_on_base
from stages.rewards import RewardModel, load_learned
from stages.rollout import make_sequences, rows_to_score

_SUMS = "MANIFEST.json"
_PREFIX = "ppo."


class Absent(ToolkitError):
    """A part that a policy does not have; the message says why."""


@dataclass(frozen=True)
class Critic:
    """A value model, the update after which it was saved, and its kind."""

    agent: Agent
    update: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    @torch.no_grad()
    def values(self, ids: list[int], prompt_tokens: int, pad_id: int) -> list[float]:
        """The value before each response token."""
        device = next(iter(self.agent.value_parameters().values())).device
        rows = [ids[:prompt_tokens]], [ids[prompt_tokens:]]
        batch = make_sequences(*rows, pad_id, device)
        # some kinds listen at a layer, or change adapters, for the time of a forward
        with self.lock:
            found: list[float] = self.agent.values(batch, 1)[0].tolist()
        return found


def settings_of(offered: Offered) -> PpoSettings:
    """The settings that a ppo step ran with.

    Raises:
        Absent: it is no ppo step, or was made by a version with other settings.
    """
    if offered.stage != "ppo" or offered.work is None:
        way = {
            "dpo": "DPO learns from pairs directly, without rewards of tokens",
            "kto": "KTO learns from good and bad responses directly, without rewards of tokens",
            "grpo": "GRPO compares the responses to a prompt with each other instead",
            "rloo": "RLOO compares the responses to a prompt with each other instead",
        }.get(offered.stage, "only PPO has one")
        raise Absent(f"{offered.name} has no value model: {way}")
    flat = manifest.read(offered.work).settings
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parts, name = key.removeprefix(_PREFIX).split(".")
        if key.startswith(_PREFIX):
            place = tree
            for part in parts:
                place = place.setdefault(part, {})
            place[name] = value
    # what is not hashed is not kept there, but must fit what is
    count = len(tree.get("reward_model_weights", ()))
    tree["reward_models"] = ["unknown"] * count or None
    if tree.get("keep_best_by") == "gold":
        tree["gold"] = ["unknown"]
    try:
        return PpoSettings.model_validate(tree)
    except ValidationError:
        raise Absent(f"{offered.name} was made by a version with other settings of ppo") from None


def load_critic(offered: Offered, device: torch.device) -> Critic:
    """The critic of a ppo step from its newest whole checkpoint.

    Raises:
        Absent: there is none, or it cannot be put together any more.
    """
    ppo = settings_of(offered)
    assert offered.work is not None
    folder = _newest(offered.work / "checkpoints")
    if folder is None or offered.start is None:
        raise Absent(
            f"{offered.name}: its value model is in no checkpoint any more"
            " (PPO publishes the policy only)"
        )
    kind = ppo.critic or ("lora" if ppo.lora.rank else "separate")
    learned = _learned(offered)
    policy: Any = nn.Module()
    if kind != "separate" or learned is None:
        policy = add_lora(load_causal_lm(offered.start), ppo.lora, "policy").to(device)
    on_base = kind == "lora" and put_on_base(policy, offered.start, learned)
    agent = make_agent(kind, ppo, policy, offered.start, learned, on_base, device)
    saved = load_file(folder / "value.safetensors")
    parts = [(agent.value_parameters(), saved)]
    if kind == "shared":
        # it reads the policy's trunk as it was then
        parts.append((agent.policy_parameters(), load_file(folder / "policy.safetensors")))
    for parameters, tensors in parts:
        if parameters.keys() != tensors.keys():
            raise Absent(f"{offered.name}: the value model in {folder.name} has another shape")
        load_trainable(parameters, tensors)
    return Critic(agent, int(folder.name.removeprefix("step-")))


def load_reward(offered: Offered, device: torch.device) -> RewardModel:
    """The reward model that goes with a model.

    Raises:
        Absent: there is none.
    """
    learned = _learned(offered)
    if learned is None:
        raise Absent(f"{offered.name}: the run has no finished reward model")
    return load_learned(learned, 1.0, device)


def _learned(offered: Offered) -> Input | None:
    return offered.reward if offered.reward and "score_mean" in offered.reward.contract else None


def _newest(folder: Path) -> Path | None:
    found = sorted(folder.glob("step-*"), reverse=True)
    return next((path for path in found if damage(path, _SUMS) is None), None)


# ---- token by token ------------------------------------------------------------------------


def token_kl(
    logits_TV: Tensor, ref_logits_TV: Tensor, ids: list[int], prompt_tokens: int, temperature: float
) -> dict[str, Tensor]:
    """Of each response token: logprob under both, their difference (k1), and KL(policy || reference) of
    the whole distribution it was drawn from, `[R]` each, in nats."""
    # the vocabularies of a run agree; a user's model may have spare rows
    size = min(logits_TV.shape[-1], ref_logits_TV.shape[-1])
    policy_RV, reference_RV = (
        (x_TV[prompt_tokens - 1 : -1, :size].float().cpu() / temperature).log_softmax(-1)
        for x_TV in (logits_TV, ref_logits_TV)
    )
    taken_R1 = torch.tensor(ids[prompt_tokens:]).unsqueeze(-1)
    logprobs_R = policy_RV.gather(-1, taken_R1).squeeze(-1)
    ref_logprobs_R = reference_RV.gather(-1, taken_R1).squeeze(-1)
    kl_R = (policy_RV.exp() * (policy_RV - reference_RV)).sum(-1)
    return {
        "logprob": logprobs_R,
        "ref_logprob": ref_logprobs_R,
        "k1": logprobs_R - ref_logprobs_R,
        "kl": kl_R,
    }


def score(
    reward: RewardModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt_tokens: int,
    clip: float,
) -> dict[str, float | bool]:  # fmt: skip
    """The reward model's score of the response: as it says it (raw), and normalised and clipped."""
    rows, is_cut = rows_to_score(
        [ids[:prompt_tokens]], [ids[prompt_tokens:]], tokenizer.eos_token_id
    )
    device = next(reward.backbone.parameters()).device
    normal = reward.scores(rows, tokenizer.pad_token_id, device, float("inf"), 1).item()
    return {
        "raw": normal * reward.std + reward.mean,
        "normalised": normal,
        "clipped": max(-clip, min(clip, normal)),
        "is_cut": is_cut[0],
    }


def ppo_numbers(
    ppo: PpoSettings, k1_R: Tensor, values: list[float], own_score: float, is_cut: bool
) -> dict[str, list[float]]:
    """Reward, advantage and return of each token, as an update of PPO would take them.

    own_score: the reward model's, clipped; other sources of reward are not known here.
    """
    tokens = len(values)
    whole = ppo.reward_weight * own_score - ppo.length_penalty * tokens
    whole -= ppo.missing_eos_penalty * is_cut
    valid_1R = torch.ones(1, tokens, dtype=torch.bool)
    k1_1R = k1_R.cpu().unsqueeze(0)
    rewards_1R = ppo_math.kl_penalised_rewards(
        torch.tensor([whole]), k1_1R, torch.zeros_like(k1_1R), valid_1R, ppo.kl_coef
    )
    advantages_1R, returns_1R = ppo_math.gae_advantages(
        rewards_1R, torch.tensor([values]), valid_1R, ppo.gamma, ppo.lam
    )
    return {
        "reward": rewards_1R[0].tolist(),
        "advantage": advantages_1R[0].tolist(),
        "return": returns_1R[0].tolist(),
    }
