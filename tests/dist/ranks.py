"""Starts a script once for each rank on this machine, and waits for all of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.job import Job

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(script: Path, argument: Path, processes: int, **extra: str) -> None:
    """`script argument` in so many processes; a rank that fails is an error with what it said.

    extra: variables of the environment.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "TQDM_DISABLE": "1",
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        **extra,
    }
    children = [
        subprocess.Popen(
            [sys.executable, str(script), str(argument)],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [child.communicate(timeout=280)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * processes, "\n".join(said)


def run_jobs(
    file: Path,
    jobs: Sequence[Job],
    processes: int,
    *,
    float64: bool | Sequence[bool] = False,
    stop_after: Sequence[int | None] | None = None,
    **extra: str,
) -> None:
    """Jobs one after the other in the same processes; what they leave is in their work folders.

    file: written, for the ranks to read. float64: of all jobs or of each. stop_after: a step of each
    job after which the last rank is told to stop, or None.
    """
    doubles = [float64] * len(jobs) if isinstance(float64, bool) else float64
    stops = stop_after or [None] * len(jobs)
    rows = [
        {"job": json.loads(job.to_json()), "float64": double, "stop_after": stop}
        for job, double, stop in zip(jobs, doubles, stops, strict=True)
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
    run_ranks(Path(__file__).with_name("stage_worker.py"), file, processes, **extra)
