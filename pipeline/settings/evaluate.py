from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config import unhashed
from pipeline.settings.behaviour import BehaviourSettings
from pipeline.settings.model import DataSources


class EvaluateSettings(BehaviourSettings):
    """Policy against sft (and base) on held-out prompts."""

    prompts: DataSources | None = unhashed(None)
    """Prompts; null uses the test prompts of the sample step, or else the held-out rankings'."""
    text: DataSources | None = unhashed(None)
    """Held-out text for the perplexity; null uses the held-out part of pretrain.data or sft.data."""
    max_prompts: int = Field(300, ge=1)
    """Held-out prompts that are answered by each model."""
    judge: Literal["rubric", "reward_model", "rule"] = "reward_model"
    """rubric: the demo's hidden rubric. reward_model: a second one, trained on the held-out rankings.
    rule: the Python function that evaluate.rule names."""
    rule: str | None = None
    """The judge's entry-point name (group prefline.rewards): a function of conversation and response."""
    best_of: int = Field(0, ge=0)
    """Also judge the best of this many sft responses by the reward model's score (arXiv 2009.01325):
    the baseline that needs no training; 0 is off."""
    temperature: float = Field(1.0, gt=0, le=5)
    """Sampling temperature."""
    max_prompt_tokens: int = Field(256, ge=1)
    """Longer prompts are left out and counted."""
    max_response_tokens: int = Field(128, ge=1)
    """Responses are cut at this many tokens."""
    max_documents: int = Field(200, ge=1)
    """Held-out documents for the perplexity."""
    rows_per_rank: int = unhashed(128, ge=1)
    """Responses that one process decodes or scores at once (memory, not result)."""

    @model_validator(mode="after")
    def _a_rule_has_a_name(self) -> EvaluateSettings:
        if (self.judge == "rule") != (self.rule is not None):
            raise ValueError("judge: rule and evaluate.rule belong together: give both or neither")
        return self
