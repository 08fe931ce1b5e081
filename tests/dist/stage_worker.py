"""One rank that runs small jobs of stages one after the other: `stage_worker.py JOBS.json`.

JOBS.json is a list of {"job": a Job, "float64": bool, "stop_after": step or null}. With SHARD_ON_CPU in
the environment models are sharded.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline import worker
from pipeline.errors import Stopped
from pipeline.job import Job, Out
from pipeline.settings import Settings
from stages import rollout
from tests.dist import shard_on_cpu
from tests.tiny_models import in_float64

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class StoppedAfter(Out):
    """Gets a stop signal, on the last rank, when a step has been logged."""

    stop_at = 0

    def log(self, step: int, row: dict[str, Any]) -> None:
        super().log(step, row)
        if step == self.stop_at and RANK == WORLD_SIZE - 1:
            worker._signals_seen.append(signal.SIGTERM)


def run(job: Job, stop_after: int | None) -> None:
    kind = type("Out", (StoppedAfter,), {"stop_at": stop_after}) if stop_after else Out
    out = kind(job, RANK, WORLD_SIZE)
    out.artifact.mkdir(parents=True, exist_ok=True)
    stage = importlib.import_module(job.module)
    try:
        metrics = stage.run(Settings.model_validate(job.settings), job.inputs, out)
    except Stopped:
        assert stop_after
        worker._signals_seen.clear()
        return
    assert not stop_after, "it should have stopped"
    if RANK == 0:
        found = {"metrics": metrics, "derived": out.derived}
        (job.work / "found.json").write_text(json.dumps(worker.plain(found, "found")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "SHARD_ON_CPU" in os.environ:
        shard_on_cpu.install()
    # few tokens a micro-batch: the ranks have different numbers of them, and must not wait for each other
    rollout.tokens_at_once = lambda device, vocab_size=1: 40  # type: ignore[assignment]
    for given in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        torch.set_default_dtype(torch.float64 if given["float64"] else torch.float32)
        with in_float64() if given["float64"] else contextlib.nullcontext():
            run(Job.from_json(json.dumps(given["job"])), given["stop_after"])
