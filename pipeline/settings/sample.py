from __future__ import annotations

from pydantic import Field

from pipeline.config import Strict, unhashed
from pipeline.settings.model import DataSources


class SampleSettings(Strict):
    """K responses per prompt, to be ranked."""

    prompts: DataSources | None = unhashed(None)
    """Prompts: a file with prompt, messages, instruction, question or text; or demo:prompts."""
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    """Stop if more than this fraction of the prompts is unusable; below it they are counted and left out."""
    max_prompts: int | None = Field(None, ge=1)
    """Prompts sampled in one round, to be ranked; null is all training prompts. More are sampled where some
    are chosen (select.by)."""
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Prompts kept to choose the best policy, where the file does not say (by a hash of the text)."""
    test_fraction: float = Field(0.2, ge=0, lt=1)
    """Prompts kept for evaluation, where the file does not say (by a hash of the text)."""
    responses_per_prompt: int = Field(4, ge=2, le=9)
    """K: responses sampled for each prompt."""
    temperature: float = Field(1.0, gt=0, le=5)
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: keep the smallest set of tokens with this probability."""
    max_prompt_tokens: int = Field(256, ge=1)
    """Longer prompts are left out and counted."""
    max_response_tokens: int = Field(128, ge=1)
    """Responses are cut at this many tokens."""
    rows_per_rank: int = unhashed(128, ge=1)
    """Responses that one process decodes at once (memory, not result)."""
