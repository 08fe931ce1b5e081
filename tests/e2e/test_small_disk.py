"""A disk that another one fills up, in every stage of a real line: said so, and nothing is lost once there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.small_line import STEPS, Fault, copy_before, prefline, result_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]

# where the disk is filled up, at which call, how much is left, and what the next start says
PLACES = {
    "tokenizer, at its result": ("pipeline.artifacts:check_files", 1, 0, ""),
    "pretrain, its packed text": ("stages.packing:pack_documents", 1, 20_000, ""),
    "pretrain, a checkpoint": (
        "stages.pretrain:Loop._save",
        2,
        60_000,
        "step-00000006",
    ),
    "pretrain, its result": ("stages.models:save_model", 1, 60_000, "step-00000018"),
    "sft, a checkpoint": ("stages.trl_checkpoints:LineCallback.on_log", 6, 60_000, "checkpoint-3"),
    "sft, its result": ("stages.trl_runs:publish", 1, 60_000, "checkpoint-6"),
    "sample, a response": ("stages.sample:_group", 3, 0, ""),
    "rank, the labels": ("labeling_ui.rank:run", 1, 20_000, ""),
    "reward, a checkpoint": ("stages.checkpoints:Checkpointer._write", 2, 60_000, "step-00000001"),
    "ppo, a checkpoint": ("stages.ppo:_Loop._save", 2, 60_000, "step-00000001"),
    "ppo, a row of its metrics": ("stages.ppo:_Loop._minibatch", 1, 0, "step-00000001"),
    "evaluate, an answer": ("stages.answering:_sample", 1, 0, ""),
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_costs_nothing_but_time_in_every_stage(
    small_run: Path, small_disk: Path
) -> None:
    run = copy_before(small_run, small_disk / "run", "tokenizer")
    filler = small_disk / "filler"
    resumed: str = ""
    for name, (where, call, leave, checkpoint) in PLACES.items():
        fault: Fault = {"do": "fill", "filler": str(filler), "leave": leave}
        ended = prefline("run", run, at_call=[{**fault, "where": where, "call": call}])
        said = f"{name}\n{ended.said}"
        assert ended.code == 1, said
        told = ("is full (", "No space left on device", "its disk refuses to be written")
        assert any(words in ended.said for words in told), said
        # of the fault before this one: nothing older, and not from the start
        assert f"continuing from {resumed}" in ended.said or not resumed, said
        resumed = checkpoint
        filler.unlink()
    ended = prefline("resume", run)
    assert ended.code == 0, ended.said
    for step in STEPS:
        assert result_of(run, step) == result_of(small_run, step), step


@pytest.mark.parametrize("step", ["pretrain", "sft", "ppo"])
def test_files_that_may_not_grow_are_told_without_a_small_disk(
    step: str, small_run: Path, tmp_path: Path
) -> None:
    run = copy_before(small_run, tmp_path / "run", step)
    fault = {"do": "limit", "bytes": 100_000, "where": f"stages.{step}:run", "call": 1}
    ended = prefline("run", run, "--until", step, at_call=[fault])
    assert ended.code == 1, ended.said
    assert f"error: {step}: a file would become larger than this system allows" in ended.said
    ended = prefline("run", run, "--until", step)
    assert ended.code == 0, ended.said
    assert result_of(run, step) == result_of(small_run, step)
