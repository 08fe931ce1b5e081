"""One rank of a tiny reward step, for test_reward_two_processes.py: `reward_worker.py FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pipeline.job import Input, Job, Out
from pipeline.settings import Settings
from stages import reward

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    given = json.loads((folder / "given.json").read_text())
    settings = Settings.model_validate(given["settings"])
    inputs = {
        "model": Input("model", "sha256:1", path=Path(given["base"])),
        "rankings": Input("rankings", "sha256:2", path=Path(given["rankings"])),
    }
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job = Job("reward", "reward", "stages.reward", 1, "0" * 12, folder, folder, {}, inputs, {})
    out = Out(job, rank, world_size)
    out.artifact.mkdir(parents=True, exist_ok=True)
    metrics = reward.run(settings, inputs, out)
    if rank == 0:
        (folder / "metrics.json").write_text(json.dumps(metrics))
