"""The whole line through the real command: whole, killed and resumed, and run twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.metric_rows import timeless_rows

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["tokenizer", "pretrain", "sft", "sample", "rank", "reward", "ppo", "evaluate"]


def prefline(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def steps_of(run: Path) -> dict[str, dict[str, object]]:
    answer = prefline("status", str(run), "--json")
    assert answer.returncode == 0, answer.stderr
    return {step["step"]: step for step in json.loads(answer.stdout)["steps"]}


def rows_of(run: Path, step: str) -> list[dict[str, object]]:
    fingerprint = (run / step / "latest").read_text().strip()
    return timeless_rows(run / step / fingerprint / "metrics.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("line") / "whole"
    answer = prefline("run", "configs/tiny.yaml", f"run.dir={run}")
    assert answer.returncode == 0, answer.stderr
    assert str(run / "report.html") in answer.stdout
    return run


def kill_when(run: Path, process: subprocess.Popen[str], glob: str) -> None:
    """SIGKILL the whole tree as soon as a file that fits `glob` lies in the run directory."""
    deadline = time.monotonic() + 240
    while not list(run.glob(glob)):
        assert process.poll() is None, f"the run ended before {glob} appeared"
        assert time.monotonic() < deadline, f"{glob} never appeared"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_every_step_is_done_and_verifies(whole: Path) -> None:
    steps = steps_of(whole)
    assert list(steps) == STEPS
    for name, step in steps.items():
        assert step["state"] == "done", step
        assert str(step["digest"]).startswith("sha256:")
        assert step["reason"] is None
        assert (Path(str(step["path"]))).exists(), name
    answer = prefline("verify", str(whole))
    assert answer.returncode == 0, answer.stderr


def test_the_metrics_that_are_promised_are_in_the_manifest(whole: Path) -> None:
    metrics = steps_of(whole)["evaluate"]["metrics"]
    assert isinstance(metrics, dict)
    promised = "win_rate_vs_sft win_rate_low win_rate_high judge kl_nats perplexity mean_tokens"
    assert set(promised.split()) | {"degenerate_rate"} <= set(metrics)
    assert metrics["judge"] == "rubric"
    assert metrics["win_rate_low"] <= metrics["win_rate_vs_sft"] <= metrics["win_rate_high"]


def test_the_ledger_says_what_checkpoints_took(whole: Path) -> None:
    for name in ("pretrain", "sft", "reward", "ppo"):
        work = whole / name / (whole / name / "latest").read_text().strip()
        cost = json.loads((work / "manifest.json").read_text())["cost"]
        assert 0 < cost["checkpoint_seconds"] < cost["seconds"], name


def test_a_finished_run_does_nothing_and_says_so(whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("manifest.json")}
    answer = prefline("resume", str(whole))
    assert answer.returncode == 0
    for step in STEPS:
        assert f"{step}: done, nothing to do" in answer.stderr
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("manifest.json")} == before


def test_a_changed_setting_makes_its_step_stale_and_says_why(whole: Path) -> None:
    answer = prefline("run", str(whole), "--dry-run", "ppo.kl_coef=0.2")
    assert answer.returncode == 0
    assert "ppo.kl_coef 0.05 -> 0.2" in answer.stdout + answer.stderr


def test_lineage_leads_from_the_policy_to_the_annotators(whole: Path) -> None:
    answer = prefline("lineage", str(whole))
    assert answer.returncode == 0
    for word in ("ppo", "reward", "rank", "sim-1", "demo:stories"):
        assert word in answer.stdout


@pytest.mark.slow
@pytest.mark.dist
def test_a_killed_line_goes_on_with_another_number_of_processes(
    whole: Path, tmp_path: Path
) -> None:
    """The same steps on the same rows; sums over ranks are rounded in another order."""
    run = tmp_path / "killed"
    process = start("run", "configs/tiny.yaml", f"run.dir={run}", "launch.threads=1")
    processes = 1
    for glob in (
        "pretrain/*/checkpoints/step-00000040",
        "sft/*/checkpoints/*/COMMITTED.json",
        "reward/*/checkpoints/step-00000003",
        "ppo/*/checkpoints/step-00000002",
    ):
        kill_when(run, process, glob)
        processes = 3 - processes
        process = start("run", str(run), f"launch.processes={processes}")
    assert process.wait(timeout=600) == 0
    for name in ("pretrain", "sft"):
        found, expected = rows_of(run, name), rows_of(whole, name)
        assert [row["step"] for row in found] == [row["step"] for row in expected], name
        for row, other in zip(found, expected, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], abs=2e-3), (name, row["step"])
    # behind them a token may be sampled otherwise, and everything after it
    for name in ("reward", "ppo"):
        steps = [row["step"] for row in rows_of(whole, name)]
        assert [row["step"] for row in rows_of(run, name)] == steps, name


def test_a_killed_line_ends_with_the_same_digests_and_rows(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    process = start("run", "configs/tiny.yaml", f"run.dir={run}")
    # two of many moments: `make faults` tries dozens
    for glob in ("sft/*/checkpoints/*/*.json", "ppo/*/checkpoints/step-00000002"):
        kill_when(run, process, glob)
        process = start("resume", str(run))
    assert process.wait(timeout=300) == 0
    expected, found = steps_of(whole), steps_of(run)
    for name in STEPS:
        assert found[name]["digest"] == expected[name]["digest"], name
        assert found[name]["fingerprint"] == expected[name]["fingerprint"], name
    for name in ("pretrain", "sft", "reward", "ppo"):
        assert rows_of(run, name) == rows_of(whole, name), name
