"""Several machines: the command line of each, and what a machine that only lends its processes does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import launch, worker
from pipeline.errors import ConfigError
from pipeline.settings.launch import LaunchSettings


def command(tmp_path: Path, **settings: object) -> str:
    given = LaunchSettings.model_validate(settings)
    return " ".join(launch.command(given, True, tmp_path))


def test_machines_meet_at_the_address_of_the_first(tmp_path):
    words = command(tmp_path, processes=6, machines=3, machine_rank=2, main_address="head")
    assert "torch.distributed.run --nproc_per_node 2 --nnodes 3 --node_rank 2" in words
    assert "--master_addr head --master_port 29500" in words
    assert "--standalone" not in words


def test_one_machine_needs_no_address(tmp_path):
    assert "--standalone --nproc_per_node 2" in command(tmp_path, processes=2)


def test_a_profile_says_how_many_machines_there_are(tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text("distributed_type: MULTI_GPU\nnum_machines: 2\n")
    own = {"profile": str(profile), "processes": 4}
    words = command(tmp_path, **own, machine_rank=1, main_address="head", main_port=7)
    assert "--num_machines 2 --machine_rank 1 --main_process_ip head --main_process_port 7" in words
    assert "--num_machines 4 --machine_rank 0" in command(tmp_path, **own, machines=4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"processes": 4, "machine_rank": 1}, "machine_rank 1: there are 1 machines"),
        ({"processes": 4, "machines": 2, "machine_rank": 2}, "machine_rank 2: there are 2"),
        ({"processes": 3, "machines": 2}, "processes 3 cannot be shared equally by 2 machines"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        command(tmp_path, **settings)


def test_ranks_of_other_machines_get_no_signal_from_here():
    """Their numbers belong to other processes on this machine."""
    assert worker.pid_file(0, 3) == "rank3.pid"
    assert not Path(worker.pid_file(1, 3)).match(worker.pid_file(0, "*"))
    assert Path(worker.pid_file(1, 3)).match(worker.pid_file(1, "*"))
    assert not Path(worker.pid_file(11, 3)).match(worker.pid_file(1, "*"))


def start_rank(folder: Path) -> subprocess.Popen:  # type: ignore[type-arg]
    place = {"RANK": "2", "WORLD_SIZE": "4", "GROUP_RANK": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.worker", str(folder)],
        env={**os.environ, "PYTHONPATH": str(launch.HOME), **place},
    )


def wait_for(path: Path, rank: subprocess.Popen) -> None:  # type: ignore[type-arg]
    while not path.exists():
        assert rank.poll() is None
        os.sched_yield()


def test_a_rank_of_another_machine_ends_when_the_first_machine_takes_the_jobs_away(tmp_path):
    folder = tmp_path / "jobs"
    folder.mkdir()
    rank = start_rank(folder)
    wait_for(folder / "machine1-rank2.pid", rank)
    (folder / "machine1-rank2.pid").unlink()
    folder.rmdir()
    assert rank.wait(timeout=60) == 0


def test_a_rank_of_another_machine_obeys_a_signal(tmp_path):
    rank = start_rank(tmp_path)
    wait_for(tmp_path / "machine1-rank2.pid", rank)
    os.kill(int((tmp_path / "machine1-rank2.pid").read_text()), signal.SIGUSR1)
    assert rank.wait(timeout=60) == 75


def test_a_machine_without_others_has_nobody_to_lend_to(tmp_path):
    config = tmp_path / "line.yaml"
    config.write_text("run: {name: x}\nmodel: {base: hub/name}\n")
    answer = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", str(config), "launch.machine_rank=1"],
        env={**os.environ, "PYTHONPATH": str(launch.HOME)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2, answer.stderr
    assert "launch.machine_rank" in answer.stderr
