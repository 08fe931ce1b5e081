"""One checkpointer for our loops: whole or not at all, verified on load, no pickle.

A checkpoint is a folder `step-00000120/` with safetensors files, `state.json` and a `MANIFEST.json`
of sha256 sums. It is written under another name, flushed to disk and renamed; older ones are
deleted only after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.files import sync, sync_all
from pipeline.job import Out
from stages.sharding import gathered, like
from stages.stops import check_weights

Tensors = dict[str, Tensor]
_MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """step: how much is done. tensors: group -> name -> tensor. state: plain JSON values."""

    step: int
    tensors: dict[str, Tensors]
    state: dict[str, Any]


class Checkpointer:
    """Saves and finds the checkpoints of one step of the line."""

    def __init__(self, out: Out, keep: int, accelerator: Accelerator | None = None) -> None:
        self._folder = out.checkpoints
        self._keep = keep
        self._accelerator = accelerator
        self._out = out

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]
    ) -> None:
        """Write a checkpoint (rank 0), wait until it is on disk, then delete the oldest ones."""
        started = time.perf_counter()
        keep = self._out.rank == 0
        groups = {group: gathered(named, keep) for group, named in tensors.items()}
        if keep:
            self._write(step, groups, state)
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
        self._out.spend("checkpoint", time.perf_counter() - started)

    def _write(self, step: int, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        final = self._folder / f"step-{step:08d}"
        if final.exists() and damage(final, _MANIFEST) is None:
            # a stop right after a save: replacing the folder would leave a moment with neither
            return
        temporary = self._folder / f"tmp-step-{step:08d}"
        for leftover in self._folder.glob("tmp-*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        self._out.keep_rows()
        check_weights(
            self._out,
            step,
            {
                f"{group} {name}": tensor
                for group, named in tensors.items()
                for name, tensor in named.items()
            },
        )
        for group, named in tensors.items():
            save_file(named, temporary / f"{group}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}))
        sums = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / _MANIFEST).write_text(json.dumps(sums))
        sync_all(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync(self._folder)
        everything = sorted(self._folder.glob("step-*"))
        # one behind this step was passed over when the run went on: damaged, and not to be counted
        kept = [path for path in everything if path.name <= final.name][-self._keep :]
        for old in (path for path in everything if path not in kept):
            # renamed first: a kill while deleting must not leave half a checkpoint under this name
            doomed = old.with_name(f"tmp-{old.name}")
            os.replace(old, doomed)
            shutil.rmtree(doomed)

    def load_latest(self) -> Checkpoint | None:
        """The newest checkpoint whose every file is as it was written; says which ones are not."""
        for folder in sorted(self._folder.glob("step-*"), reverse=True):
            problem = damage(folder, _MANIFEST)
            if problem:
                self._out.say(
                    f"checkpoint {folder.name} is damaged ({problem}); using the one before"
                )
                continue
            state = json.loads((folder / "state.json").read_text())
            tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
            step = state.pop("step")
            self._out.say(f"continuing from {folder.name}")
            self._out.resumed_from = step
            self._out.rewind(step)
            return Checkpoint(step, tensors, state)
        # rows of a start that never reached a checkpoint
        self._out.rewind(None)
        return None


def damage(folder: Path, manifest: str) -> str | None:
    """What is wrong with a folder whose sha256 sums are in the file `manifest`; None if nothing."""
    try:
        sums = json.loads((folder / manifest).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if sha256(folder / name) != expected:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trainable_tensors(model: nn.Module) -> Tensors:
    """The trainable parameters by name; a tied one appears once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_trainable(model: nn.Module | Mapping[str, Tensor], tensors: Tensors) -> None:
    """Copy saved parameters back into a model, or into its parameters by name; names must match."""
    parameters = trainable_tensors(model) if isinstance(model, nn.Module) else model
    assert parameters.keys() == tensors.keys(), parameters.keys() ^ tensors.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(tensors[name], parameter))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """AdamW's moments and step counts under stable names."""
    found: Tensors = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            found[f"{index}.{name}"] = torch.as_tensor(value)
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put saved moments back; learning rates are set by the loop at each step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        if value.dim():  # a moment, of the parameter's shape; the count of steps is a number
            value = like(value, parameters[int(index)])
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
