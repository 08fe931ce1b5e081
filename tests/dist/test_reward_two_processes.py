"""Two gloo processes train the reward model of one, though their micro-batches are not as many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.ranks import run_jobs
from tests.dist.small_jobs import make_base, make_job
from tests.tiny_ppo import rows_of

pytestmark = pytest.mark.dist


def test_two_processes_equal_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    for name, processes in (("one", 1), ("two", 2)):
        run_jobs(tmp_path / f"{name}.json", [make_job("reward", tmp_path / name, base)], processes)
    one, two = tmp_path / "one", tmp_path / "two"
    assert len(rows_of(one)) == 3
    for a, b in zip(rows_of(one), rows_of(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    metrics = [json.loads((work / "found.json").read_text())["metrics"] for work in (one, two)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-4)
    weights = [load_file(work / "artifact.tmp" / "model.safetensors") for work in (one, two)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-5, rtol=1e-4)
