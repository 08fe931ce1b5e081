"""One rank of a tiny ppo step in float64, for test_ppo_two_processes.py: `ppo_worker.py JOB.json`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from pipeline.job import Job
from tests.tiny_models import in_float64
from stages import rollout
from tests.dist import shard_on_cpu
from tests.tiny_ppo import run_ppo

if __name__ == "__main__":
    job = Job.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    if "SHARD_ON_CPU" in os.environ:
        shard_on_cpu.install()
    torch.set_default_dtype(torch.float64)
    # few tokens a micro-batch: the ranks have different numbers of them, and must not wait for each other
    rollout.tokens_at_once = lambda device, vocab_size=1: 40  # type: ignore[assignment]
    with in_float64():
        run_ppo(job, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
