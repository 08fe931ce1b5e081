"""How a stage becomes processes: command line, environment, profile, and what this machine has.

One process is plain Python; several are `torch.distributed.run` or `accelerate launch`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError
from pipeline.settings.launch import LaunchSettings
from pipeline.worker import OWNER, die_with_parent

HOME = Path(__file__).resolve().parent.parent


@functools.cache
def gpus() -> tuple[tuple[str, float], ...]:
    """(name, compute capability) of each GPU that nvidia-smi reports and that may be used."""
    tool = shutil.which("nvidia-smi")
    if not tool or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    command = [tool, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if line.strip()]
        return tuple((name.strip(), float(capability)) for name, capability in rows)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


@functools.cache
def bf16_speedup(width: int, settings: LaunchSettings) -> float:
    """How many times faster a model of this width trains in bf16 than in fp32 on this machine.

    A child finds out, because the core imports no torch; it takes some seconds.

    Raises:
        ConfigError: the child ended without an answer.
    """
    done = subprocess.run(
        [sys.executable, "-m", "stages.precision", str(width)],
        capture_output=True,
        text=True,
        env=environment(settings),
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ConfigError(
            f"model.precision: auto could not be decided, because the probe failed: {last[0]}",
            "Set model.precision to fp32 or bf16, or see what `prefline doctor` says.",
        )
    return float(json.loads(done.stdout.strip().splitlines()[-1])["bf16_speedup"])


def environment(settings: LaunchSettings | None = None) -> dict[str, str]:
    """The environment of every child."""
    env = dict(os.environ)
    # the three packages have general names: a child must not pick up those of the current folder
    env["PYTHONSAFEPATH"] = "1"
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOME), env.get("PYTHONPATH")]))
    # a thread that waits for another one spins for a moment and then sleeps: measured on two cores, a
    # run is 10 % faster than with sleeping alone, and two runs at once 2.4 times than with spinning alone
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    env.setdefault("GOMP_SPINCOUNT", "3000")
    env[OWNER] = str(os.getpid())
    env["TOKENIZERS_PARALLELISM"] = "false"
    # bars of libraries between our own lines; the reader of GGUF files asks nobody else
    env["TQDM_DISABLE"] = "1"
    env["GRADIO_ANALYTICS_ENABLED"] = "False"
    env["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if settings and settings.threads:
        env["OMP_NUM_THREADS"] = str(settings.threads)
    if settings and is_several(settings) and not gpus():
        # without it Accelerate looks for an accelerator; `--cpu` would start one process only
        env["ACCELERATE_USE_CPU"] = "true"
    return env


def is_several(settings: LaunchSettings) -> bool:
    """Whether training stages go through a launcher of torch or accelerate."""
    return settings.processes > 1 or settings.profile != "auto"


def num_machines(settings: LaunchSettings) -> int:
    """How many machines share the processes.

    Raises:
        ConfigError: this is none of them, or they cannot have equally many processes.
    """
    count = settings.machines
    if count is None and settings.profile != "auto":
        count = int(profile_values(settings.profile).get("num_machines", 1))
    count = count or 1
    if settings.machine_rank >= count:
        raise ConfigError(
            f"launch.machine_rank {settings.machine_rank}: there are {count} machines, counted from 0"
        )
    if settings.processes % count and (settings.processes > 1 or settings.profile == "auto"):
        raise ConfigError(
            f"launch.processes {settings.processes} cannot be shared equally by {count} machines"
        )
    return count


def command(settings: LaunchSettings, several: bool, folder: Path) -> list[str]:
    """The command line of a worker that takes its jobs from `folder`."""
    worker = ["-m", "pipeline.worker", str(folder)]
    if not several:
        return [sys.executable, *worker]
    machines = num_machines(settings)
    own, address, port = str(settings.machine_rank), settings.main_address, str(settings.main_port)
    if settings.profile == "auto":
        options = ["--nproc_per_node", str(settings.processes // machines)]
        if machines == 1:
            options = ["--standalone", *options]
        else:
            options += ["--nnodes", str(machines), "--node_rank", own]
            options += ["--master_addr", address, "--master_port", port]
        return [sys.executable, "-m", "torch.distributed.run", *options, *worker]
    options = ["--config_file", str(find_profile(settings.profile))]
    if settings.processes > 1:
        options += ["--num_processes", str(settings.processes)]
    if machines > 1:
        options += ["--num_machines", str(machines), "--machine_rank", own]
        options += ["--main_process_ip", address, "--main_process_port", port]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, *worker]


def configs() -> Path:
    """The folder of the configurations that come with prefline."""
    packed = Path(__file__).parent / "_configs"
    return packed if packed.is_dir() else HOME / "configs"


def find_profile(name: str) -> Path:
    """The accelerate configuration that `launch.profile` names."""
    known = sorted(path.stem for path in (configs() / "accelerate").glob("*.yaml"))
    path = Path(name).expanduser()
    if name in known:
        return configs() / "accelerate" / f"{name}.yaml"
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path.resolve()
    raise ConfigError(
        f"launch.profile: there is no profile {name!r}",
        f"Known are auto, {', '.join(known)}; or give the path of an accelerate configuration.",
    )


def profile_values(name: str) -> dict[str, Any]:
    """What a profile says.

    Raises:
        ConfigError: there is no such profile, or it is not YAML with keys.
    """
    path = find_profile(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"launch.profile: {path} is not valid YAML ({first})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"launch.profile: {path} is no accelerate configuration (it has no keys)")
    return values


def check_profile(name: str) -> None:
    """Before anything is started: accelerate would only say that DeepSpeed is not installed, and copy whole
    models where it cannot shard.

    Raises:
        ConfigError: the profile is one of DeepSpeed's, or shards and there is no GPU.
    """
    kind = "" if name == "auto" else str(profile_values(name).get("distributed_type", "")).upper()
    if kind == "FSDP" and not gpus():
        raise ConfigError(
            f"launch.profile {name}: accelerate shards models on GPUs only, and this machine has none;"
            " it would copy the whole model to each process and say nothing",
            "Set launch.profile to auto.",
        )
    if kind == "DEEPSPEED":
        raise ConfigError(
            f"launch.profile {name}: DeepSpeed would take over the optimisers and train weights that are"
            " bf16 themselves, so that numbers and artifacts would be others",
            "launch.profile=fsdp2 shards the same things; see docs/several-processes.md.",
        )


def call(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module` on the user's terminal, and wait for it; its exit code."""
    child = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=environment(),
        preexec_fn=die_with_parent,
    )
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            # the terminal gave the child its Ctrl-C too; it decides how to end
            continue
