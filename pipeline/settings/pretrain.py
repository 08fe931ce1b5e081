from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import Strict, unhashed
from pipeline.settings.model import DataSources


class PretrainSettings(Strict):
    """Next-token training on plain text."""

    data: DataSources | None = unhashed(None)
    """Text: .txt, .jsonl, .json, .parquet, .csv, .zip of texts, a folder, a dataset id, or demo:stories."""
    text_field: str = "text"
    """Column that holds the text, for files with columns."""
    max_documents: int | None = Field(None, ge=1)
    """Read at most this many documents; null reads all."""
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    """Stop if more than this fraction of the rows is unusable; below it they are counted and left out."""
    heldout_fraction: float = Field(0.02, gt=0, lt=0.5)
    """Fraction of documents kept for the held-out loss (chosen by a hash of the text)."""
    objective: Literal["causal", "masked"] = "causal"
    """causal: predict the next token. masked: predict hidden words (an encoder, cannot feed sft)."""
    mask_fraction: float = Field(0.15, gt=0, lt=1)
    """Tokens hidden when objective is masked (BERT, arXiv 1810.04805: 0.15)."""
    steps: int = Field(1000, ge=1)
    """Optimiser steps."""
    sequence_length: int = Field(256, ge=8)
    """Tokens of one packed row."""
    isolate_documents: bool = True
    """Attention and positions begin anew with each document of a packed row (objective causal)."""
    minibatch_rows: int = Field(16, ge=1)
    """Rows of one optimiser step, over all ranks."""
    accumulation_steps: int = Field(1, ge=1)
    """Micro-batches into which a rank divides its rows."""
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate (AdamW)."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """The cosine decays to this fraction of lr."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Fraction of the steps with a linear warm-up."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW weight decay, on matrices only."""
    beta2: float = Field(0.95, gt=0, lt=1)
    """AdamW second-moment decay (0.95: GPT-3, arXiv 2005.14165)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    eval_every_steps: int = Field(200, ge=1)
    """Held-out loss and a text sample every so many steps, and at the end."""
    eval_rows: int = Field(64, ge=1)
    """Held-out rows (of sequence_length tokens) that are scored each time, over all ranks."""
    checkpoint_every_steps: int = unhashed(200, ge=1)
    """Save a checkpoint every so many steps."""
