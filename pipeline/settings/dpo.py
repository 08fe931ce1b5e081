from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.settings.offline import OfflineSettings


class DpoSettings(OfflineSettings):
    """Direct preference optimisation on the rankings themselves (arXiv 2305.18290, TRL's DPOTrainer)."""

    beta: float = Field(0.1, gt=0)
    """Strength of the KL constraint in the loss (DPO paper, appendix B: 0.1)."""
    pairs: Literal["all", "best_worst"] = "all"
    """all: every strict pair of a ranking. best_worst: its best response against its worst."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the pairs (Zephyr, arXiv 2310.16944: 1 to 3)."""
    minibatch_rows: int = Field(64, ge=1)
    """Pairs of one optimiser step, over all ranks (DPO paper, appendix B: 64)."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate (DPO paper, appendix B: 1e-6; small models want far more)."""
