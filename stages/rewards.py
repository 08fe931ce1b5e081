"""What PPO optimises: a weighted sum of reward models and of rules, one number for each response."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ArtifactError
from pipeline.settings.ppo import PpoSettings
from stages.chat import decode_response
from stages.rollout import score_rows
from stages.rules import Rule


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

    def scores(
        self,
        rows: list[list[int]],
        pad_id: int,
        device: torch.device,
        clip: float,
        rows_at_once: int,
    ) -> Tensor:
        """Scores `[B]` of rows (`rollout.rows_to_score`), normalised and clipped to +- clip."""
        raw_B = score_rows(self.backbone, self.head, rows, pad_id, device, rows_at_once)
        return ((raw_B - self.mean) / self.std).clamp(-clip, clip)


@dataclass
class Rewards:
    """All sources with their weights; one of weight 0 is watched and not optimised."""

    models: list[RewardModel]
    rules: dict[str, tuple[Rule, float]]

    def scores(
        self,
        rows: list[list[int]],
        messages: list[list[dict[str, Any]]],
        responses: list[list[int]],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        ppo: PpoSettings,
    ) -> dict[str, Tensor]:
        """Each source's unweighted scores `[B]`, of models normalised and clipped, by name.

        rows: prompt + response ids as the reward model was trained on them. responses: ids that
        become the text that a rule sees.
        """
        found: dict[str, Tensor] = {}
        for source in self.models:
            found[source.name] = source.scores(
                rows, tokenizer.pad_token_id, device, ppo.score_clip, ppo.rows_per_rank
            )
        texts = [decode_response(tokenizer, ids) for ids in responses] if self.rules else []
        for name, (rule, _) in self.rules.items():
            values = [rule(prompt, text) for prompt, text in zip(messages, texts, strict=True)]
            found[name] = torch.tensor(values, device=device)
        return found

    @property
    def weights(self) -> dict[str, float]:
        return {source.name: source.weight for source in self.models} | {
            name: weight for name, (_, weight) in self.rules.items()
        }


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
