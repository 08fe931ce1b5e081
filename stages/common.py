"""What every stage shares: the Accelerator, counter-based seeds, learning rates, safe stops."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from pipeline import worker
from pipeline.errors import ConfigError, StageError, Stopped
from pipeline.job import Out
from pipeline.settings import Settings
from stages import sharding
from stages.attention import use_attention_in_fp32
from stages.peak import matmul_flops_per_second

_KINDS = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
)


def start(settings: Settings, out: Out) -> Accelerator:
    """Bring Accelerate up and make sure that it is what was asked for.

    Raises:
        StageError: the number of processes differs from the launcher's (accelerate can start one
            process where two were asked for, without a word).
        ConfigError: sharding of a kind that the stage cannot use.
    """
    # bars of libraries, for work of milliseconds, between our own lines
    disable_progress_bar()
    # a child runs several stages; TRL's trainers leave their own state behind, and what accelerate
    # knows of the processes says FSDP after the first stage, so that it would not set it up again
    AcceleratorState._reset_state(reset_partial_state=sharding.asked())
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.model.precision == "bf16" else "no",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=settings.launch.timeout_seconds))
        ],
    )
    on_cpu = accelerator.device.type == "cpu"
    # the Trainer would take the profile's word for it
    os.environ["ACCELERATE_MIXED_PRECISION"] = accelerator.mixed_precision
    use_attention_in_fp32(on_cpu and accelerator.mixed_precision == "bf16")
    if accelerator.num_processes != out.world_size:
        raise StageError(
            f"{out.step}: {out.world_size} processes were started, but Accelerate sees"
            f" {accelerator.num_processes}",
            "Check launch.profile and launch.processes.",
        )
    if accelerator.distributed_type not in _KINDS:
        raise ConfigError(
            f"launch.profile asks for {accelerator.distributed_type.value}, which the stages cannot use",
            "ddp and fsdp2 are what they can use; see docs/several-processes.md.",
        )
    sharding.check(accelerator, out.stage)
    if sharding.is_sharded(accelerator):
        out.derived["sharded_over"] = accelerator.num_processes
    out.cost["peak_flops_per_second"] = matmul_flops_per_second(
        accelerator.device, accelerator.mixed_precision == "bf16"
    )
    return accelerator


def seed_for(run_seed: int, *purpose: Any) -> int:
    """A seed that depends on the run's seed and on what it is for, not on what ran before.

    Random numbers that are a pure function of (seed, stage, purpose, step, row) need no saved
    generator state: a resumed run draws the same ones.
    """
    text = ":".join(str(part) for part in (run_seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def later_round(round: int) -> tuple[int, ...]:
    """A part of a purpose, so that each round draws numbers of its own and the first has no name."""
    return () if round == 1 else (round,)


def generator(run_seed: int, *purpose: Any) -> torch.Generator:
    """A CPU generator seeded by `seed_for`."""
    return torch.Generator().manual_seed(seed_for(run_seed, *purpose))


@lru_cache(maxsize=2)
def permutation(count: int, run_seed: int, *purpose: Any) -> list[int]:
    """A random order of range(count), the same for the same purpose; not to be changed."""
    return torch.randperm(count, generator=generator(run_seed, *purpose)).tolist()


def epoch_order(count: int, start: int, length: int, run_seed: int, *purpose: Any) -> list[int]:
    """Items `start .. start + length` of an endless sequence of shuffled passes over range(count)."""
    order: list[int] = []
    position = start
    while len(order) < length:
        epoch, offset = divmod(position, count)
        take = permutation(count, run_seed, *purpose, epoch)[offset : offset + length - len(order)]
        order += take
        position += len(take)
    return order


def exact_div(total: int, parts: int, what: str) -> int:
    """total / parts, or a ConfigError that names the setting: nothing is rounded in silence."""
    if total % parts:
        raise ConfigError(f"{what} = {total} cannot be divided by {parts} without a remainder")
    return total // parts


def own_share(count: int, accelerator: Accelerator) -> range:
    """The contiguous part of range(count) that this rank does; the parts cover everything once."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return range(count * rank // world, count * (rank + 1) // world)


def gather_list(items: list[Any], accelerator: Accelerator) -> list[Any]:
    """Every rank's items in rank order, on every rank."""
    if accelerator.num_processes == 1:
        return items
    parts: list[list[Any]] = [[] for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def sum_over_ranks(accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """Adds a tensor over all ranks."""
    return lambda tensor: accelerator.reduce(tensor, reduction="sum")


def stop_if_asked(accelerator: Accelerator, out: Out, save: Callable[[], None]) -> None:
    """At a safe point: if any rank was signalled, all save and leave with exit code 75.

    Raises:
        Stopped: after `save()`.
    """
    asked = torch.tensor([float(worker.stop_requested())], device=accelerator.device)
    if sum_over_ranks(accelerator)(asked).item() > 0:
        save()
        raise Stopped(f"{out.step}: stopped by a signal; everything is saved")


def adamw(
    model: nn.Module | Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    beta2: float = 0.95,
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only."""
    trainable = _trainable(model)
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), eps=eps, fused=True)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def warmup_cosine(step: int, total: int, warmup_fraction: float, floor: float = 0.0) -> float:
    """Factor on the peak learning rate at `step` (0-based): linear warm-up, cosine down to `floor`."""
    warmup = max(1, round(total * warmup_fraction)) if warmup_fraction > 0 else 0
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def warmup_linear(step: int, total: int, warmup_fraction: float) -> float:
    """Factor on the peak learning rate at `step` (0-based): linear warm-up, linear down to 0."""
    warmup = max(1, round(total * warmup_fraction)) if warmup_fraction > 0 else 0
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def clip_gradients(model: nn.Module | Iterable[nn.Parameter], max_norm: float) -> float:
    """Clip the gradients of the trainable parameters; their norm before it."""
    return sharding.as_number(nn.utils.clip_grad_norm_(_trainable(model), max_norm))


def _trainable(model: nn.Module | Iterable[nn.Parameter]) -> list[nn.Parameter]:
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    return [p for p in parameters if p.requires_grad]


def pad_right(rows: Iterable[list[int]], fill: int, device: torch.device) -> Tensor:
    """Rows of different length as one tensor `[B, T]`, filled on the right."""
    rows = list(rows)
    width = max(len(row) for row in rows)
    padded = [row + [fill] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device)


def pad_left(rows: Iterable[list[int]], fill: int, device: torch.device) -> Tensor:
    """Rows of different length as one tensor `[B, T]`, filled on the left."""
    rows = list(rows)
    width = max(len(row) for row in rows)
    padded = [[fill] * (width - len(row)) + row for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device)


def micro_batches(lengths: list[int], max_rows: int, max_tokens: int) -> list[list[int]]:
    """Positions grouped so that rows of similar length share a batch: little padding.

    A batch holds at most `max_rows` rows and `max_tokens` padded tokens (one row always fits).
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        rows = len(batches[-1]) + 1 if batches else 0
        if batches and rows <= max_rows and rows * lengths[i] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
