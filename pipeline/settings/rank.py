from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import Strict, unhashed
from pipeline.settings.model import DataSources


class RankSettings(Strict):
    """People, or simulated annotators, rank the responses."""

    by: Literal["people", "simulated"] = "people"
    """people: the line waits until enough rankings are in. simulated: the hidden rubric plus noise."""
    data: DataSources | None = unhashed(None)
    """Import rankings made elsewhere: response groups with ranks, chosen/rejected pairs, hh-rlhf."""
    max_bad_fraction: float = Field(0.1, ge=0, le=1)
    """Stop if more than this fraction of the imported rows is unusable; below it they are counted."""
    overlap: int = Field(1, ge=1, le=20)
    """Different annotators who rank each prompt."""
    minimum: int | None = Field(None, ge=1)
    """The line goes on when this many rankings are in; null is overlap for every prompt."""
    heldout_fraction: float = Field(0.15, gt=0, lt=0.9)
    """Prompts whose rankings the reward model never sees (chosen by a hash of the prompt)."""
    annotators: int = Field(3, ge=1, le=100)
    """Number of simulated annotators."""
    noise: float = Field(0.05, ge=0)
    """Standard deviation of a simulated annotator's error, in units of the rubric's score (0 to 1)."""
    tie_margin: float = Field(0.02, ge=0)
    """A simulated annotator calls two responses equal when their noisy scores differ by less."""
    lease_minutes: int = unhashed(30, ge=1)
    """A prompt handed to a person returns to the queue after this time without a change."""
    store: str | None = unhashed(None)
    """Label store: sqlite:///PATH or postgresql+psycopg://...; null is labels.db in the run directory."""
