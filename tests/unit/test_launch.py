"""How children are started."""

import sys

import pytest

from pipeline import launch
from pipeline.errors import ConfigError
from pipeline.settings.launch import LaunchSettings


def command(tmp_path, **settings):
    given = LaunchSettings(**settings)
    return launch.command(given, launch.is_several(given), tmp_path)


def test_one_process_is_plain_python(tmp_path):
    assert command(tmp_path) == [sys.executable, "-m", "pipeline.worker", str(tmp_path)]


def test_several_processes_go_through_the_launcher_of_torch(tmp_path):
    words = command(tmp_path, processes=2)
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc_per_node 2 -m pipeline.worker" in " ".join(words)


def test_a_profile_goes_through_accelerate(tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text("distributed_type: MULTI_GPU\n")
    words = " ".join(command(tmp_path, processes=4, profile=str(profile)))
    assert f"accelerate.commands.launch --config_file {profile} --num_processes 4 -m" in words


def test_an_unknown_profile_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"launch.profile: there is no profile 'nope'"):
        command(tmp_path, profile="nope")


def test_children_do_not_import_from_the_current_folder(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    env = launch.environment(LaunchSettings(threads=3))
    assert env["PYTHONSAFEPATH"] == "1"
    assert env["PYTHONPATH"] == f"{launch.HOME}:/elsewhere"
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["TOKENIZERS_PARALLELISM"] == "false"


def test_several_processes_without_a_gpu_are_told_to_use_the_cpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(launch, "gpus", lambda: ())
    assert launch.environment(LaunchSettings(processes=2))["ACCELERATE_USE_CPU"] == "true"
    assert "ACCELERATE_USE_CPU" not in launch.environment(LaunchSettings())
    monkeypatch.setattr(launch, "gpus", lambda: (("H100", 9.0),))
    assert "ACCELERATE_USE_CPU" not in launch.environment(LaunchSettings(processes=2))


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    launch.gpus.cache_clear()
    assert launch.gpus() == (("NVIDIA H100 80GB HBM3", 9.0),)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch.gpus.cache_clear()
    assert launch.gpus() == ()
    launch.gpus.cache_clear()


@pytest.mark.slow
def test_the_probe_of_bf16_answers_with_a_ratio_of_times():
    launch.bf16_speedup.cache_clear()
    assert 0.01 < launch.bf16_speedup(32, LaunchSettings(threads=1)) < 100


def test_a_probe_that_fails_says_what_to_set(monkeypatch):
    launch.bf16_speedup.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match=r"model.precision: auto could not be decided"):
        launch.bf16_speedup(32, LaunchSettings())
