from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import Strict


class SelectSettings(Strict):
    """Which prompts are labelled, from the second round on: more are sampled than are ranked."""

    by: Literal["random", "disagreement", "margin"] = "random"
    """What the last round's reward model asks to be ranked: responses about which its heads are apart
    (needs reward.heads), or which it scores alike (margin). random: sample.max_prompts are sampled and all ranked."""
    candidates: int = Field(4, ge=2)
    """Prompts sampled for each one that is ranked; sample.max_prompts are ranked."""
    random_share: float = Field(0.3, gt=0, le=1)
    """At least this part of the ranked training prompts is drawn at random all the same. Held-out prompts always
    are, so that the reward model is judged on prompts that it did not choose."""
