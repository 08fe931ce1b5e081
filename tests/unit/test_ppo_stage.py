"""The loop of ppo around its arithmetic: what a stop and a start leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from pipeline.job import Job, Out
from stages import ppo
from stages.alarms import Alarms
from stages.checkpoints import Checkpointer
from stages.common import adamw
from stages.keeping import Keeper


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A loop that has measured its start and has no update to do."""

    def validate(self: Any, update: int) -> dict[str, float]:
        self.keeper.offer(update, {"validation_reward": 1.0})
        return {"validation_score": 1.0}

    monkeypatch.setattr(ppo._Loop, "_validate", validate)
    (tmp_path / "checkpoints").mkdir()
    found: Any = object.__new__(ppo._Loop)
    found.out = Out(Job("ppo", "ppo", "stages.ppo", 1, "f" * 64, tmp_path, tmp_path, {}, {}, {}))
    found.checkpoints = Checkpointer(found.out, 2)
    found.policy_parameters = dict(nn.Linear(2, 2).named_parameters())
    found.value_parameters = dict(nn.Linear(2, 1).named_parameters())
    found.policy_optimizer = adamw(found.policy_parameters.values(), 1e-3, 0.0)
    found.value_optimizer = adamw(found.value_parameters.values(), 1e-3, 0.0)
    found.models = SimpleNamespace(engine=SimpleNamespace(update=lambda policy: None), gold=None)
    found.agent = SimpleNamespace(policy=None)
    found.accelerator = SimpleNamespace(device="cpu")
    found.ppo = SimpleNamespace(updates=0)
    found.alarms = Alarms("ppo", 12.0, 0.04)
    found.keeper = Keeper(found.policy_parameters, "best_reward", 0)
    found.update, found.kl_coef, found.baseline = 0, 0.1, None
    return found


@pytest.mark.parametrize("saved", [False, True])
def test_the_start_is_measured_once_however_often_the_first_update_is_stopped(
    loop: Any, saved: bool
) -> None:
    loop.run()
    if saved:
        loop._save()
    loop.run()
    rows = [json.loads(row) for row in (loop.out.work / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0]
