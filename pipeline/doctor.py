"""What this machine has, and what is missing. torch is asked in a child process."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys

import pipeline
from pipeline import launch, trackers
from pipeline.errors import ConfigError
from pipeline.settings.launch import LaunchSettings

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "safetensors",
    "gguf",
    "gradio",
    "fastapi",
    "sqlalchemy",
    "pyarrow",
    "numpy",
    "scipy",
    "matplotlib",
)
_WIDTH = 256
# text for a child: this package imports no torch
_PROBE = """
import json, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
print(json.dumps({
    "threads": torch.get_num_threads(),
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    "bf16": bool(cuda and torch.cuda.is_bf16_supported()),
    "gloo": dist.is_available() and dist.is_gloo_available(),
    "nccl": dist.is_available() and dist.is_nccl_available(),
}))
"""


def examine() -> tuple[list[str], bool]:
    """The lines to print, and whether everything needed is there."""
    lines = [
        f"prefline {pipeline.__version__} in {launch.HOME}",
        f"python {platform.python_version()} ({sys.executable})",
        f"{platform.platform()}, {os.cpu_count()} cores",
    ]
    healthy = True
    for package in _PACKAGES:
        try:
            lines.append(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {package} MISSING: pip install {package}")
            healthy = False
    found, problem = _ask_torch()
    if found is None:
        return [*lines, f"torch does not work: {problem}"], False
    devices = found["devices"]
    lines.append(f"torch: {found['threads']} threads, gloo {_yes(found['gloo'])}")
    if isinstance(devices, list) and devices:
        lines.append(f"GPUs: {', '.join(map(str, devices))}; bf16 {_yes(found['bf16'])}")
        lines.append(f"  nccl {_yes(found['nccl'])}")
    else:
        lines.append("GPUs: none that torch can use; training runs on the CPU")
        if launch.gpus():
            lines.append("  nvidia-smi sees a GPU, torch does not: install a CUDA build of torch")
            healthy = False
    lines.append(_arithmetic())
    free = shutil.disk_usage(os.getcwd()).free
    lines.append(f"disk: {free / 1e9:.1f} GB free here")
    profiles = sorted(path.stem for path in (launch.configs() / "accelerate").glob("*.yaml"))
    lines.append(f"launch profiles: auto{''.join(f', {name}' for name in profiles)}")
    lines.append(f"trackers: {trackers.found()}")
    return lines, healthy


def _ask_torch() -> tuple[dict[str, object] | None, str]:
    """What torch says of itself, or why it says nothing."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        capture_output=True,
        text=True,
        env=launch.environment(),
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return None, last[0]
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found, ""


def _arithmetic() -> str:
    try:
        speedup = launch.bf16_speedup(_WIDTH, LaunchSettings())
    except ConfigError as error:
        return f"bf16: {error}"
    return f"bf16 trains a model of width {_WIDTH} {speedup:.1f} times as fast as fp32 here"


def _yes(value: object) -> str:
    return "yes" if value else "no"
