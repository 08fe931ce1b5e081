from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pipeline.config import Strict, unhashed
from pipeline.settings.model import LoraSettings
from pipeline.settings.online import without_dropout


class DpoSettings(Strict):
    """Direct preference optimisation on the rankings themselves (arXiv 2305.18290, TRL's DPOTrainer)."""

    beta: float = Field(0.1, gt=0)
    """Strength of the KL constraint in the loss (DPO paper, appendix B: 0.1)."""
    pairs: Literal["all", "best_worst"] = "all"
    """all: every strict pair of a ranking. best_worst: its best response against its worst."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the pairs (Zephyr, arXiv 2310.16944: 1 to 3)."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimiser steps; null means epochs decides."""
    minibatch_rows: int = Field(64, ge=1)
    """Pairs of one optimiser step, over all ranks (DPO paper, appendix B: 64)."""
    accumulation_steps: int = Field(1, ge=1)
    """Micro-batches into which a rank divides its pairs."""
    max_length: int = Field(1024, ge=8)
    """Longest prompt plus response in tokens; pairs with a longer one are left out and counted."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate (DPO paper, appendix B: 1e-6; small models want far more)."""
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    """Fraction of the steps with a linear warm-up; linear decay to zero follows."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay (TRL: 0)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm (TRL: 1)."""
    lora: LoraSettings = LoraSettings()
    """Low-rank adapters for the policy instead of full fine-tuning."""
    eval_every_steps: int = Field(50, ge=1)
    """Accuracy, margin and loss on held-out pairs every so many steps, and at the end."""
    eval_pairs: int = Field(512, ge=1)
    """Held-out pairs used for it."""
    checkpoint_every_steps: int = unhashed(50, ge=1)
    """Save a checkpoint every so many steps."""

    _no_dropout = field_validator("lora")(without_dropout)
