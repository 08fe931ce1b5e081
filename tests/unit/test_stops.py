"""Training that goes wrong stops at that step, names it, and leaves a checkpoint that can be loaded."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import StageError
from pipeline.job import Job, Out
from pipeline.settings import Settings
from stages.checkpoints import Checkpointer
from stages.stops import check_finite, check_weights, distinct_responses, last_checkpoint
from tests import tiny_ppo
from tests.dist.small_jobs import make_base, make_job


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("stops") / "base")


def fail(job: Job) -> tuple[str, str, Out]:
    """What a stage that must stop says, and where it worked."""
    out = Out(job)
    out.artifact.mkdir(parents=True, exist_ok=True)
    out.checkpoints.mkdir(exist_ok=True)
    with pytest.raises(StageError) as caught:
        importlib.import_module(job.module).run(
            Settings.model_validate(job.settings), job.inputs, out
        )
    assert caught.value.exit_code == 1
    return caught.value.message, caught.value.hint or "", out


def ppo_job(folder: Path, **own: Any) -> Job:
    (folder / "inputs").mkdir()
    inputs = tiny_ppo.make_inputs(folder / "inputs", "llama")
    return tiny_ppo.make_job(folder / "work", inputs, **{"updates": 9, **own})


def blow_up(monkeypatch: pytest.MonkeyPatch, module: str, schedule: str, at: int) -> None:
    """From its step `at` on (0-based) a stage's schedule asks for an absurd learning rate."""
    place = importlib.import_module(module)
    healthy = getattr(place, schedule)

    def absurd(step: int, *rest: Any) -> float:
        return 1e30 if step >= at else float(healthy(step, *rest))

    monkeypatch.setattr(place, schedule, absurd)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_weights_that_burst_at_once_leave_no_good_checkpoint(
    stage: str, base: Path, tmp_path: Path
) -> None:
    own: dict[str, Any] = {"lr": 1e30, "checkpoint_every_steps": 1, "warmup_fraction": 0.0}
    message, hint, out = fail(make_job(stage, tmp_path / "work", base, **own))
    # that of step 1 is whole, and holds what gave the NaN
    assert re.fullmatch(
        rf"{stage}: (loss|grad_norm) is nan at step 2; training was stopped. There is no good checkpoint\.",
        message,
    )
    assert f"Lower {stage}.lr" in hint
    assert last_checkpoint(out, 2) in ("step-00000001", "checkpoint-1")


@pytest.mark.parametrize(
    ("stage", "module"), [("pretrain", "stages.pretrain"), ("reward", "stages.reward_training")]
)
def test_weights_that_burst_later_leave_the_checkpoint_before(
    stage: str, module: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blow_up(monkeypatch, module, "warmup_cosine", at=1)
    message, _, out = fail(make_job(stage, tmp_path / "work", base, checkpoint_every_steps=1))
    assert re.fullmatch(
        rf"{stage}: (loss|grad_norm) is nan at step 3; training was stopped\."
        " The last good checkpoint is step-00000001.",
        message,
    )
    # the next start finds the newest whole one, here the one with the burst weights, and says so again
    found = Checkpointer(out, 2).load_latest()
    assert found is not None
    assert found.step == 2


def test_ppo_that_bursts_names_the_update_and_the_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an update has four optimiser steps of both models: this is within the third
    blow_up(monkeypatch, "stages.ppo", "warmup_linear", at=10)
    message, _, _ = fail(ppo_job(tmp_path))
    assert message == (
        "ppo: value_loss is nan at step 3; training was stopped."
        " The last good checkpoint is step-00000001."
    )


def test_ppo_that_leaves_the_reference_stops_and_can_go_on_with_a_higher_limit(
    tmp_path: Path,
) -> None:
    job = ppo_job(tmp_path, lr=3.0, max_kl=30.0)
    message, hint, out = fail(job)
    assert re.fullmatch(
        r"ppo: kl is \d\d\.\d nats a response \(over ppo.max_kl 30\) at step 2; training was stopped."
        " There is no good checkpoint.",
        message,
    )
    assert "raise ppo.max_kl" in hint
    # the row that shows it is in the curves
    assert tiny_ppo.rows_of(out.work)[-1]["kl"] > 30
    tiny_ppo.run_ppo(tiny_ppo.make_job(out.work, job.inputs, updates=9, lr=3.0, max_kl=None))
    # nothing was trained twice, and the row of the stop was taken back before it came again
    steps = [row["step"] for row in tiny_ppo.rows_of(out.work)]
    assert steps == list(range(10))


def test_ppo_whose_responses_are_all_the_same_stops(tmp_path: Path) -> None:
    own = {"lr": 3.0, "max_kl": None, "updates": 40, "prompts_per_step": 8}
    message, hint, out = fail(ppo_job(tmp_path, **own, checkpoint_every_updates=2))
    assert message == (
        "ppo: distinct_responses is 0 (under ppo.min_distinct 0.1 for 3 updates) at step 8;"
        " training was stopped. The last good checkpoint is step-00000004."
    )
    assert "The policy has collapsed" in hint
    found = Checkpointer(out, 2).load_latest()
    assert found is not None
    check_weights(out, found.step, {**found.tensors["policy"], **found.tensors["best"]})


def test_what_differs_is_counted_where_there_is_enough_of_it() -> None:
    assert distinct_responses([[1, 2]] * 8) == 0
    assert distinct_responses([[n] for n in range(8)]) == 1
    assert distinct_responses([[1], [1], [1], [2], [3]]) == 0.5
    assert distinct_responses([[1], [1], [1]]) == 1


def test_a_checkpoint_never_takes_in_what_is_not_finite(base: Path, tmp_path: Path) -> None:
    out = Out(make_job("pretrain", tmp_path / "work", base))
    out.checkpoints.mkdir()
    checkpoints = Checkpointer(out, 2)
    checkpoints.save(3, {"model": {"weight": torch.ones(2)}}, {})
    with pytest.raises(
        StageError, match=r"model weight holds .* at step 5.*checkpoint is step-00000003"
    ):
        checkpoints.save(5, {"model": {"weight": torch.tensor([1.0, math.nan])}}, {})
    found = checkpoints.load_latest()
    assert found is not None
    assert found.step == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_named(value: float, base: Path, tmp_path: Path) -> None:
    out = Out(make_job("sft", tmp_path / "work", base))
    check_finite(out, 7, loss=1.0, steps=2)
    with pytest.raises(StageError, match=rf"sft: loss is {value} at step 7; .* no good"):
        check_finite(out, 7, grad_norm=2.0, loss=value)
