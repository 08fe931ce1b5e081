from __future__ import annotations

from pydantic import Field

from pipeline.settings.online import OnlineSettings


class RlooSettings(OnlineSettings):
    """REINFORCE with a leave-one-out baseline (arXiv 2402.14740, TRL's RLOOTrainer)."""

    kl_coef: float = Field(0.05, ge=0)
    """Weight of the response's KL to the reference in its reward, per nat (k1; TRL: 0.05)."""
    normalize_advantages: bool = False
    """Advantages to mean 0 and standard deviation 1 over the batch (the paper does not)."""
