"""The child's side, without and with a process of its own."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import manifest, runner, workspace
from pipeline.errors import StageError
from pipeline.worker import plain
from tests import fake_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The first job of a line, in a file of its own."""
    fake_line.install(monkeypatch)
    config = fake_line.write_config(tmp_path)
    with workspace.writer(workspace.draft_run(config)) as (run, _):
        state = runner.inspect(run)[0]
        job = runner.make_job(run, state)
    job.work.mkdir(parents=True)
    (tmp_path / "job.json").write_text(job.to_json())
    return job


def work(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pipeline.worker", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_one_job_can_be_run_alone_from_its_file(job, tmp_path):
    done = work(tmp_path / "job.json")
    assert done.returncode == 0, done.stderr
    made = manifest.read(job.work)
    assert (made.step, made.world_size, made.fingerprint) == ("tokenizer", 1, job.fingerprint)
    assert made.started <= made.finished
    assert (tmp_path / "job.done").exists()


def test_a_rank_that_is_asked_to_stop_between_two_jobs_says_so(tmp_path):
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    idle = subprocess.Popen(
        [sys.executable, "-m", "pipeline.worker", str(jobs)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "1"},
    )
    while not (jobs / "rank1.pid").exists():
        assert idle.poll() is None
        time.sleep(0.01)
    idle.send_signal(signal.SIGUSR1)
    assert idle.wait(timeout=60) == 75
    # the parent reads it with the job that it gives next, where the others wait for this rank
    assert json.loads((jobs / "000.error1").read_text())["exit_code"] == 75


def test_an_orphan_does_not_begin(job, tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        orphan = work(tmp_path / "job.json", PREFLINE_OWNER=str(stranger.pid))
        stranger.communicate()
    assert orphan.returncode == 130
    assert not (job.work / "manifest.json").exists()
    for ancestor in (os.getpid(), os.getppid()):
        assert work(tmp_path / "job.json", PREFLINE_OWNER=str(ancestor)).returncode == 0


def test_a_failure_is_told_beside_the_job_and_on_the_screen(job, tmp_path):
    done = work(tmp_path / "job.json", FAKE_TOKENIZER="fail")
    assert done.returncode == 1
    assert "error: sft: the loss is NaN at step 2\n       Lower sft.lr." in done.stderr
    assert "Traceback" not in done.stderr
    told = json.loads((tmp_path / "job.error0").read_text())
    assert told["exit_code"] == 1
    assert not (job.work / "manifest.json").exists()


def test_a_second_run_of_a_job_starts_from_an_empty_artifact_folder(job, tmp_path):
    (job.work / "artifact.tmp").mkdir()
    (job.work / "artifact.tmp" / "old.json").write_text("{}")
    assert work(tmp_path / "job.json").returncode == 0
    assert [file.path for file in manifest.read(job.work).files] == ["result.json"]


def test_only_rank_zero_publishes(job, tmp_path):
    done = work(tmp_path / "job.json", RANK="1", WORLD_SIZE="2")
    assert done.returncode == 0
    assert not (job.work / "manifest.json").exists()
    assert not (tmp_path / "job.done").exists()


def test_jobs_of_a_folder_are_done_in_order_until_the_end(job, tmp_path):
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    (jobs / "000.json").write_text(job.to_json())
    (jobs / "end").write_text("")
    assert work(jobs).returncode == 0
    assert sorted(path.name for path in jobs.iterdir()) == [
        "000.done",
        "000.json",
        "end",
        "rank0.pid",
    ]


def test_without_a_job_the_worker_says_how_it_is_used():
    done = work()
    assert done.returncode == 2
    assert "usage: python -m pipeline.worker JOB.json" in done.stderr


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_an_error_of_the_stage(value):
    with pytest.raises(StageError, match="sft: metric loss is"):
        plain({"loss": value}, "sft: metric")


def test_values_become_what_json_holds():
    class Scalar:
        def item(self):
            return 2.5

    given = {"a": Scalar(), "b": (1, True, None), 3: Path("x")}
    assert plain(given, "m") == {"a": 2.5, "b": [1, True, None], "3": "x"}
