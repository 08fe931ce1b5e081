"""Peers that are no dependency of ours: installed when a benchmark runs, seen by its process only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_CACHE = Path(__file__).resolve().parents[2] / ".venv" / "peers"
_RESTARTED = "PREFLINE_BENCHMARK_PEER"


def installed(requirement: str) -> Path:
    """A folder that holds `requirement` (such as trl==1.12.0) and none of its dependencies."""
    folder = _CACHE / requirement.replace("==", "-")
    if not folder.is_dir():
        # renamed when whole: an interrupted download is not taken for an installation
        half = folder.with_name(f"{folder.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--target", str(half), requirement]
        try:
            subprocess.run(command, check=True, stdout=sys.stderr)
            half.rename(folder)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return folder


def restart_with(requirement: str) -> None:
    """Begin this benchmark anew in a process that imports `requirement` before what is installed.

    Returns at once in that process; call it first, before anything of the peer is imported.
    """
    if os.environ.get(_RESTARTED) == requirement:
        return
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "run a benchmark as a module: python -m tests.benchmarks.NAME"
    path = os.pathsep.join(
        filter(None, [str(installed(requirement)), os.environ.get("PYTHONPATH")])
    )
    done = subprocess.run(
        [sys.executable, "-m", spec.name, *sys.argv[1:]],
        env=os.environ | {"PYTHONPATH": path, _RESTARTED: requirement},
        check=False,
    )
    sys.exit(done.returncode)
