"""What passes between the core and a stage: the job it is given and the place where it works.

The parent writes a job as JSON; the child (see `worker.py`) calls the stage's
`run(settings, inputs, out)` with `Settings`, `Inputs` and `Out` and gets the metrics back.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.files import replace_durably, sync
from pipeline.records import canonical_json

Metrics = dict[str, Any]
_SHOW_EVERY_SECONDS = 3.0
_SHOWN_KEYS = 7  # what fits on a line; a stage puts what matters first
_EVALUATION = ("heldout_", "validation_")


def win_rate_metric(first: str, second: str) -> str:
    """`win_rate_vs_sft` for the policy, else with the first model before it: policy_1_win_rate_vs_sft."""
    return f"{'' if first == 'policy' else f'{first}_'}win_rate_vs_{second}"


@dataclass(frozen=True)
class Input:
    """One thing that a stage reads: the artifact of another step, or what the user gave.

    Exactly one of `path` (an artifact folder of ours) and `sources` is set.
    """

    role: str
    digest: str
    path: Path | None = None
    step: str | None = None
    stage: str | None = None
    fingerprint: str | None = None
    sources: tuple[str, ...] = ()
    contract: dict[str, Any] = field(default_factory=dict)


Inputs = dict[str, Input]


@dataclass(frozen=True)
class Job:
    """All that a child process needs to run one step."""

    step: str
    stage: str
    module: str
    round: int
    fingerprint: str
    work: Path
    run_dir: Path
    settings: dict[str, Any]
    inputs: Inputs
    manifest: dict[str, Any]
    """The manifest as far as the parent knows it; the child completes it."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Job:
        row = json.loads(text)
        inputs = {
            role: Input(
                **{
                    **item,
                    "path": Path(item["path"]) if item["path"] else None,
                    "sources": tuple(item["sources"]),
                }
            )
            for role, item in row["inputs"].items()
        }
        paths = {"work": Path(row["work"]), "run_dir": Path(row["run_dir"])}
        return cls(**{**row, **paths, "inputs": inputs})


class Tracker(Protocol):
    """Takes the rows of metrics.jsonl to another program as well (stages/tracking.py)."""

    def log(self, step: int, metrics: Metrics) -> None: ...
    def finish(self) -> None: ...


class Out:
    """Where a stage works, and how it tells the world what it does.

    artifact: folder for the result; only rank 0 writes there; published after `run` returns.
    checkpoints: folder for the stage's own checkpoints.
    contract, derived, cost: dicts that the stage fills; they go into the manifest.
    resumed_from: set by the stage to the step it continued from.
    steps_per_row: optimiser steps, which number a Trainer's checkpoints, to a row of the metrics.
    """

    def __init__(self, job: Job, rank: int = 0, world_size: int = 1) -> None:
        self.step = job.step
        self.stage = job.stage
        self.round = job.round
        self.run_dir = job.run_dir
        self.work = job.work
        self.artifact = job.work / "artifact.tmp"
        self.checkpoints = job.work / "checkpoints"
        self.rank = rank
        self.world_size = world_size
        self.contract: dict[str, Any] = {}
        self.derived: dict[str, Any] = {}
        self.cost: dict[str, float] = {"tokens": 0, "flops": 0.0}
        self.resumed_from: int | None = None
        self.tracker: Tracker | None = None
        self.steps_per_row = 1
        self._last_beat = -math.inf
        self._last_shown = 0.0

    @property
    def _metrics(self) -> Path:
        return self.work / "metrics.jsonl"

    @property
    def _samples(self) -> Path:
        return self.work / "samples.jsonl"

    @property
    def validations(self) -> Path:
        """What each prompt of each validation got: see `validation`."""
        return self.work / "validations.jsonl"

    def below(self, name: str) -> Out:
        """A part of the work with rows, checkpoints, costs and derived values of its own, in a folder
        of its own."""
        part = copy.copy(self)
        part.work = self.work / name
        part.checkpoints = part.work / "checkpoints"
        part.checkpoints.mkdir(parents=True, exist_ok=True)
        part.derived, part.cost = {}, {"tokens": 0, "flops": 0.0}
        return part

    def spend(self, what: str, seconds: float) -> None:
        """Add to what the step spent on something beside its work: `checkpoint_seconds` in its cost."""
        key = f"{what}_seconds"
        self.cost[key] = round(self.cost.get(key, 0.0) + seconds, 3)

    def say(self, text: str) -> None:
        """A line for people, from rank 0, on stderr."""
        if self.rank == 0:
            print(f"{self.step}: {text}", file=sys.stderr, flush=True)  # noqa: T201 - its one place

    def log(self, step: int, metrics: Metrics) -> None:
        """One row of metrics.jsonl and one line on screen. `step` counts the stage's own steps."""
        if self.rank != 0:
            return
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(
                canonical_json({"step": step, **metrics, "time": round(time.time(), 3)}) + "\n"
            )
        if self.tracker:
            self.tracker.log(step, metrics)
        # every row is in the file; people see one every few seconds, and every evaluation
        is_evaluation = any(key.startswith(_EVALUATION) for key in metrics)
        now = time.monotonic()
        if now - self._last_shown < _SHOW_EVERY_SECONDS and not is_evaluation:
            return
        self._last_shown = now
        shown = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for number, (key, value) in enumerate(metrics.items())
            if number < _SHOWN_KEYS or key.startswith(_EVALUATION)
        )
        self.say(f"step {step}  {shown}")

    def keep_rows(self) -> None:
        """Wait until the rows written so far are on disk: a checkpoint that is there has its rows."""
        for path in (self._metrics, self._samples):
            if self.rank == 0 and path.exists():
                sync(path)

    def sample(self, step: int, **row: Any) -> None:
        """One text that the model wrote, with its prompt, as a row of samples.jsonl."""
        self._append(self._samples, step, row)

    def validation(self, step: int, **row: list[float]) -> None:
        """What each prompt of a validation got, as a row of validations.jsonl."""
        self._append(self.validations, step, row)

    def _append(self, path: Path, step: int, row: dict[str, Any]) -> None:
        if self.rank != 0:
            return
        with path.open("a", encoding="utf-8") as file:
            file.write(canonical_json({"step": step, **row}) + "\n")

    def rewind(self, step: int | None) -> None:
        """Forget the metric rows and sample texts after `step` (None: all): that work is done again."""
        for path in (self._metrics, self._samples, self.validations):
            if self.rank != 0 or not path.exists():
                continue
            # behind the last line end stands nothing, or what a kill left of a row, perhaps half a
            # character
            rows = path.read_bytes().split(b"\n")[:-1]
            kept = [row for row in rows if step is not None and json.loads(row)["step"] <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(b"".join(row + b"\n" for row in kept))
            replace_durably(temporary, path)

    def progress(self, done: int, total: int, unit: str = "step") -> None:
        """A heartbeat, at most twice a second: `status` shows it and can tell alive from dead."""
        # a clock that is set back must not silence it
        now = time.monotonic()
        if self.rank != 0 or (now - self._last_beat < 0.5 and done < total):
            return
        self._last_beat = now
        beat = {"done": done, "total": total, "unit": unit, "pid": os.getpid(), "time": time.time()}
        temporary = self.work / "heartbeat.tmp"
        temporary.write_text(json.dumps(beat), encoding="utf-8")
        os.replace(temporary, self.work / "heartbeat.json")
