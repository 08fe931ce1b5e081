from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config import unhashed
from pipeline.settings.behaviour import BehaviourSettings
from pipeline.settings.judges import EndpointSettings, PeopleSettings
from pipeline.settings.model import DataSources

Judge = Literal["rubric", "reward_model", "rule", "endpoint", "people"]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class EvaluateSettings(BehaviourSettings):
    """Policy against sft (and base) on held-out prompts."""

    prompts: DataSources | None = unhashed(None)
    """Prompts; null uses the test prompts of the sample step, or else the held-out rankings'."""
    text: DataSources | None = unhashed(None)
    """Held-out text for the perplexity; null uses the held-out part of pretrain.data or sft.data."""
    max_prompts: int = Field(300, ge=1)
    """Held-out prompts that are answered by each model."""
    judges: Annotated[tuple[Judge, ...], BeforeValidator(_as_tuple)] = ("reward_model",)
    """Who judges, one or several; the first gives the verdict. reward_model: a second one, trained on the
    held-out rankings. rule: the Python function that evaluate.rule names. endpoint: a model behind
    evaluate.endpoint. people: in the ranking app. rubric: the demo's hidden rubric."""
    rule: str | None = None
    """The judge's entry-point name (group prefline.rewards): a function of conversation and response."""
    endpoint: EndpointSettings = EndpointSettings()
    """A judge behind an OpenAI-compatible interface."""
    people: PeopleSettings = PeopleSettings()
    """Blind comparison by people."""
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

    @model_validator(mode="before")
    @classmethod
    def _one_judge_is_a_list_of_one(cls, values: Any) -> Any:
        # the spelling of runs that were made when there was one. What was given last counts: an
        # override stands behind what the configuration of a run holds
        if not isinstance(values, dict) or "judge" not in values:
            return values
        last = next(key for key in reversed(values) if key in ("judge", "judges"))
        others = {key: value for key, value in values.items() if key not in ("judge", "judges")}
        return {**others, "judges": values[last]}

    @model_validator(mode="after")
    def _each_judge_has_what_it_needs(self) -> EvaluateSettings:
        if not self.judges:
            raise ValueError("judges: name one at least")
        if len(set(self.judges)) < len(self.judges):
            raise ValueError("judges: each once")
        if ("rule" in self.judges) != (self.rule is not None):
            raise ValueError("judges: rule and evaluate.rule belong together: give both or neither")
        asked = self.endpoint.url is not None and self.endpoint.model is not None
        if "endpoint" in self.judges and not asked:
            raise ValueError(
                "judges: endpoint needs evaluate.endpoint.url and evaluate.endpoint.model"
            )
        return self
