"""What a Trainer of transformers does not do by itself: whole checkpoints, clean stops, our log.

The Trainer writes a checkpoint's files in place, one after the other, and resumes from the newest
folder whatever is in it: of 18 kills during a save 12 left one that could not be loaded, and a
flipped bit goes unnoticed. So a checkpoint counts only once
`COMMITTED.json`, with the sha256 of every file, has been written behind them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline import worker
from pipeline.files import sync, sync_all
from pipeline.job import Metrics, Out
from stages.checkpoints import damage, sha256, trainable_tensors
from stages.stops import check_finite, check_weights

COMMITTED = "COMMITTED.json"


def newest_whole(out: Out) -> Path | None:
    """The newest committed checkpoint whose files are as they were written; says which are not.

    Torn ones are removed (by rank 0), so that their names are free again.
    """
    folders = sorted(out.checkpoints.glob("checkpoint-*"), key=_step_of, reverse=True)
    chosen = None
    for folder in folders:
        problem = damage(folder, COMMITTED)
        if problem is None:
            chosen = folder
            break
        out.say(f"checkpoint {folder.name} is not whole ({problem}); using the one before")
    # every rank has looked before anything is removed
    PartialState().wait_for_everyone()
    if out.rank == 0:
        newer = folders if chosen is None else folders[: folders.index(chosen)]
        for folder in newer:
            _remove(folder)
    PartialState().wait_for_everyone()
    return chosen


def commit(folder: Path, keep: int) -> None:
    """Make a complete checkpoint count, then remove all but the newest `keep` ones."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sums = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    sync_all(folder)
    temporary = folder / "COMMITTED.tmp"
    temporary.write_text(json.dumps(sums, sort_keys=True), encoding="utf-8")
    sync(temporary)
    os.replace(temporary, folder / COMMITTED)
    sync(folder)
    sync(folder.parent)
    for old in sorted(folder.parent.glob("checkpoint-*"), key=_step_of)[:-keep]:
        _remove(old)


def _remove(folder: Path) -> None:
    """Out of the namespace first: a kill while deleting must not leave half under a good name."""
    doomed = folder.with_name(f"tmp-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


class Extra(Protocol):
    """State of a stage that travels in the Trainer's checkpoints."""

    def write(self, folder: Path) -> None:
        """Put files into a checkpoint (rank 0), before it counts."""

    def read(self, folder: Path) -> None:
        """Take the state from a whole checkpoint (every rank)."""


@dataclass(frozen=True)
class Schedule:
    """When what happens, counted in rows of the log.

    rows: of the whole run. steps_per_row: optimiser steps of one row (several passes over the same
    rollouts are one row). unit: what a row is called. measure_start: evaluate before the first step.
    """

    rows: int
    save_every: int
    evaluate_every: int
    keep: int
    steps_per_row: int = 1
    unit: str = "step"
    measure_start: bool = False


class LineCallback(TrainerCallback):  # type: ignore[misc]  # transformers does not type it
    """Our line inside the Trainer's loop: log, evaluate, save, stop.

    row_of: makes a row of our log of the Trainer's.
    evaluate: called with the row's number now and then and at the end; its numbers join the row.
    extra: what a checkpoint holds besides the Trainer's own state.
    stopped: a signal came, everything is saved, and training ended before its last step.
    last: the newest row that was logged; evaluated: the newest numbers of `evaluate`.
    """

    def __init__(
        self,
        out: Out,
        schedule: Schedule,
        row_of: Callable[[Metrics], Metrics],
        evaluate: Callable[[int], Metrics],
        extra: Extra | None = None,
    ) -> None:
        self._out = out
        self._schedule = schedule
        out.steps_per_row = schedule.steps_per_row
        self._row_of = row_of
        self._evaluate = evaluate
        self._extra = extra
        self.stopped = False
        self.last: Metrics = {}
        self.evaluated: Metrics = {}
        self._worked_until = time.perf_counter()

    def read_extra(self, checkpoint: Path) -> None:
        """Take back what `extra` had put into a checkpoint."""
        if self._extra:
            self._extra.read(checkpoint)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._schedule.measure_start and state.global_step == 0:
            self._out.log(0, self._evaluate(0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        row, within = divmod(state.global_step, self._schedule.steps_per_row)
        if within or row >= self._schedule.rows:
            return
        if _any_rank(worker.stop_requested(), args.device):
            self.stopped = True
            control.should_training_stop = True
        control.should_save = self.stopped or row % self._schedule.save_every == 0
        self._worked_until = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        # the Trainer also logs a summary at the end
        if not logs or "loss" not in logs:
            return
        number = state.global_step // self._schedule.steps_per_row
        # before a checkpoint of this step is written
        check_finite(self._out, number, loss=logs["loss"], grad_norm=logs["grad_norm"])
        row = self._row_of(logs)
        if number % self._schedule.evaluate_every == 0 or number >= self._schedule.rows:
            self.evaluated = self._evaluate(number)
            check_finite(self._out, number, **self.evaluated)
            row |= self.evaluated
        self.last = row
        self._out.log(number, row)
        self._out.progress(number, self._schedule.rows, self._schedule.unit)
        self._worked_until = time.perf_counter()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        number = state.global_step // self._schedule.steps_per_row
        check_weights(self._out, number, trainable_tensors(model))
        # rank 0 is done before the others have written their generators
        PartialState().wait_for_everyone()
        if self._out.rank == 0:
            folder = self._out.checkpoints / f"checkpoint-{state.global_step}"
            if self._extra:
                self._extra.write(folder)
            self._out.keep_rows()
            commit(folder, self._schedule.keep)
        PartialState().wait_for_everyone()
        # the Trainer logs, saves its own files and then calls this
        self._out.spend("checkpoint", time.perf_counter() - self._worked_until)


def _any_rank(flag: bool, device: torch.device) -> bool:
    if PartialState().num_processes == 1:
        return flag
    asked = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
    return bool(asked.item())
