from __future__ import annotations

from pydantic import Field

from pipeline.config import Strict, unhashed
from pipeline.settings.model import DataSources


class TokenizerSettings(Strict):
    """Byte-level BPE, trained when the model is new."""

    vocab_size: int = Field(4096, ge=300, le=1_000_000)
    """Entries of the vocabulary, special tokens included; all 256 bytes are always in it."""
    data: DataSources | None = unhashed(None)
    """Text to train on; null uses pretrain.data."""
    text_field: str = "text"
    """Column that holds the text, for files with columns."""
    max_documents: int | None = Field(None, ge=1)
    """Read at most this many documents; null reads all."""
    min_frequency: int = Field(2, ge=1)
    """A pair of tokens must occur this often to be merged."""
