from __future__ import annotations

from pydantic import Field

from pipeline.config import Strict, unhashed
from pipeline.settings.model import DataSources, LoraSettings


class SftSettings(Strict):
    """Supervised fine-tuning on prompts and demonstrations (TRL's SFTTrainer)."""

    data: DataSources | None = unhashed(None)
    """Demonstrations: prompt/completion, messages, alpaca, ShareGPT, question/answer; or demo:demonstrations."""
    max_examples: int | None = Field(None, ge=1)
    """Read at most this many examples; null reads all."""
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    """Stop if more than this fraction of the rows is unusable; below it they are counted and left out."""
    heldout_fraction: float = Field(0.05, gt=0, lt=0.5)
    """Fraction of examples kept for the held-out loss (chosen by a hash of the prompt)."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the examples."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimiser steps; null means epochs decides."""
    minibatch_rows: int = Field(16, ge=1)
    """Examples of one optimiser step, over all ranks."""
    accumulation_steps: int = Field(1, ge=1)
    """Micro-batches into which a rank divides its examples."""
    max_length: int = Field(512, ge=8)
    """Longest example in tokens; longer ones are left out and counted."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Fraction of the steps with a linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    lora: LoraSettings = LoraSettings()
    """Low-rank adapters instead of full fine-tuning."""
    eval_every_steps: int = Field(200, ge=1)
    """Held-out loss every so many steps, and at the end."""
    checkpoint_every_steps: int = unhashed(200, ge=1)
    """Save a checkpoint every so many steps."""
