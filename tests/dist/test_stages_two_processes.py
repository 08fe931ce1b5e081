"""Several gloo processes train the reward model of one and judge the answers of one, though what they
share does not divide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.ranks import run_jobs
from tests.dist.small_jobs import make_base, make_job
from tests.tiny_ppo import rows_of

pytestmark = pytest.mark.dist


def run(folder: Path, base: Path, processes: int, **extra: str) -> list[Path]:
    folder.mkdir()
    jobs = [make_job(stage, folder / stage, base) for stage in ("reward", "evaluate")]
    run_jobs(folder / "jobs.json", jobs, processes, **extra)
    return [job.work for job in jobs]


MANY = {"two": (2, {}), "three": (3, {}), "two, in shards": (2, {"SHARD_ON_CPU": "1"})}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("stages")
    base = make_base(folder / "base")
    return base, run(folder / "one", base, 1)


@pytest.fixture(
    scope="module",
    params=["two", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MANY)[1:])],
)
def both(request: pytest.FixtureRequest, alone: Any) -> Any:
    base, one = alone
    processes, extra = MANY[request.param]
    return [one, run(base.parent / request.param, base, processes, **extra)]


def test_the_reward_model_is_that_of_one_process(both: list[list[Path]]) -> None:
    (one, _), (several, _) = both
    assert len(rows_of(one)) == 3
    for a, b in zip(rows_of(one), rows_of(several), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    metrics = [json.loads((w / "found.json").read_text())["metrics"] for w in (one, several)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-4)
    weights = [load_file(w / "artifact.tmp" / "model.safetensors") for w in (one, several)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-5, rtol=1e-4)


def test_every_prompt_is_answered_and_judged_once(both: list[list[Path]]) -> None:
    found = []
    for _, work in both:
        lines = (work / "artifact.tmp" / "comparisons.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
    one, several = found
    assert sorted(row["prompt"] for row in one) == [f"Say {i}" for i in range(7)]
    for row, other in zip(one, several, strict=True):
        scores = [{k: v for k, v in r.items() if k.startswith("score_")} for r in (row, other)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-4)
        assert {k: v for k, v in row.items() if k not in scores[0]} == {
            k: v for k, v in other.items() if k not in scores[1]
        }
