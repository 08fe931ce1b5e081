"""What no implementation can beat here: measured matmul peaks, and FLOPs without padding."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> str:
    """The processor in words; never the name of the host."""
    model, extras = platform.processor() or platform.machine(), []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            line.split(":", 1)
            for line in cpuinfo.read_text().split("\n\n")[0].splitlines()
            if ":" in line
        )
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model = fields.get("model name", model)
        flags = set(fields.get("flags", "").split())
        extras = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{model} ({', '.join([*extras, f'{usable_cores()} cores'])})"


def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in ("torch", "transformers", "trl", "accelerate"):
        found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def matmul_peak(precision: str, size: int = 1024, seconds: float = 0.5) -> float:
    """FLOP/s of the best of many `[size, size]` products on one thread.

    The best, not the mean: a neighbour on the machine only ever makes it slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    a, b = (torch.randn(size, size).to(_DTYPES[precision]) for _ in range(2))
    a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.process_time()
        a @ b
        best = min(best, time.process_time() - start)
    torch.set_num_threads(before)
    return 2 * size**3 / best


def forward_flops(
    model: nn.Module, lengths: Iterable[int], head_positions: int | None = None
) -> float:
    """FLOPs of one forward over rows of these lengths in tokens, without any padding.

    Two for each weight of a linear layer and token, and causal attention: scores and the weighted sum
    cost 4 x width for each pair of a token and one it sees (Kaplan et al. 2020, arXiv 2001.08361,
    table 1). head_positions: tokens at which the output head is needed; None is all of them.
    """
    config = model.config
    body, head = _linear_weights(model)
    lengths = list(lengths)
    tokens = sum(lengths)
    seen = sum(length * (length + 1) / 2 for length in lengths)
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    heads = tokens if head_positions is None else head_positions
    return 2.0 * body * tokens + 2.0 * head * heads + 4.0 * width * config.num_hidden_layers * seen


def _linear_weights(model: nn.Module) -> tuple[int, int]:
    """Weights of the linear layers of the body, and of the output head."""
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    total = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    head = 0 if outputs is None else outputs.weight.numel()
    return total - head, head
