"""configs/accelerate: what accelerate itself makes of each file, and what our stages say to that."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from pipeline import cli, launch, runner, workspace
from pipeline.errors import ConfigError
from pipeline.settings.launch import LaunchSettings
from stages import sharding
from tests import fake_line

FILES = sorted((launch.configs() / "accelerate").glob("*.yaml"))
# kind, machines, processes over all of them
PLANS = {
    "single_gpu_bf16": ("NO", 1, 1),
    "ddp": ("MULTI_GPU", 1, 2),
    "fsdp2": ("FSDP", 1, 2),
    "zero2": ("DEEPSPEED", 1, 2),
    "zero3": ("DEEPSPEED", 1, 2),
    "two_nodes": ("MULTI_GPU", 2, 16),
}


def parsed(words: list[str]) -> Any:
    """What `accelerate launch` makes of our command line."""
    at = words.index("accelerate.commands.launch")
    arguments = launch_command_parser().parse_args(words[at + 1 :])
    return _validate_launch_command(arguments)[0]


def command(tmp_path, **settings):
    return launch.command(LaunchSettings(**settings), True, tmp_path)


def kind_of(arguments: Any) -> str:
    on = {
        "FSDP": arguments.use_fsdp,
        "DEEPSPEED": arguments.use_deepspeed,
        "MULTI_GPU": arguments.multi_gpu,
    }
    return next((kind for kind, is_on in on.items() if is_on), "NO")


def test_every_file_is_known():
    assert {path.stem for path in FILES} == PLANS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_plans_what_the_name_says(path, tmp_path):
    arguments = parsed(command(tmp_path, profile=path.stem))
    plan = (kind_of(arguments), arguments.num_machines, arguments.num_processes)
    print(f"{path.stem}: {plan[0]}, machines {plan[1]}, processes {plan[2]}")
    assert plan == PLANS[path.stem]
    assert arguments.training_script_args[-1] == str(tmp_path), "the worker gets its folder"


def test_the_number_of_processes_is_ours(tmp_path):
    assert parsed(command(tmp_path, profile="fsdp2", processes=6)).num_processes == 6


def test_the_second_of_two_machines(tmp_path):
    place = {"machine_rank": 1, "main_address": "10.1.2.3", "main_port": 4444}
    arguments = parsed(command(tmp_path, profile="two_nodes", **place))
    prepare_multi_gpu_env(arguments)
    assert (arguments.nproc_per_node, arguments.nnodes, int(arguments.node_rank)) == ("8", "2", 1)
    assert arguments.rdzv_endpoint == "10.1.2.3:4444"


def plugin_of(monkeypatch, tmp_path, profile="fsdp2", **changes):
    """The plugin that accelerate makes in a worker of the profile."""
    env = prepare_multi_gpu_env(parsed(command(tmp_path, profile=profile)))
    for name in [name for name in os.environ if name.startswith("FSDP_")]:
        monkeypatch.delenv(name)
    for name, value in {**env, **changes}.items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    return FullyShardedDataParallelPlugin()


def accelerator_of(plugin, kind=DistributedType.FSDP):
    return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(fsdp_plugin=plugin))


def test_fsdp2_shards_as_the_stages_need_it(monkeypatch, tmp_path):
    plugin = plugin_of(monkeypatch, tmp_path)
    assert plugin.fsdp_version == 2
    assert sharding.asked()
    for stage in ("pretrain", "sft", "sample", "reward", "ppo", "evaluate"):
        sharding.check(accelerator_of(plugin), stage)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: true"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing: true"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward: false"),
    ],
)
def test_what_would_be_ignored_is_refused(monkeypatch, tmp_path, name, value, says):
    plugin = plugin_of(monkeypatch, tmp_path, **{name: value})
    with pytest.raises(ConfigError, match=says):
        sharding.check(accelerator_of(plugin), "ppo")


def test_the_first_version_of_fsdp_is_refused(monkeypatch, tmp_path):
    changes = {"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}
    changes |= {"FSDP_SYNC_MODULE_STATES": "false"}
    plugin = plugin_of(monkeypatch, tmp_path, **changes)
    with pytest.raises(ConfigError, match="version 1 of FSDP"):
        sharding.check(accelerator_of(plugin), "ppo")


@pytest.mark.parametrize("stage", ["dpo", "kto", "grpo", "rloo"])
def test_a_stage_that_cannot_shard_says_so(monkeypatch, tmp_path, stage):
    with pytest.raises(ConfigError, match=f"{stage} cannot shard its models"):
        sharding.check(accelerator_of(plugin_of(monkeypatch, tmp_path)), stage)


def test_shards_that_accelerate_forgot_are_missed(monkeypatch, tmp_path):
    """On a CPU it copies the whole model to each process and says nothing."""
    plugin = plugin_of(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match="FSDP, which accelerate does on GPUs only"):
        sharding.check(accelerator_of(plugin, DistributedType.MULTI_CPU), "ppo")


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_is_refused_before_it_is_looked_for(name, tmp_path, monkeypatch):
    fake_line.install(monkeypatch)
    draft = workspace.draft_run(fake_line.write_config(tmp_path), [f"launch.profile={name}"])
    with (
        workspace.writer(draft) as (run, _),
        pytest.raises(ConfigError, match=r"DeepSpeed would take over[\s\S]*fsdp2"),
    ):
        runner.execute(run)


@pytest.mark.skipif(bool(launch.gpus()), reason="this machine has a GPU")
@pytest.mark.parametrize("processes", [1, 2])
def test_shards_without_a_gpu_are_refused_before_anything_is_made(
    processes, tmp_path, capsys, monkeypatch
):
    fake_line.install(monkeypatch)
    config = fake_line.write_config(tmp_path)
    options = ["launch.profile=fsdp2", f"launch.processes={processes}"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(config), *options])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "launch.profile fsdp2: accelerate shards models on GPUs only" in said
    assert "Set launch.profile to auto." in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- a", "no accelerate configuration")]
)
def test_a_profile_that_is_none_is_told(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"mine.yaml is {message}"):
        command(tmp_path, profile=str(path))


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_shards_by_its_stage(monkeypatch, tmp_path, stage):
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", raising=False)
    arguments = parsed(command(tmp_path, profile=f"zero{stage}"))
    # the names of what the file sets; `launch_command` puts them there
    arguments.deepspeed_fields_from_accelerate_config = "zero_stage"
    env = prepare_deepspeed_cmd_env(arguments)[1]
    assert env["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
