"""A tracker gets every row once, also over kills; it can break, and training does not care."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline import cli, trackers, worker
from pipeline.errors import ConfigError
from pipeline.job import Job, Out
from pipeline.manifest import Manifest, fingerprint
from pipeline.plan import plan
from pipeline.settings import Settings
from stages import tracking

STEPS = range(1, 8)


def make_out(folder: Path, kind: str, rank: int = 0) -> tuple[Job, Out]:
    work = folder / "sft" / "4f9c2ab71d03"
    work.mkdir(parents=True, exist_ok=True)
    settings = Settings.model_validate(
        {"run": {"tracker": kind, "name": "mine"}, "pretrain": {"data": ["demo:stories"]}}
    )
    draft = Manifest(
        stage="sft",
        stage_version=1,
        kind="model",
        step="sft",
        round=1,
        fingerprint="4f",
        digest="",
        settings={"sft.lr": 1e-3, "sft.extra": {"a": [1]}, "sft.max_steps": None},
    )
    job = Job(
        step="sft",
        stage="sft",
        module="stages.sft",
        round=1,
        fingerprint="4f",
        work=work,
        run_dir=folder,
        settings=settings.model_dump(mode="json"),
        inputs={},
        manifest=draft.model_dump(mode="json", by_alias=True),
    )
    return job, Out(job, rank)


def work(folder: Path, kind: str, steps=STEPS) -> None:
    """What a stage does: rows, as many as it gets to."""
    job, out = make_out(folder, kind)
    out.tracker = tracking.open_tracker(job, out)
    out.rewind(steps[0] - 1)
    for step in steps:
        out.log(
            step, {"loss": 1 / step, "tokens": step * 10, "note": "words", "gone": float("nan")}
        )
    out.tracker.finish()


def killed_and_resumed(folder: Path, kind: str) -> None:
    """Five rows, a kill, and a resume from the checkpoint at step 3."""
    work(folder, kind, range(1, 6))
    work(folder, kind, range(4, 8))


def rows_in_file(folder: Path) -> list[dict]:
    lines = (folder / "sft" / "4f9c2ab71d03" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_tensorboard_holds_every_row_once_over_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed_and_resumed(tmp_path, "tensorboard")
    folder = tmp_path / "tensorboard" / "sft-4f9c2ab71d03"
    events = sorted(folder.glob("events.*"))
    assert len(events) == 2
    found = []
    for path in events:
        read = EventAccumulator(str(path))
        read.Reload()
        found += [(e.step, round(e.value, 6)) for e in read.Scalars("loss")]
        assert read.Tags()["scalars"] == ["loss", "tokens"]
    assert sorted(found) == [(step, round(1 / step, 6)) for step in STEPS]
    # and the file is what it is without a tracker
    assert [row["step"] for row in rows_in_file(tmp_path)] == list(STEPS)


def in_process(folder: Path, code: str, **environment: str) -> str:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from tests.unit.test_tracking import *\nfolder = Path({str(folder)!r})\n{code}",
        ],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
def test_trackio_holds_every_row_once_over_a_resume(tmp_path):
    pytest.importorskip("trackio")
    code = """
killed_and_resumed(folder, "trackio")
from trackio.sqlite_storage import SQLiteStorage
[run] = SQLiteStorage.get_run_records("mine")
rows = SQLiteStorage.get_logs("mine", run["name"])
print(json.dumps([[row["step"], row["loss"]] for row in rows]))
"""
    found = json.loads(
        in_process(tmp_path, code, TRACKIO_DIR=str(tmp_path / "db")).splitlines()[-1]
    )
    assert sorted(map(tuple, found)) == [(step, 1 / step) for step in STEPS]


@pytest.mark.slow
def test_wandb_takes_the_rows_offline(tmp_path):
    pytest.importorskip("wandb")
    in_process(tmp_path, 'killed_and_resumed(folder, "wandb")', WANDB_MODE="offline")
    stored = b"".join(p.read_bytes() for p in sorted((tmp_path / "wandb").rglob("*.wandb")))
    found = [float(value) for value in re.findall(rb"\x12\x04loss\x82\x01.([0-9.]+)", stored)]
    # of each step a row of the history and one of the summary, in the file of wandb's own format
    assert {round(value, 9) for value in found} == {round(1 / step, 9) for step in STEPS}


@pytest.mark.slow
def test_mlflow_holds_every_row_once_over_a_resume(tmp_path):
    pytest.importorskip("mlflow")
    code = """
killed_and_resumed(folder, "mlflow")
import mlflow
client = mlflow.MlflowClient()
[experiment] = client.search_experiments(filter_string="name = 'mine'")
[run] = client.search_runs([experiment.experiment_id])
print(json.dumps([[m.step, m.value] for m in client.get_metric_history(run.info.run_id, "loss")]))
"""
    store = f"file://{tmp_path / 'store'}"
    found = json.loads(
        in_process(
            tmp_path, code, MLFLOW_TRACKING_URI=store, MLFLOW_ALLOW_FILE_STORE="true"
        ).splitlines()[-1]
    )
    assert sorted(map(tuple, found)) == [(step, 1 / step) for step in STEPS]


def run(settings, inputs, out):
    """A stage of seven rows, for the worker."""
    assert (out.tracker is None) == (out.rank > 0)
    for step in STEPS:
        out.log(step, {"loss": 1 / step})
    (out.artifact / "made.json").write_text("{}") if out.rank == 0 else None
    return {"loss": 1 / 7}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_worker_gives_a_tracker_to_rank_0_and_ends_it(tmp_path, monkeypatch, rank):
    ended = []
    quiet = Broken()
    quiet.log = lambda values, step: quiet.rows.append(step)
    quiet.finish = lambda: ended.append(True)
    monkeypatch.setitem(tracking._TRACKERS, "tensorboard", lambda *_: quiet)
    job, _ = make_out(tmp_path, "tensorboard")
    job = dataclasses.replace(job, module="tests.unit.test_tracking")
    worker.run_job(job, rank, 2)
    assert quiet.rows == ([] if rank else list(STEPS))
    assert ended == ([] if rank else [True])


class Broken:
    """Breaks at its third row."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict) -> None:
        assert values == {"sft.lr": 1e-3, "sft.extra": '{"a": [1]}', "sft.max_steps": "null"}

    def log(self, values: dict, step: int) -> None:
        if step == 3:
            raise ConnectionError("the server is gone\nand more")
        self.rows.append(step)

    def finish(self) -> None: ...


def test_a_tracker_that_breaks_is_told_once_and_the_rows_stay(tmp_path, monkeypatch, capsys):
    broken = Broken()
    monkeypatch.setitem(tracking._TRACKERS, "tensorboard", lambda *_: broken)
    work(tmp_path, "tensorboard")
    assert broken.rows == [1, 2]
    assert len(rows_in_file(tmp_path)) == len(STEPS)
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert told == [
        "sft: warning: tensorboard gets no more rows (ConnectionError: the server is gone);"
        " training goes on, metrics.jsonl has them"
    ]


def test_a_tracker_that_hangs_does_not_hold_the_line(tmp_path, monkeypatch, capsys):
    never = threading.Event()
    stuck = Broken()
    monkeypatch.setattr(stuck, "start", never.wait)
    monkeypatch.setitem(tracking._TRACKERS, "tensorboard", lambda *_: stuck)
    monkeypatch.setattr(tracking, "_PATIENCE_SECONDS", 0.05)
    work(tmp_path, "tensorboard")
    assert "did not take its last rows" in capsys.readouterr().err
    assert len(rows_in_file(tmp_path)) == len(STEPS)
    never.set()


def test_what_is_not_installed_is_told_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run\.tracker: trackio is not installed") as error:
        trackers.check("trackio")
    assert error.value.hint == "pip install trackio"
    trackers.check("none")


def test_the_command_checks_it_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cli, "check_siblings", lambda: None)
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "configs/tiny.yaml", f"run.dir={tmp_path / 'run'}", "run.tracker=wandb"])
    assert end.value.code == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tracker_is_in_no_fingerprint():
    trees = [
        Settings.model_validate({"run": {"tracker": kind}, "pretrain": {"data": ["demo:stories"]}})
        for kind in ("none", "wandb")
    ]
    steps = [plan(tree)[0] for tree in trees]
    assert len({fingerprint(s, t, {"data": "1"}) for s, t in zip(steps, trees, strict=True)}) == 1
