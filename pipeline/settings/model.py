from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config import Strict, unhashed


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


DataSources = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""One or several data sources: a file, a folder, `demo:NAME`, or a dataset id on the hub."""


class LoraSettings(Strict):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685); merged into the published model."""

    rank: int = Field(0, ge=0)
    """Rank of the adapters; 0 trains all weights."""
    alpha: int = Field(16, ge=1)
    """Adapter scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""


class ModelSettings(Strict):
    """The language model: an existing one to start from, or the shape of a new one."""

    base: str | None = unhashed(None)
    """Start from this model: an HF directory, a GGUF file or a hub id. Null trains from scratch."""
    architecture: str = "llama"
    """transformers model type of a new model: llama, gpt2, qwen3, mistral, bert (masked) and so on."""
    hidden_size: int = Field(192, ge=8)
    """Width of the residual stream of a new model."""
    num_hidden_layers: int = Field(2, ge=1)
    """Layers of a new model."""
    num_attention_heads: int = Field(6, ge=1)
    """Attention heads of a new model; must divide hidden_size."""
    intermediate_size: int | None = Field(None, ge=8)
    """Width of the feed-forward layers; null is 8/3 of hidden_size, rounded up to 32."""
    max_length: int = Field(512, ge=16)
    """Longest sequence in tokens that a new model can read."""
    tie_word_embeddings: bool = True
    """Use one matrix for input embeddings and output head of a new model."""
    initializer_range: float | None = Field(None, gt=0)
    """Standard deviation of a new model's weights; null is hidden_size ** -0.5, which lets small models
    learn to copy from their context several times sooner than the usual 0.02 (measured on the demo)."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further keys of the architecture's transformers configuration."""
    precision: Literal["auto", "fp32", "bf16"] | None = None
    """Arithmetic of training: fp32, or bf16 autocast over fp32 weights; `auto` probes once, when the run is
    created, which trains faster on this machine; null is bf16 on a GPU that has it, else fp32."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelSettings:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide"
                f" hidden_size {self.hidden_size}"
            )
        return self
