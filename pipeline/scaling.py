"""What a transformer costs, by arithmetic: parameters, FLOPs, memory; and how large it should be.

FLOPs count a multiply-add as two (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Letters: N weights
that multiply, L layers, d the width of all attention heads of a layer together, c the tokens that a
token attends to, on average.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

FP32_BYTES, BF16_BYTES = 4, 2
# AdamW: two moments for each weight, in fp32
_MOMENT_BYTES = 8


@dataclass(frozen=True)
class ModelSize:
    """Exact counts of one model.

    multiplying: weights that each token is multiplied with: all but embeddings that are only looked up
    (an output head that is tied to them counts). adapters: those of LoRA, not in `parameters`.
    attention_width, kv_width: heads (key-value heads) times their width, of one layer.
    """

    parameters: int
    embedding: int
    multiplying: int
    layers: int
    hidden: int
    attention_width: int
    kv_width: int
    vocabulary: int
    adapters: int = 0

    @property
    def non_embedding(self) -> int:
        return self.parameters - self.embedding

    @property
    def trainable(self) -> int:
        return self.adapters or self.parameters

    @property
    def scorer(self) -> int:
        """Parameters of the same model with a scalar head (without a bias) instead of its output head."""
        tied = self.multiplying > self.non_embedding
        return self.parameters + self.hidden - (0 if tied else self.vocabulary * self.hidden)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> ModelSize:
        return cls(**{field.name: int(row[field.name]) for field in fields(cls)})


# ---- FLOPs ---------------------------------------------------------------------------------


def forward_flops(size: ModelSize, tokens: float, context: float) -> float:
    """2 N a token for the weights and 4 L d c for the scores and the weighted sum of attention.

    (Kaplan et al. 2020, table 1, with the product of attention and values, as PaLM, arXiv 2204.02311,
    appendix B, counts it.) context: c; half a row for causal attention.
    """
    weights = 2.0 * (size.multiplying + size.adapters)
    return tokens * (weights + 4.0 * size.layers * size.attention_width * context)


def train_flops(size: ModelSize, tokens: float, context: float) -> float:
    """Forward and backward: 6 N a token and three times the attention of a forward pass.

    Backward takes twice the forward pass: gradients of what comes in, and of the weights (Kaplan et al.
    2020, section 2.1). Frozen weights under LoRA adapters need only the first: 4 N instead of 6.
    """
    forward = forward_flops(size, tokens, context)
    if not size.adapters:
        return 3.0 * forward
    return 3.0 * forward - 2.0 * size.multiplying * tokens


def generation_flops(size: ModelSize, prompt: float, response: float) -> float:
    """One response with a key-value cache: every token passes the weights once, and sees all before it."""
    tokens = prompt + response
    return forward_flops(size, tokens, tokens / 2)


# ---- memory --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a stage."""

    weights: float = 0.0
    """fp32; of all models that the stage holds."""
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    """What a micro-batch keeps for its backward pass."""
    logits: float = 0.0
    kv_cache: float = 0.0
    exchange: float = 0.0
    """Buckets of DDP, or what FSDP2 gathers for a moment."""
    kept: float = 0.0
    """The best policy so far, and bf16 copies of weights."""
    process: float = 0.0
    """Python and its libraries; of the host, not of a GPU."""

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def to_row(self) -> dict[str, float]:
        rows = {field.name: round(getattr(self, field.name)) for field in fields(self)}
        return {**rows, "total": round(self.total)}


def kv_cache_bytes(
    size: ModelSize, rows: float, tokens: float, number_bytes: int = FP32_BYTES
) -> float:
    """Keys and values of every layer for `rows` rows of `tokens` tokens."""
    return 2.0 * size.layers * size.kv_width * rows * tokens * number_bytes


def training_memory(size: ModelSize, processes: int = 1, sharded: bool = False) -> Memory:
    """Weights, gradients and AdamW of one model on one device, 16 bytes a trained weight.

    As the stages hold them (stages/sharding.py): fp32 with bf16 by autocast. DDP copies everything and
    keeps gradients a second time in the buckets that it exchanges. FSDP2 (ZeRO-3: arXiv 1910.02054,
    figure 1) leaves each process its share of weights, gradients and moments, and gathers one layer at a
    time. LoRA: gradients and moments of the adapters only.
    """
    weights = float(FP32_BYTES) * (size.parameters + size.adapters)
    trained = float(size.trainable)
    if sharded and processes > 1:
        layer = FP32_BYTES * max(size.non_embedding / size.layers, size.embedding)
        return Memory(
            weights=weights / processes,
            gradients=FP32_BYTES * trained / processes,
            optimizer=_MOMENT_BYTES * trained / processes,
            # the layer that computes and its gradient, and the one that is fetched meanwhile
            exchange=3.0 * layer,
        )
    return Memory(
        weights=weights,
        gradients=FP32_BYTES * trained,
        optimizer=_MOMENT_BYTES * trained,
        exchange=FP32_BYTES * trained if processes > 1 else 0.0,
    )


def frozen_memory(size: ModelSize, processes: int = 1, sharded: bool = False) -> Memory:
    """A model that is only read."""
    weights = float(FP32_BYTES) * size.parameters
    return Memory(weights=weights / processes if sharded else weights)


def together(*parts: Memory) -> Memory:
    """The sum of what lies beside each other; of what is gathered in turns, the largest."""
    sums = {f.name: sum(getattr(part, f.name) for part in parts) for f in fields(Memory)}
    sums["exchange"] = max((part.exchange for part in parts), default=0.0)
    return Memory(**sums)


# ---- how large, how long -------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats a token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return float(self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta)

    def optimum(self, flops: float) -> tuple[float, float]:
        """N and D of the lowest loss with 6 N D = `flops` (arXiv 2203.15556, eq. 4)."""
        share = self.beta / (self.alpha + self.beta)
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = G * (flops / 6) ** share
        return parameters, flops / 6 / parameters


# the paper prints two digits of the exponents; these are those of its TeX source (see arXiv 2404.10102)
HOFFMANN = Law(E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849)
EPOCH = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)


@dataclass(frozen=True)
class Optimum:
    """The best use of a budget, as one source has it."""

    source: str
    parameters: float
    tokens: float


def compute_optimal(flops: float) -> list[Optimum]:
    """N and D for a budget, by each published way.

    Approaches 1 and 2 of arXiv 2203.15556 publish exponents (table 2) and a table of sizes (3 and A3):
    the power laws here go through their row of 1 billion parameters. Approach 3 publishes its law; Besiroglu
    et al. (arXiv 2404.10102) fitted the same points again and found it wrong.
    """
    paper = "arXiv 2203.15556"
    found = []
    for name, exponent, anchor in (
        (f"{paper} approach 1 (training curves)", 0.50, 1.21e20),
        (f"{paper} approach 2 (IsoFLOP)", 0.49, 1.20e20),
    ):
        parameters = 1e9 * (flops / anchor) ** exponent
        found.append(Optimum(name, parameters, flops / 6 / parameters))
    found.append(Optimum(f"{paper} approach 3 (parametric)", *HOFFMANN.optimum(flops)))
    found.append(Optimum("arXiv 2404.10102 (approach 3 again)", *EPOCH.optimum(flops)))
    return found
