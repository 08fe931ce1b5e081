"""How fast this device multiplies matrices: what the use that a stage makes of it is compared with."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

_REPEATS = 4
# large enough to be at full speed, small enough to take no time worth counting
_WIDTH = {"cpu": 768, "other": 8192}


@lru_cache(maxsize=4)
def matmul_flops_per_second(device: torch.device, bf16: bool) -> float:
    """FLOPs a second of a large matrix product, the best of a few, once a process.

    The best, and on a CPU by its own time: other work on the machine only ever makes one slower.
    """
    width = _WIDTH.get(device.type, _WIDTH["other"])
    dtype = torch.bfloat16 if bf16 else torch.float32
    # ones, not random numbers: nothing that draws afterwards may notice
    a, b = (torch.ones(width, width, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(_REPEATS):
        begun = _now(device)
        torch.mm(a, b)
        best = max(best, 2 * width**3 / (_now(device) - begun))
    return best


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.thread_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
