"""Two gloo processes with FSDP2 do what one process does: the numbers, the files, and the resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from pipeline.job import Job
from tests.dist.ranks import run_jobs, run_ranks
from tests.dist.small_jobs import make_base, make_job, make_ppo_job
from tests.metric_rows import timeless_rows

pytestmark = pytest.mark.dist

SHARDED = {"SHARD_ON_CPU": "1"}


class Case(NamedTuple):
    """A stage's job under a name; of ppo `kind` is the architecture."""

    stage: str
    changes: dict[str, Any]
    kind: str = "llama"
    tolerance: float = 1e-5
    precision: str = "fp32"


CASES = {
    "pretrain": Case("pretrain", {}),
    "sft": Case("sft", {}),
    "sft with adapters": Case("sft", {"lora": {"rank": 2}}),
    # sums of bf16 products in another order
    "sft in bf16": Case("sft", {}, tolerance=5e-3, precision="bf16"),
    "reward": Case("reward", {}),
    "reward with adapters": Case("reward", {"lora": {"rank": 2}}),
    "ppo": Case("ppo", {}, tolerance=1e-9),
    "ppo, tied, shared critic": Case("ppo", {"critic": "shared"}, "gpt2", 1e-9),
    "ppo with adapters": Case("ppo", {"critic": "separate", "lora": {"rank": 2}}, "llama", 1e-9),
}
QUICK = ("pretrain", "sft", "ppo")


def job_of(case: Case, work: Path, base: Path, **more: Any) -> Job:
    changes = {**case.changes, **more}
    if case.stage == "ppo":
        return make_ppo_job(work, case.kind, **changes)
    return make_job(case.stage, work, base, case.precision, **changes)


def run(folder: Path, name: str, cases: list[Case], base: Path, processes: int) -> list[Path]:
    """All cases in the same processes, as steps of a line are."""
    jobs = [job_of(case, folder / f"{name}-{i}", base) for i, case in enumerate(cases)]
    extra = SHARDED if processes > 1 else {}
    double = [case.stage == "ppo" for case in cases]
    run_jobs(folder / f"{name}.json", jobs, processes, float64=double, **extra)
    return [job.work for job in jobs]


def compare(one: Path, two: Path, tolerance: float) -> None:
    """The rows of the log (not how fast), the weights and every other file."""
    rows = [timeless_rows(work / "metrics.jsonl") for work in (one, two)]
    assert len(rows[0]) == len(rows[1]) >= 3
    for row, other in zip(*rows, strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)
    files = [
        {path.name: path for path in sorted((work / "artifact.tmp").rglob("*")) if path.is_file()}
        for work in (one, two)
    ]
    assert files[0].keys() == files[1].keys()
    for name, path in files[0].items():
        if path.suffix == ".safetensors":
            weights, others = load_file(path), load_file(files[1][name])
            assert weights.keys() == others.keys()
            for key, weight in weights.items():
                torch.testing.assert_close(
                    weight, others[key], atol=10 * tolerance, rtol=10 * tolerance
                )
        elif name != "reward.json":  # holds measured numbers
            assert path.read_bytes() == files[1][name].read_bytes(), name


def test_what_the_module_promises(tmp_path: Path) -> None:
    run_ranks(Path(__file__).with_name("sharding_worker.py"), tmp_path, 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("given") / "base")


@pytest.fixture(
    scope="module", params=["quick", pytest.param("rest", marks=pytest.mark.slow)]
)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, base: Path
) -> Iterator[dict[str, tuple[Path, Path]]]:
    names = [name for name in CASES if (name in QUICK) == (request.param == "quick")]
    cases = [CASES[name] for name in names]
    folder = tmp_path_factory.mktemp("sharded")
    works = zip(
        run(folder, "one", cases, base, 1), run(folder, "two", cases, base, 2), strict=True
    )
    yield dict(zip(names, works, strict=True))


def test_shards_give_the_numbers_and_the_files_of_one_process(
    both: dict[str, tuple[Path, Path]], subtests: pytest.Subtests
) -> None:
    for name, (one, two) in both.items():
        with subtests.test(name):
            derived = [json.loads((w / "found.json").read_text())["derived"] for w in (one, two)]
            assert [row.get("sharded_over") for row in derived] == [None, 2]
            compare(one, two, CASES[name].tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "ppo"])
def test_a_stopped_run_in_shards_goes_on_to_the_same_bytes(
    name: str, tmp_path: Path, base: Path
) -> None:
    case = CASES[name]
    double = case.stage == "ppo"
    whole = job_of(case, tmp_path / "whole", base)
    stopped = job_of(case, tmp_path / "stopped", base)
    jobs, stops = [whole, stopped, stopped], [None, 2, None]
    run_jobs(tmp_path / "jobs.json", jobs, 2, float64=double, stop_after=stops, **SHARDED)
    rows = [timeless_rows(job.work / "metrics.jsonl") for job in (whole, stopped)]
    assert rows[0] == rows[1]
    for path in (whole.work / "artifact.tmp").iterdir():
        if path.is_file():
            other = stopped.work / "artifact.tmp" / path.name
            assert path.read_bytes() == other.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "reward", "ppo"])
def test_a_checkpoint_in_shards_is_continued_by_one_process(
    name: str, tmp_path: Path, base: Path
) -> None:
    case = CASES[name]
    double = case.stage == "ppo"
    whole = job_of(case, tmp_path / "whole", base)
    moved = job_of(case, tmp_path / "moved", base)
    run_jobs(tmp_path / "two.json", [moved], 2, float64=double, stop_after=[2], **SHARDED)
    run_jobs(tmp_path / "one.json", [moved, whole], 1, float64=double)
    compare(whole.work, moved.work, case.tolerance)
