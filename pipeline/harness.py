"""`prefline evaluate RUN --lm-eval TASKS`: any task of the LM Evaluation Harness on a run's policy.

The harness (lm-eval, an optional extra) runs in a child process on the policy's folder and loads no code
with the model. Its figures go beside the evaluation that they belong to, in `lm_eval.json`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import launch, runner
from pipeline.errors import ConfigError, StageError, ToolkitError
from pipeline.files import write_atomic
from pipeline.worker import die_with_parent
from pipeline.workspace import Run

FILE = "lm_eval.json"
_TASK_NAME = re.compile(r"^task:\s*[\"']?([\w.-]+)", re.MULTILINE)


def check_installed() -> None:
    """Refuse before anything runs.

    Raises:
        ToolkitError: with the command that installs it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ToolkitError(
            "--lm-eval: the LM Evaluation Harness is not installed",
            "pip install 'prefline[lm-eval]'     (or: pip install lm-eval)",
        )


def evaluate(run: Run, tasks: str) -> Path:
    """Run the harness on the policy of the last finished evaluation; the file with its figures.

    tasks: names of the harness or paths of its YAML files, with commas between.

    Raises:
        ConfigError: no finished evaluation, or a task file that is none.
        StageError: the harness failed.
    """
    done = [s for s in runner.inspect(run) if s.step.stage.name == "evaluate" and s.word == "done"]
    if not done or done[-1].work is None:
        raise ConfigError("--lm-eval: there is no finished evaluation", "Run evaluate first.")
    policy = done[-1].inputs["policy"].path
    assert policy is not None
    folder = done[-1].work / "lm_eval"
    arguments = command(policy, tasks, folder, run.settings.evaluate.task_items)
    before = set(folder.rglob("*.json")) if folder.exists() else set()
    runner.say(f"lm-eval: {tasks} on {done[-1].inputs['policy'].step}")
    # its own words and bars are for the screen; results go to a file
    code = subprocess.call(
        [sys.executable, "-m", "lm_eval", *arguments],
        env={**launch.environment(), "TOKENIZERS_PARALLELISM": "false"},
        stdout=sys.stderr,
        preexec_fn=die_with_parent,
    )
    found = sorted(set(folder.rglob("*.json")) - before) if folder.exists() else []
    if code != 0 or not found:
        raise StageError(
            f"--lm-eval: the harness ended with exit code {code} and wrote"
            f" {'its results' if found else 'no results'}; its own message stands above",
            "Task names: python -m lm_eval ls tasks. Offline, a task's data must be in the cache.",
        )
    return keep(found[-1], done[-1].work / FILE)


def command(policy: Path, tasks: str, folder: Path, limit: int | None) -> list[str]:
    """Arguments of `python -m lm_eval`.

    Raises:
        ConfigError: a path that is no task file, or task files of several folders.
    """
    names, places = [], set()
    for task in filter(None, (part.strip() for part in tasks.split(","))):
        if not task.endswith((".yaml", ".yml")):
            names.append(task)
            continue
        path = Path(task).expanduser().absolute()
        named = _TASK_NAME.search(path.read_text(encoding="utf-8")) if path.is_file() else None
        if named is None:
            raise ConfigError(
                f"--lm-eval: {task} is no task file of the harness: it does not exist, or has no 'task: NAME'",
                "Task files of prefline itself (scorer: …) go into evaluate.tasks.",
            )
        names.append(named[1])
        places.add(path.parent)
    if not names:
        raise ConfigError("--lm-eval: name one task at least, as --lm-eval arc_easy,hellaswag")
    if len(places) > 1:
        raise ConfigError("--lm-eval: task files must lie in one folder")
    arguments = ["run", "--model", "hf", "--model_args", f"pretrained={policy},dtype=float32"]
    arguments += ["--tasks", ",".join(names), "--batch_size", "8", "--output_path", str(folder)]
    arguments += [part for place in places for part in ("--include_path", str(place))]
    return arguments + (["--limit", str(limit)] if limit else [])


def keep(results: Path, target: Path) -> Path:
    """Add the figures of a results file of the harness to `target`; earlier tasks stay.

    Rows: {task, metric, filter, value, stderr, n, version}.
    """
    said = json.loads(results.read_text(encoding="utf-8"))
    rows = []
    for task, figures in sorted(said.get("results", {}).items()):
        for key, value in sorted(figures.items()):
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            row: dict[str, Any] = {"task": task, "metric": metric, "filter": filtered}
            error = figures.get(f"{metric}_stderr,{filtered}")
            row |= {"value": value, "stderr": error if isinstance(error, int | float) else None}
            row["n"] = said.get("n-samples", {}).get(task, {}).get("effective")
            row["version"] = said.get("versions", {}).get(task)
            rows.append(row)
    again = {row["task"] for row in rows}
    earlier = json.loads(target.read_text(encoding="utf-8"))["rows"] if target.exists() else []
    rows = [row for row in earlier if row["task"] not in again] + rows
    write_atomic(target, json.dumps({"rows": rows}, indent=1) + "\n", durable=False)
    return target


def lines(file: Path) -> list[str]:
    """The figures for the screen."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return [
        f"{row['task']}  {row['metric']}  {row['value']:.4f}"
        + (f" +- {row['stderr']:.4f}" if row["stderr"] is not None else "")
        for row in rows
    ]
