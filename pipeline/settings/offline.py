from __future__ import annotations

from pydantic import Field, field_validator

from pipeline.config import Strict, unhashed
from pipeline.settings.model import LoraSettings
from pipeline.settings.online import without_dropout


class OfflineSettings(Strict):
    """What dpo and kto have in common: a policy is trained on the rankings themselves, by TRL."""

    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimiser steps; null means epochs decides."""
    accumulation_steps: int = Field(1, ge=1)
    """Micro-batches into which a rank divides its rows of a step; in kto each has a KL estimate of its own, so
    more of them give a noisier one."""
    max_length: int = Field(1024, ge=8)
    """Longest prompt plus response in tokens; longer ones are left out and counted."""
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
