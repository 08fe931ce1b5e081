"""Nothing is given its name before its bytes are on disk, and no name is relied on before its folder is.

A power cut keeps what fsync was called on, and of the rest anything. So every rename that a stage does is looked
at: each file below the new name was synced after its last change (same file, size and time), its folders were
synced too, and the folder that the name stands in is synced after it.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline import worker
from pipeline.files import write_atomic
from pipeline.job import Job
from tests import tiny_ppo
from tests.dist.small_jobs import make_base, make_job

# what may be lost: it says how things stand at the moment, or is made anew at every start
_MOMENTARY = {"heartbeat.json", "job.json"}


class Disk:
    """What a power cut would leave. late: renames before their bytes. unsafe: folders with a name to be lost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._synced: dict[tuple[int, int], tuple[int, int]] = {}
        self.late: list[str] = []
        self.unsafe: dict[Path, str] = {}
        self.names: list[str] = []
        self._rename, self._fsync = os.replace, os.fsync
        monkeypatch.setattr(os, "fsync", self._on_fsync)
        monkeypatch.setattr(os, "replace", self._on_rename)
        monkeypatch.setattr(os, "rename", self._on_rename)

    def _on_fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        found = os.fstat(descriptor)
        self._synced[found.st_dev, found.st_ino] = (found.st_size, found.st_mtime_ns)
        self.unsafe.pop(Path(os.readlink(f"/proc/self/fd/{descriptor}")), None)

    def _on_rename(self, source: Any, target: Any, **_: Any) -> None:
        source, target = Path(source), Path(target)
        momentary = target.name in _MOMENTARY
        doomed = target.name.startswith("tmp-")
        if not momentary and not doomed:
            self.names.append(target.name)
            self.late += [
                f"{target.name}: {path.name}"
                for path in _everything(source)
                if not self._is_safe(path)
            ]
            if target.name == "COMMITTED.json":
                # it makes a folder count whose files were written in place
                rest = [path for path in _everything(target.parent) if path != source]
                self.late += [
                    f"{target.parent.name}: {path.name}"
                    for path in rest
                    if path.is_file() and not self._is_safe(path)
                ]
        self._rename(source, target)
        if not momentary and not doomed:
            self.unsafe[target.parent] = target.name

    def _is_safe(self, path: Path) -> bool:
        found = path.stat()
        return self._synced.get((found.st_dev, found.st_ino)) == (found.st_size, found.st_mtime_ns)


def _everything(path: Path) -> list[Path]:
    return [path, *path.rglob("*")] if path.is_dir() else [path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("power") / "base")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def run(job: Job) -> None:
    draft = {"stage": job.stage, "stage_version": 1, "kind": "model", "step": job.step, "round": 1}
    manifest = {**draft, "fingerprint": job.fingerprint, "digest": ""}
    worker.run_job(Job(**{**vars(job), "manifest": manifest}), rank=0, world_size=1)


def test_the_check_sees_a_rename_before_its_bytes(disk: Disk, tmp_path: Path) -> None:
    write_atomic(tmp_path / "good.json", "{}")
    assert disk.late == []
    assert disk.unsafe == {}
    write_atomic(tmp_path / "bad.json", "{}", durable=False)
    assert disk.late == ["bad.json: bad.json.tmp"]
    assert disk.unsafe == {tmp_path: "bad.json"}
    # synced, and then written to again
    (tmp_path / "later.tmp").write_text("a")
    with (tmp_path / "later.tmp").open("a") as file:
        os.fsync(file.fileno())
        file.write("b")
    os.replace(tmp_path / "later.tmp", tmp_path / "later")
    assert disk.late[1:] == ["later: later.tmp"]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo", "evaluate"])
def test_every_checkpoint_and_artifact_is_on_disk_before_it_has_its_name(
    stage: str, base: Path, tmp_path: Path, disk: Disk
) -> None:
    if stage == "ppo":
        (tmp_path / "inputs").mkdir()
        job = tiny_ppo.make_job(
            tmp_path / "work", tiny_ppo.make_inputs(tmp_path / "inputs", "llama")
        )
    else:
        often = {} if stage == "evaluate" else {"checkpoint_every_steps": 1}
        job = make_job(stage, tmp_path / "work", base, **often)
    run(job)
    assert disk.late == []
    assert disk.unsafe == {}
    assert disk.names[-3:] == ["artifact", "manifest.json", "latest"]
    expected = {
        "pretrain": "step-00000002",
        "sft": "COMMITTED.json",
        "reward": "step-00000002",
        "ppo": "step-00000002",
        "evaluate": "policy.jsonl",
    }
    assert expected[stage] in disk.names


def test_the_rows_of_a_checkpoint_are_on_disk_before_it_is(
    base: Path, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("pretrain", tmp_path / "work", base, checkpoint_every_steps=1)
    rows = job.work / "metrics.jsonl"
    seen = []
    before = disk._on_rename

    def look(source: Any, target: Any, **named: Any) -> None:
        if Path(target).name.startswith("step-"):
            seen.append(disk._is_safe(rows))
        before(source, target, **named)

    monkeypatch.setattr(os, "replace", look)
    importlib.import_module("stages.pretrain")
    run(job)
    assert seen
    assert all(seen)
