from __future__ import annotations

from pydantic import Field, field_validator

from pipeline.config import Strict, unhashed
from pipeline.settings.model import LoraSettings
from pipeline.settings.online import without_dropout


class KtoSettings(Strict):
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
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimiser steps; null means epochs decides."""
    minibatch_rows: int = Field(32, ge=2)
    """Responses of one optimiser step, over all ranks (the authors' code: 32)."""
    accumulation_steps: int = Field(1, ge=1)
    """Micro-batches into which a rank divides its responses; each has a KL estimate of its own, so more of
    them give a noisier one."""
    max_length: int = Field(1024, ge=8)
    """Longest prompt plus response in tokens; longer ones are left out and counted."""
    lr: float = Field(5e-6, gt=0)
    """Peak learning rate (the authors' code: 5e-6, TRL: 1e-6; small models want far more)."""
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    """Fraction of the steps with a linear warm-up; linear decay to zero follows (as in dpo)."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay (TRL: 0)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm (TRL: 1)."""
    lora: LoraSettings = LoraSettings()
    """Low-rank adapters for the policy instead of full fine-tuning."""
    eval_every_steps: int = Field(50, ge=1)
    """Accuracy, margin and loss on held-out pairs every so many steps, and at the end."""
    eval_pairs: int = Field(512, ge=1)
    """Held-out pairs used for it, the same as in dpo."""
    checkpoint_every_steps: int = unhashed(50, ge=1)
    """Save a checkpoint every so many steps."""

    _no_dropout = field_validator("lora")(without_dropout)
