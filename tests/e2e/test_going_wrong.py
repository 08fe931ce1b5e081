"""Real stages that go wrong: stopped at the step, exit 1, and the report says where."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.faults.small_line import copy_before, prefline, result_of, work_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]

FIGURE = r"(loss|grad_norm|kl|value_loss|score) is (nan|inf|\d+\.\d nats a response \(over .*\))"

USUAL = {
    "pretrain": ["pretrain.lr=3e-3", "pretrain.warmup_fraction=0.05"],
    "sft": ["sft.lr=1e-3", "sft.warmup_fraction=0.05"],
    "reward": ["reward.lr=1e-4", "reward.warmup_fraction=0.05"],
    "ppo": ["ppo.lr=1e-4", "ppo.warmup_fraction=0.03"],
}


@pytest.mark.parametrize(
    ("step", "options"),
    [
        ("pretrain", ["pretrain.lr=1e30", "pretrain.warmup_fraction=0"]),
        ("sft", ["sft.lr=1e30", "sft.warmup_fraction=0"]),
        ("reward", ["reward.lr=1e30", "reward.warmup_fraction=0"]),
        ("ppo", ["ppo.lr=3", "ppo.warmup_fraction=0"]),
    ],
    ids=["pretrain", "sft", "reward", "ppo"],
)
def test_an_absurd_learning_rate_is_stopped_told_and_taken_back(
    step: str, options: list[str], small_run: Path, tmp_path: Path
) -> None:
    run = copy_before(small_run, tmp_path / "run", step)
    ended = prefline("run", run, "--until", step, *options)
    assert ended.code == 1, ended.said
    found = re.search(rf"error: {step}: {FIGURE} at step \d+; training was stopped", ended.said)
    assert found, ended.said
    assert prefline("report", run).code == 0
    page = (run / "report.html").read_text()
    assert f"Where it went wrong: {step}" in page
    assert found[0].removeprefix("error: ") in page.replace("&gt;", ">")
    # again with the same settings: from its checkpoint, and to the same end
    again = prefline("run", run, "--until", step)
    assert again.code == 1
    assert found[0] in again.said
    # other settings are another result, from its beginning; nothing of the torn one is in it
    torn = work_of(run, step)
    ended = prefline("run", run, "--until", step, *USUAL[step])
    assert ended.code == 0, ended.said
    shutil.rmtree(torn)
    assert result_of(run, step) == result_of(small_run, step)
