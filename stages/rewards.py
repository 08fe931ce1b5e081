"""What PPO, GRPO and RLOO optimise: a weighted sum of reward models and rules, less penalties."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ArtifactError, ConfigError
from pipeline.job import Input, Inputs, Out
from pipeline.settings.rewarded import RewardedSettings
from stages.chat import decode_response
from stages.models import (
    backbone_and_head,
    contract_of,
    load_reward_model,
    load_tokenizer,
    positions,
)
from stages.rollout import rows_to_score, score_rows
from stages.rules import Messages, Rule, load_rule
from stages.sharding import place, whole


@dataclass
class RewardModel:
    """A frozen reward model with its normalisation: (raw - mean) / std."""

    name: str
    weight: float
    backbone: nn.Module
    head: nn.Module
    mean: float
    std: float

    def to(self, device: torch.device) -> RewardModel:
        self.backbone.to(device)
        self.head.to(device)
        return self

    def place(self, accelerator: Accelerator) -> None:
        """Shard it where models are sharded; see `stages.sharding`."""
        place(self.backbone, accelerator)
        place(self.head, accelerator)

    def scores(
        self,
        rows: list[list[int]],
        pad_id: int,
        device: torch.device,
        clip: float,
        rows_at_once: int,
    ) -> Tensor:
        """Scores `[B]` of rows (`rollout.rows_to_score`), normalised and clipped to +- clip."""
        with whole(self.backbone, self.head):
            raw_B = score_rows(self.backbone, self.head, rows, pad_id, device, rows_at_once)
        return ((raw_B - self.mean) / self.std).clamp(-clip, clip)


@dataclass
class Rewards:
    """All sources with their weights; one of weight 0 is watched and not optimised."""

    models: list[RewardModel]
    rules: dict[str, tuple[Rule, float]]

    def score(
        self,
        prompts: list[list[int]],
        messages: list[Messages],
        responses: list[list[int]],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        own: RewardedSettings,
        rows_at_once: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What responses are worth `[B]`, penalties included, and each source's own scores by name.

        prompts, responses: token ids, with the end token where a response ended by itself. messages:
        the prompts as conversations, which rules see. Sources are not weighted, models normalised.
        """
        rows, is_cut = rows_to_score(prompts, responses, tokenizer.eos_token_id)
        parts: dict[str, Tensor] = {}
        scores_B = torch.zeros(len(rows), device=device)
        for source in self.models:
            parts[source.name] = source.scores(
                rows, tokenizer.pad_token_id, device, own.score_clip, rows_at_once
            )
            scores_B = scores_B + source.weight * parts[source.name]
        texts = [decode_response(tokenizer, ids) for ids in responses] if self.rules else []
        for name, (rule, weight) in self.rules.items():
            values = [rule(prompt, text) for prompt, text in zip(messages, texts, strict=True)]
            parts[name] = torch.tensor(values, device=device)
            scores_B = scores_B + weight * parts[name]
        tokens_B = torch.tensor([len(response) for response in responses], device=device)
        scores_B = scores_B - own.missing_eos_penalty * torch.tensor(is_cut, device=device)
        return scores_B - own.length_penalty * tokens_B, parts


def load_rewards(
    own: RewardedSettings,
    learned: RewardModel | None,
    inputs: Inputs,
    contract: dict[str, Any],
    max_response_tokens: int,
    out: Out,
    device: torch.device,
) -> Rewards:
    """All sources that the settings of a stage name.

    learned: the reward step's model, where there is one. contract: of the policy.

    Raises:
        ConfigError, ArtifactError: one of them is missing, or does not fit the policy.
    """
    paths = inputs["reward_models"].sources if "reward_models" in inputs else ()
    # by place, not by folder: those that we publish are all called `artifact`
    others = [
        load_given(f"reward_models[{i}]", path, weight, contract, max_response_tokens, out)
        for i, (path, weight) in enumerate(zip(paths, own.reward_model_weights, strict=True))
    ]
    rules = {
        name: (load_rule(name, f"{out.stage}.rules"), weight) for name, weight in own.rules.items()
    }
    # a rule is code: its package and version say which, as digests do of data
    out.derived["rules"] = {name: rule.origin for name, (rule, _) in rules.items()}
    models = [*([learned] if learned else []), *(other.to(device) for other in others)]
    return Rewards(models, rules)


def load_learned(item: Input, weight: float, device: torch.device) -> RewardModel:
    """The model that the reward step published."""
    model = load_reward_model(item).to(device).eval().requires_grad_(False)
    mean, std = item.contract["score_mean"], item.contract["score_std"]
    return RewardModel("reward_model", weight, *backbone_and_head(model), mean, std)


def load_given(
    name: str,
    path: str,
    weight: float,
    contract: dict[str, Any],
    max_response_tokens: int,
    out: Out,
) -> RewardModel:
    """A reward model that settings name, checked against the policy's contract.

    Raises:
        ConfigError: not a folder here.
        ArtifactError: no reward model, or one that reads other tokens or shorter texts.
    """
    key, folder = f"{out.stage}.{name}", Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"{key}: {path} is no folder",
            "Give the artifact folder of a reward step (prefline status RUN --json shows it).",
        )
    item = Input(name, "", path=folder)
    model = load_reward_model(item).eval().requires_grad_(False)
    other = contract_of(load_tokenizer(item), model)
    for field in ("tokenizer", "bos_id", "eos_id", "pad_id"):
        if other[field] != contract[field]:
            raise ArtifactError(
                f"{key}: {path} has another {field} than the policy: {other[field]} and"
                f" {contract[field]}",
                "It reads the policy's token ids, so it needs the same tokenizer.",
            )
    limit, needed = positions(model), max_response_tokens + 2
    if limit is not None and limit < needed:
        raise ArtifactError(f"{key}: {path} reads {limit} tokens, less than a response takes")
    stated = normalisation(folder)
    if stated is None:
        out.say(f"{key}: {path} has no reward.json; its scores are taken as they are")
    return RewardModel(name, weight, *backbone_and_head(model), *(stated or (0.0, 1.0)))


def normalisation(folder: Path) -> tuple[float, float] | None:
    """(mean, std) that a reward model's folder states in reward.json; None where it states none.

    Raises:
        ArtifactError: it states something else than two numbers, the second above 0.
    """
    path = folder / "reward.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        mean, std = float(values["score_mean"]), float(values["score_std"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path}: no score_mean and score_std: {type(error).__name__}"
        ) from None
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ArtifactError(f"{path}: score_mean {mean} and score_std {std} normalise nothing")
    return mean, std
