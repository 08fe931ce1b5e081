"""prefline evaluate --lm-eval: what it asks the harness for, and what it keeps of its answer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from pipeline import harness
from pipeline.errors import ConfigError, ToolkitError


def test_without_the_harness_the_command_that_installs_it_is_said() -> None:
    if importlib.util.find_spec("lm_eval") is not None:
        harness.check_installed()
        return
    with pytest.raises(ToolkitError, match=r"pip install 'prefline\[lm-eval\]'") as caught:
        harness.check_installed()
    assert caught.value.exit_code == 1


def test_a_task_file_is_named_by_its_task_and_found_in_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("task: my_task\ndataset_path: json\n")
    arguments = harness.command(tmp_path / "model", f"arc_easy, {file}", tmp_path / "out", 5)
    asked = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert asked["--tasks"] == "arc_easy,my_task"
    assert asked["--include_path"] == str(tmp_path)
    assert asked["--limit"] == "5"
    assert asked["--model_args"] == f"pretrained={tmp_path / 'model'},dtype=float32"
    assert "--trust_remote_code" not in arguments


@pytest.mark.parametrize(
    ("tasks", "message"),
    [(" , ", "name one task at least"), ("gone.yaml", "gone.yaml is no task file")],
)
def test_tasks_that_are_none_are_refused(tmp_path: Path, tasks: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        harness.command(tmp_path, tasks, tmp_path, None)


def test_results_are_kept_by_task_and_later_ones_replace_earlier(tmp_path: Path) -> None:
    """As lm-eval 0.4.13 writes them."""

    def results(task: str, accuracy: float) -> Path:
        path = tmp_path / "results.json"
        figures = {"alias": task, "acc,none": accuracy, "acc_stderr,none": 0.05}
        path.write_text(
            json.dumps(
                {
                    "results": {task: {**figures, "sample_len": 40}},
                    "versions": {task: 1.0},
                    "n-samples": {task: {"original": 80, "effective": 40}},
                }
            )
        )
        return path

    kept = tmp_path / harness.FILE
    harness.keep(results("a", 0.5), kept)
    harness.keep(results("b", 0.25), kept)
    harness.keep(results("a", 0.75), kept)
    rows = json.loads(kept.read_text())["rows"]
    assert [(row["task"], row["value"], row["stderr"], row["n"]) for row in rows] == [
        ("b", 0.25, 0.05, 40),
        ("a", 0.75, 0.05, 40),
    ]
    assert harness.lines(kept)[1] == "a  acc  0.7500 +- 0.0500"
