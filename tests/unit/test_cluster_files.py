"""configs/cluster: the SLURM script does what it says with SLURM's tools as they answer; SkyPilot's keys.

There is no SLURM here: srun, scancel and scontrol are scripts that note how they were called.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from pipeline.launch import configs
from pipeline.settings.launch import LaunchSettings

SBATCH = configs() / "cluster" / "prefline.sbatch"
SKYPILOT = configs() / "cluster" / "skypilot.yaml"


@pytest.mark.parametrize(
    "text",
    [SBATCH.read_text(), *(yaml.safe_load(SKYPILOT.read_text())[key] for key in ("setup", "run"))],
)
def test_the_shell_can_read_it(text):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def settings_of(text: str) -> set[str]:
    return {
        word.split("=")[0].removeprefix("launch.") for word in text.split() if "launch." in word
    }


@pytest.mark.parametrize("text", [SBATCH.read_text(), SKYPILOT.read_text()])
def test_only_settings_that_exist_are_given(text):
    given = settings_of(text)
    assert {"machines", "machine_rank", "main_address", "processes", "profile"} <= given
    assert given <= LaunchSettings.model_fields.keys()


# ---- SLURM ---------------------------------------------------------------------------------


def start(folder: Path, srun: str, *arguments: str) -> subprocess.Popen[str]:
    """The script in a job of two nodes with four GPUs each; `srun` is what srun does."""
    tools = {
        "srun": f"echo srun >> {folder}/calls\n{srun}",
        "scontrol": f'[ "$1" = show ] && printf "n1\\nn2\\n" || echo "scontrol $*" >> {folder}/calls',
        # the step gets the signal, as from SLURM
        "scancel": f'echo "scancel $*" >> {folder}/calls\nkill -USR1 $(cat {folder}/step)',
        "prefline": f'echo "prefline $*" >> {folder}/calls',
    }
    for name, text in tools.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    job = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_PROCID": "1",
    }
    return subprocess.Popen(["bash", str(SBATCH), *arguments], env=job, text=True)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_each_node_runs_the_command_with_its_own_rank(tmp_path):
    shift = 'while [ "$1" != bash ]; do shift; done; exec "$@"'
    assert start(tmp_path, shift, "my line.yaml", "ppo.updates=3").wait(timeout=60) == 0
    said = calls(tmp_path)[-1]
    assert said.startswith("prefline run my line.yaml ppo.updates=3 ")
    assert "launch.processes=8 launch.machines=2" in said
    assert "launch.machine_rank=1 launch.main_address=n1 launch.main_port=20077" in said


def test_a_job_that_is_preempted_saves_and_goes_back_into_the_queue(tmp_path):
    # a step that ends with 75 on a signal, and not before
    step = f"trap 'exit 75' USR1\necho $$ > {tmp_path}/step.new\nmv {tmp_path}/step.new {tmp_path}/step\n"
    job = start(tmp_path, step + "while true; do sleep 0.05; done", "a.yaml")
    while not (tmp_path / "step").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 75
    assert calls(tmp_path)[1:] == ["scancel --signal=USR1 77.0", "scontrol requeue 77"]


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_any_other_end_is_the_end_of_the_job(tmp_path, code):
    assert start(tmp_path, f"exit {code}", "a.yaml").wait(timeout=60) == code
    assert len(calls(tmp_path)) == 1, "no requeue"


def test_without_a_configuration_it_says_how_it_is_called(tmp_path):
    assert start(tmp_path, "exit 9").wait(timeout=60) == 2


def test_the_signal_comes_early_enough_for_the_grace():
    text = SBATCH.read_text()
    signalled = int(text.split("--signal=B:USR1@")[1].split()[0])
    assert signalled > int(text.split("launch.grace_seconds=")[1].split("'")[0])


# ---- SkyPilot ------------------------------------------------------------------------------

# of sky/utils/schemas.py in skypilot 0.14.1, as far as the file uses it; validated in full once, when
# it was written: the package is too heavy to be installed for this
TASK = {"name", "num_nodes", "resources", "workdir", "volumes", "envs", "setup", "run"}
RESOURCES = {"accelerators", "use_spot", "job_recovery"}
RECOVERY = {"strategy", "recover_on_exit_codes"}
VARIABLES = {"NODE_IPS", "NODE_RANK", "NUM_NODES", "NUM_GPUS_PER_NODE"}


def test_skypilot_knows_the_keys_and_the_variables():
    task = yaml.safe_load(SKYPILOT.read_text())
    assert task.keys() <= TASK
    assert task["resources"].keys() <= RESOURCES
    assert task["resources"]["job_recovery"].keys() <= RECOVERY
    used = {part.split('"')[0] for part in task["run"].split("SKYPILOT_")[1:]}
    assert {name.strip("$) \\\n*").split()[0].rstrip(")") for name in used} <= VARIABLES


def test_skypilot_starts_again_what_was_stopped():
    recovery = yaml.safe_load(SKYPILOT.read_text())["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [75]


def test_skypilots_own_parser():
    sky = pytest.importorskip("sky", reason="skypilot is not installed")
    assert sky.Task.from_yaml(str(SKYPILOT)).num_nodes == 2
