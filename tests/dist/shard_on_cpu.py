"""Lets accelerate shard on a CPU, which it does on accelerators only: for tests on two gloo processes.

accelerate 1.15 takes note of FSDP where it finds several GPUs (or the like), and on several CPU
processes silently copies the model instead. What comes after that decision works on a CPU.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def install() -> None:
    """Make every AcceleratorState of this process shard, as fsdp2.yaml would on GPUs."""
    os.environ.update(
        ACCELERATE_USE_CPU="true",
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
    )
    original = AcceleratorState.__init__

    @functools.wraps(original)
    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        if not AcceleratorState._shared_state:
            times = {"timeout": kwargs["timeout"]} if "timeout" in kwargs else {}
            PartialState(cpu=True, **times)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = init
