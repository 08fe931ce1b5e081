from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from pipeline.config import Strict, unhashed
from pipeline.settings.model import DataSources


class BehaviourSettings(Strict):
    """What evaluate looks at beside who wins: refusals, toxicity, the context window, benchmarks."""

    tasks: DataSources | None = unhashed(None)
    """Task files (YAML, as configs/tasks/bbq.yaml): benchmarks that each model is scored on."""
    task_items: int | None = Field(None, ge=1)
    """Score this many items of each task, chosen by a hash of their content; null scores all."""
    refusal_prompts: DataSources | None = unhashed(None)
    """Prompts in XSTest's format (prompt; label safe or unsafe, or type): which ones are refused."""
    refusal_annotations: DataSources | None = unhashed(None)
    """Completions that people labelled in XSTest's format: how far the refusal rule agrees with them."""
    toxicity: str | None = None
    """Entry-point name (group prefline.rewards) of a function that gives a response 0 to 1."""
    toxicity_prompts: DataSources | None = unhashed(None)
    """Prompts for the toxicity; null uses the evaluation's own."""
    toxicity_samples: int = Field(1, ge=1)
    """Responses to each prompt; above 1 also gives the expected maximum toxicity (arXiv 2009.11462)."""
    context_documents: int = Field(0, ge=0)
    """Held-out documents over which the loss by position is averaged; 0 leaves it out."""
    needle_trials: int = Field(0, ge=0)
    """Needles for each depth and length of the needle test; 0 leaves it out."""
    context_lengths: tuple[int, ...] | None = None
    """Lengths in tokens for both, also past the limit; null is 1/4, 1/2, 1 and 3/2 of the model's limit."""

    @field_validator("context_lengths")
    @classmethod
    def _long_enough(cls, lengths: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if lengths is not None and (not lengths or min(lengths) < 16):
            raise ValueError("give at least one length, each of 16 tokens or more")
        return lengths

    @model_validator(mode="after")
    def _toxicity_has_a_scorer(self) -> BehaviourSettings:
        if self.toxicity is None and (self.toxicity_prompts or self.toxicity_samples > 1):
            raise ValueError(
                "toxicity_prompts and toxicity_samples need evaluate.toxicity: the name of a scorer"
            )
        return self
