"""A report of a run that went wrong says where, with which figure, and what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import runner, workspace
from pipeline.errors import StageError
from pipeline.report import write_report
from pipeline.report_failures import checkpoints
from tests import fake_line


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose sft step failed, with rows and checkpoints as a real one leaves them."""
    fake_line.install(monkeypatch)
    config = fake_line.write_config(tmp_path)
    monkeypatch.setenv("FAKE_SFT", "fail")
    with workspace.writer(workspace.draft_run(config)) as (run, _), pytest.raises(StageError):
        runner.execute(run)
    (job,) = (run.path / "sft").glob("*/job.json")
    rows: list[dict[str, Any]] = [
        {"step": n, "grad_norm": 0.5 * n, "loss": 1.0 + n, "lr": 0.1, "time": 1.0} for n in range(9)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (job.parent / "metrics.jsonl").write_text(text + '{"step": 9, "lo')
    return Path(run.path)


def test_the_step_the_figure_and_the_advice_are_on_the_page(failed: Path) -> None:
    page = write_report(failed).read_text(encoding="utf-8")
    assert "Where it went wrong: sft" in page
    assert "sft: the loss is NaN at step 2" in page
    assert "Lower sft.lr." in page
    assert "It had no checkpoint yet." in page
    # the last six rows
    table = page[page.index("Where it went wrong") : page.index("It had no checkpoint")]
    assert [f'<tr><td class="n">{n}</td>' in table for n in (2, 3, 8)] == [False, True, True]


def test_checkpoints_count_once_they_are_complete(failed: Path) -> None:
    (work,) = (path.parent for path in (failed / "sft").glob("*/job.json"))
    for name in ("step-00000002", "step-00000010", "tmp-step-00000012", "step-00000012"):
        (work / "checkpoints" / name).mkdir(parents=True)
        if name != "step-00000012":
            (work / "checkpoints" / name / "MANIFEST.json").write_text("{}")
    assert checkpoints(work) == ["step-00000002", "step-00000010"]
    page = write_report(failed).read_text(encoding="utf-8")
    assert "Checkpoints that were completed: step-00000002, step-00000010." in page


def test_once_it_is_done_nothing_is_wrong(failed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_SFT")
    with workspace.writer(workspace.draft_run(failed)) as (run, _):
        runner.execute(run, "sft")
    assert "Where it went wrong" not in write_report(failed).read_text(encoding="utf-8")
