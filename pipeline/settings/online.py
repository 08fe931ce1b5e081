"""What grpo and rloo have in common: groups of responses to a prompt, scored by the reward model."""

from __future__ import annotations

from pydantic import Field, field_validator

from pipeline.config import unhashed
from pipeline.settings.model import DataSources, LoraSettings
from pipeline.settings.rewarded import RewardedSettings


def without_dropout(lora: LoraSettings) -> LoraSettings:
    """Refuse dropout where the policy is compared with itself or with a reference."""
    if lora.dropout > 0:
        raise ValueError(
            "dropout must be 0 here: it would change the probability ratio of an unchanged policy"
        )
    return lora


class OnlineSettings(RewardedSettings):
    """Policy gradient with a baseline from the other responses to the same prompt; no value model."""

    prompts: DataSources | None = unhashed(None)
    """Prompts; null uses those of the sample step, or else of the rankings."""
    updates: int = Field(100, ge=1)
    """Updates: responses to a batch of prompts, then epochs of optimisation."""
    prompts_per_step: int = Field(16, ge=1)
    """Prompts of one update, over all ranks."""
    responses_per_prompt: int = Field(4, ge=2)
    """K: responses to each prompt, which are compared with each other."""
    epochs: int = Field(1, ge=1)
    """Passes over the responses of an update (arXiv 2402.03300: 1, every response is used once)."""
    accumulation_steps: int = Field(1, ge=1)
    """Micro-batches into which a rank divides its responses."""
    rows_per_rank: int = unhashed(128, ge=1)
    """Responses that one process decodes or scores at once (memory, not result)."""
    max_prompt_tokens: int = Field(256, ge=1)
    """Longer prompts are left out and counted."""
    max_response_tokens: int = Field(128, ge=1)
    """Responses are cut at this many tokens."""
    temperature: float = Field(1.0, gt=0, le=5)
    """Sampling temperature; the same one divides the logits of every logprob."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate, linear to 0 (arXiv 2402.03300 and TRL: 1e-6; small models want far more)."""
    warmup_fraction: float = Field(0.03, ge=0, le=1)
    """Fraction of the optimiser steps with a linear warm-up (as in ppo)."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay (TRL: 0)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm (TRL: 1)."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 - clip_low (TRL: 0.2); it is 1 while epochs is 1."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high (TRL: 0.2)."""
    lora: LoraSettings = LoraSettings()
    """Low-rank adapters for the policy instead of full fine-tuning."""
    eval_every_updates: int = Field(10, ge=1)
    """Score the policy on validation prompts every so many updates; the best one is kept."""
    eval_prompts: int = Field(128, ge=1)
    """Validation prompts used for it."""
    checkpoint_every_updates: int = unhashed(10, ge=1)
    """Save a checkpoint every so many updates."""

    _no_dropout = field_validator("lora")(without_dropout)
