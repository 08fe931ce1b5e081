from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import Strict, unhashed
from pipeline.settings.model import LoraSettings


class RewardSettings(Strict):
    """The reward model: a scalar head on the sft model, trained on whole rankings."""

    loss: Literal["pairwise"] = "pairwise"
    """pairwise: all strict pairs of a ranking as one batch element (InstructGPT, arXiv 2203.02155, eq. 1)."""
    epochs: int = Field(1, ge=1)
    """Passes over the rankings (InstructGPT: 1; more overfit quickly)."""
    prompts_per_step: int = Field(16, ge=1)
    """Rankings of one optimiser step, over all ranks."""
    accumulation_steps: int = Field(1, ge=1)
    """Micro-batches into which a rank divides its rankings."""
    max_length: int = Field(1024, ge=8)
    """Longest prompt plus response in tokens; longer responses are left out of a ranking and counted."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Fraction of the steps with a linear warm-up; cosine decay to zero follows."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW weight decay, on matrices only."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the hidden state below the scalar head, in training only."""
    lora: LoraSettings = LoraSettings()
    """Low-rank adapters instead of full fine-tuning."""
    eval_every_steps: int = Field(50, ge=1)
    """Held-out accuracy every so many steps, and at the end."""
    checkpoint_every_steps: int = unhashed(50, ge=1)
    """Save a checkpoint every so many steps."""
