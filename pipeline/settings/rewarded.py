"""What ppo, grpo and rloo are rewarded by: the same sources and the same penalties."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline.config import Strict, unhashed
from pipeline.settings.model import DataSources

# what reward models are called in the metrics; `gold` is watched by ppo
_TAKEN = {"reward_model", "gold", *(f"reward_models[{i}]" for i in range(64))}


class RewardedSettings(Strict):
    """The score of a response: a weighted sum of reward models and rules, less penalties."""

    score_clip: float = Field(5.0, gt=0)
    """Normalised reward-model scores are clipped to +- this (DeepSpeed-Chat: 5)."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Subtracted from the score of a response that does not end by itself (TRL's example: 1)."""
    length_penalty: float = Field(0.0, ge=0)
    """Subtracted from the score for each token of the response."""
    reward_weight: float = 1.0
    """Weight of the reward step's own model in the score. With 0, prompts of its own and no rankings there is
    no reward step: rules and reward_models alone reward."""
    reward_models: DataSources | None = unhashed(None)
    """Further reward models: folders as the reward step publishes them."""
    reward_model_weights: tuple[float, ...] = ()
    """Their weights in the score, in the same order."""
    rules: dict[str, float] = Field(default_factory=dict)
    """Weights of Python rules, by their entry-point name (group prefline.rewards)."""
    max_kl: float | None = unhashed(100.0, gt=0)
    """Training stops when the policy is further than this from the reference, in nats a response, averaged
    over an update; null never."""
    min_distinct: float | None = unhashed(0.1, ge=0, le=1)
    """Training stops when distinct_responses is below this in three updates in a row, where responses had
    eight tokens or more at first; null never."""

    @model_validator(mode="after")
    def _something_rewards(self) -> RewardedSettings:
        if self.reward_weight == 0 and not self.reward_models and not self.rules:
            raise ValueError("reward_weight: 0 leaves no reward; add reward_models or rules")
        taken = _TAKEN & set(self.rules)
        if taken:
            raise ValueError(
                f"rules: {', '.join(sorted(taken))} names a reward model in the metrics"
            )
        if len(self.reward_models or ()) != len(self.reward_model_weights):
            raise ValueError(
                f"reward_models names {len(self.reward_models or ())} models, but"
                f" reward_model_weights has {len(self.reward_model_weights)} weights"
            )
        return self
