"""A line of real stages that takes half a minute, and copies of it in which one step is to be done again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.metric_rows import timeless_rows

Fault = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
HOOK = Path(__file__).parent / "hook"
STEPS = ["tokenizer", "pretrain", "sft", "sample", "rank", "reward", "ppo", "evaluate"]
SMALLER = [
    "launch.threads=1",
    "tokenizer.max_documents=300",
    "pretrain.max_documents=300",
    "pretrain.steps=24",
    "pretrain.eval_every_steps=8",
    "pretrain.checkpoint_every_steps=6",
    "sft.max_examples=120",
    "sft.checkpoint_every_steps=3",
    "sample.max_prompts=24",
    "reward.checkpoint_every_steps=1",
    "reward.epochs=2",
    "ppo.updates=6",
    "ppo.eval_every_updates=2",
    "ppo.checkpoint_every_updates=1",
    "evaluate.max_prompts=16",
    "evaluate.max_documents=10",
]


@dataclass(frozen=True)
class Ended:
    """How a command ended. said: its stderr."""

    code: int
    said: str


def start(*words: Any, at_call: Sequence[Fault] = ()) -> subprocess.Popen[str]:
    """`prefline words`; at_call: see hook/at_call.py."""
    extra = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if at_call:
        extra["PREFLINE_AT_CALL"] = json.dumps([{"rank": 0, **fault} for fault in at_call])
        extra["PYTHONPATH"] = f"{HOOK}{os.pathsep}{ROOT}"
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *map(str, words)],
        cwd=ROOT,
        env=os.environ | extra,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def prefline(*words: Any, at_call: Sequence[Fault] = (), timeout: float = 900) -> Ended:
    """The same, to its end. A traceback for the user is always wrong."""
    process = start(*words, at_call=at_call)
    try:
        _, said = process.communicate(timeout=timeout)
    finally:
        process.kill()
    # a launcher of torch tells its own story before; what is said to people has none
    last = max(0, *(said.rfind(f"\n{word}: ") for word in ("error", "stopped")))
    assert "\nTraceback" not in said[last:], said
    assert said.count("fault: ") == len(at_call), f"a fault never came:\n{said}"
    return Ended(process.returncode, said)


def make(run: Path, *options: str) -> Path:
    """A whole line."""
    ended = prefline("run", "configs/tiny.yaml", f"run.dir={run}", *SMALLER, *options)
    assert ended.code == 0, ended.said
    return run


def copy_before(reference: Path, run: Path, step: str) -> Path:
    """A copy in which `step` and all behind it were never made."""
    shutil.copytree(reference, run)
    for name in STEPS[STEPS.index(step) :]:
        shutil.rmtree(run / name)
    return run


def work_of(run: Path, step: str) -> Path:
    found = [path.parent for path in (run / step).glob("*/job.json")]
    assert len(found) == 1, found
    return found[0]


def result_of(run: Path, step: str) -> dict[str, Any]:
    """What two runs must agree on: the digest of a step and its rows."""
    work = work_of(run, step)
    rows = work / "metrics.jsonl"
    return {
        "digest": json.loads((work / "manifest.json").read_text())["digest"],
        "rows": timeless_rows(rows) if rows.exists() else [],
    }
