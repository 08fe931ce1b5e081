"""A clock that is set back an hour and then a day forward while a line runs: it is told apart from the work."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path

import pytest

from tests.faults.small_line import STEPS, copy_before, prefline, result_of, work_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]


def test_a_clock_that_jumps_changes_nothing(small_run: Path, tmp_path: Path) -> None:
    run = copy_before(small_run, tmp_path / "run", "tokenizer")
    back = {"do": "clock", "seconds": -3600, "where": "stages.pretrain:Loop._evaluate", "call": 1}
    stop = {"do": "signal", "number": signal.SIGTERM, "to": "parent"}
    saved = {"where": "stages.checkpoints:Checkpointer._write", "call": 3}
    ended = prefline("run", run, at_call=[back, {**stop, **saved}])
    assert ended.code == 75, ended.said
    forward = {"do": "clock", "seconds": 86400, "where": "stages.ppo:_Loop._validate", "call": 2}
    # a day behind, then a day ahead: checkpoints are ordered by step, not by time
    yesterday = {"do": "clock", "seconds": -86400, "where": "stages.pretrain:Loop.start", "call": 1}
    ended = prefline("run", run, at_call=[yesterday, forward])
    assert ended.code == 0, ended.said
    assert "pretrain: continuing from step-00000018" in ended.said
    for step in STEPS:
        assert result_of(run, step) == result_of(small_run, step), step
        made = json.loads((work_of(run, step) / "manifest.json").read_text())
        assert 0 <= made["seconds"] < 3600, step
        assert all(value >= 0 for key, value in made["cost"].items() if "seconds" in key), step
    times = [json.loads(line)["time"] for line in rows(run, "pretrain")]
    assert min(b - a for a, b in itertools.pairwise(times)) < -3000
    speeds = [json.loads(line)["tokens_per_second"] for line in rows(run, "pretrain")]
    assert min(speeds) > 0
    for command in ("verify", "status", "lineage", "report"):
        assert prefline(command, run).code == 0, command


def rows(run: Path, step: str) -> list[str]:
    return (work_of(run, step) / "metrics.jsonl").read_text().splitlines()
