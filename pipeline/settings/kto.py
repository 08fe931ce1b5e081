from __future__ import annotations

from pydantic import Field

from pipeline.settings.offline import OfflineSettings


class KtoSettings(OfflineSettings):
    """Kahneman-Tversky optimisation on the rankings themselves (arXiv 2402.01306, TRL's KTOTrainer)."""

    beta: float = Field(0.1, gt=0)
    """How fast a response's gain or loss saturates; larger keeps closer to the reference (the authors' code,
    TRL: 0.1)."""
    desirable_weight: float | None = Field(None, gt=0)
    """Weight of a desirable response in the loss; null makes both kinds count the same in sum, the lower end of
    what the paper's eq. 8 allows."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of an undesirable response in the loss (the authors' code, TRL: 1)."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the responses (the authors' code: 1)."""
    minibatch_rows: int = Field(32, ge=2)
    """Responses of one optimiser step, over all ranks (the authors' code: 32)."""
    lr: float = Field(5e-6, gt=0)
    """Peak learning rate (the authors' code: 5e-6, TRL: 1e-6; small models want far more)."""
