from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.settings.online import OnlineSettings


class GrpoSettings(OnlineSettings):
    """Group relative policy optimisation (arXiv 2402.03300, TRL's GRPOTrainer)."""

    kl_coef: float = Field(0.04, ge=0)
    """Weight of the per-token KL to the reference in the loss, per nat (k3; the paper: 0.04)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the deviation of the prompt's group (the paper), of the batch, or not at all."""
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """grpo: mean over each response, then over responses (the paper, eq. 3). dapo: mean over all tokens
    (arXiv 2503.14476). dr_grpo: sum over max_response_tokens (arXiv 2503.20783)."""
