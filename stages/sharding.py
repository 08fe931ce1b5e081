"""FSDP2 in a few functions: where a model lies in shards, and where it has to be whole.

`launch.profile: fsdp2` asks for it. Each rank then keeps its part of the weights, of their gradients
and of AdamW's moments. A layer is gathered for the moment in which it computes, so every forward and
backward pass is work of all ranks together: they make equally many (`most`), or the model is whole
before they begin (`whole`): while responses are sampled and scored, where ranks measure different
held-out rows, and when an artifact is saved.

Shards are fp32 and autocast computes in bf16, as without sharding, so the numbers are the same. A
checkpoint holds whole tensors: it can be continued with any number of processes, sharded or not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from pipeline.errors import ConfigError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# sample reads models whole and trains none; evaluate trains its judge as reward does
_STAGES = ("pretrain", "sft", "sample", "reward", "ppo", "evaluate")


def asked() -> bool:
    """Whether the launcher was told to shard."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def check(accelerator: Accelerator, stage: str) -> None:
    """Refuse what would be ignored in silence.

    Raises:
        ConfigError: sharding that was asked for and is not there, or that this stage cannot use.
    """
    if asked() and not is_sharded(accelerator):
        raise ConfigError(
            "launch.profile asks for FSDP, which accelerate does on GPUs only; here it would copy the"
            " whole model to each process and say nothing",
            "Set launch.profile to auto.",
        )
    if not is_sharded(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"launch.profile asks for version {plugin.fsdp_version} of FSDP",
            "Set fsdp_version: 2 in fsdp_config; configs/accelerate/fsdp2.yaml is an example.",
        )
    # what our loops would ignore in silence
    refused = {
        "fsdp_offload_params: true": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_cpu_ram_efficient_loading: true": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing: true": plugin.activation_checkpointing,
        "fsdp_reshard_after_forward: false": not plugin.reshard_after_forward,
    }
    if on := [key for key, is_on in refused.items() if is_on]:
        raise ConfigError(f"launch.profile: the stages cannot use {', '.join(on)}")
    if stage not in _STAGES:
        raise ConfigError(
            f"{stage} cannot shard its models",
            f"Use plain data parallelism (launch.profile=ddp); {', '.join(_STAGES)} can shard.",
        )


# ---- models --------------------------------------------------------------------------------


def place(module: ModuleT, accelerator: Accelerator) -> ModuleT:
    """Put a module on this rank's device: whole or, where sharding was asked for, this rank's shards.

    Before its optimiser is made. Only calls of the module itself gather its shards, not calls of its
    children.
    """
    if not is_sharded(accelerator):
        return module.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    parts: list[nn.Module] = [*_blocks(module), module]
    for part in parts:
        # the outermost too, by default not: an optimiser made after a forward pass without a backward
        # pass would be handed its whole weights, and never change its shards
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return module


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of a transformer, by the names that transformers gives their classes."""
    parts = list(module.modules())
    names = {name for part in parts for name in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in parts if type(part).__name__ in names and part is not module]


def in_shards(module: nn.Module) -> bool:
    """Whether `place` has put the module, or parts of it, into shards."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def exchange(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The module to call in training so that ranks exchange gradients: DDP; shards do it themselves."""
    if in_shards(module):
        return module
    if is_sharded(accelerator):
        # accelerate would shard it; it was loaded whole, because it is only a judge
        return DistributedDataParallel(module)
    prepared: nn.Module = accelerator.prepare_model(module)
    return prepared


def accumulate(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Around a micro-batch: gradients are exchanged once a step, in the last one.

    Shards are exchanged in each: gradients that wait would be as large as the whole model.
    """
    if last or in_shards(module):
        return contextlib.nullcontext()
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


def most(count: int, accelerator: Accelerator) -> int:
    """How many passes this rank has to make so that no other waits for it; `count` if not sharded."""
    if not is_sharded(accelerator):
        return count
    counts = torch.tensor(count, device=accelerator.device)
    torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX)
    return int(counts.item())


@contextlib.contextmanager
def whole(*modules: nn.Module) -> Iterator[None]:
    """Within: all weights of the modules are on every rank, and passes need nobody else.

    All ranks enter and leave together, and none trains inside. Not to be nested. Does nothing to
    modules that are not sharded.
    """
    make_whole(*modules)
    try:
        yield
    finally:
        for part in _parts(modules):
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def make_whole(*modules: nn.Module) -> None:
    """`whole` without an end, where nothing trains any more; called by all ranks."""
    for part in _parts(modules):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def _parts(modules: tuple[nn.Module, ...]) -> list[FSDPModule]:
    return [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()`, of a sharded model inside `whole`."""
    if not in_shards(model):
        return model.state_dict()
    # state_dict() would put the model back into shards
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, part in model.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
    return found


def compute_by_autocast(trainer: Trainer) -> None:
    """Let a sharded Trainer keep fp32 shards, and compute in bf16 by autocast as our loops do.

    Left alone it gathers bf16 copies, which is what `whole` would then hold, and save.
    """
    if is_sharded(trainer.accelerator):
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        trainer.autocast_smart_context_manager = trainer.accelerator.autocast


# ---- tensors -------------------------------------------------------------------------------


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors whole and on the CPU where `keep`, else none of them; called by all ranks."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if keep:
            found[name] = tensor.cpu().contiguous()
    return found


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, as this rank's shard of it where `other` is a shard."""
    if isinstance(other, DTensor) and not isinstance(tensor, DTensor):
        local = tensor.to(other.device)
        # every rank has read the same file: nothing needs to be sent
        return distribute_tensor(local, other.device_mesh, other.placements, src_data_rank=None)
    return tensor


def as_number(tensor: Tensor) -> float:
    """A number that may be spread over the ranks, as the norm of a gradient is."""
    return float(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
