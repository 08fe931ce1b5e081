"""Asked to stop in the middle of anything: saved, exit 75, and in the end the bytes of an undisturbed line.

One line is stopped again and again, each time at another place; what it ends with is compared.
"""

from __future__ import annotations

import itertools
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.small_line import STEPS, copy_before, prefline, result_of, start

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3600)]

# where each stage is when the signal comes, and at which call of that function
PLACES = {
    "tokenizer, data": ("stages.tokenizer:train", 1),
    "pretrain, data": ("stages.packing:pack_documents", 1),
    "pretrain, evaluation": ("stages.pretrain:Loop._evaluate", 1),
    "pretrain, save": ("stages.checkpoints:Checkpointer.save", 1),
    "sft, data": ("stages.sft:_examples", 1),
    "sft, step": ("stages.trl_checkpoints:LineCallback.on_log", 2),
    "sft, save": ("stages.trl_checkpoints:LineCallback.on_save", 1),
    "sft, evaluation": ("stages.sft:heldout_loss", 1),
    "sample, responses": ("stages.generation:generate", 1),
    "reward, data": ("stages.ranked_data:encode_to_train_on", 1),
    "reward, step": ("stages.reward_training:_gradients", 2),
    "reward, save": ("stages.checkpoints:Checkpointer.save", 1),
    "reward, evaluation": ("stages.reward_measures:measure", 1),
    "ppo, data": ("stages.prompts:encode_prompts", 1),
    # the first is the validation of the start
    "ppo, rollout": ("stages.experience:roll_out", 2),
    "ppo, update": ("stages.ppo:_Loop._minibatch", 1),
    "ppo, save": ("stages.checkpoints:Checkpointer.save", 1),
    "ppo, evaluation": ("stages.ppo:_Loop._validate", 1),
    "evaluate, answers": ("stages.answering:_sample", 1),
    "evaluate, perplexity": ("stages.heldout_text:heldout_loss", 1),
}


def test_the_command_is_asked_to_stop_everywhere(small_run: Path, tmp_path: Path) -> None:
    run = copy_before(small_run, tmp_path / "run", "tokenizer")
    stop_everywhere(run, {"to": "parent"}, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    assert_equal(small_run, run)


@pytest.mark.dist
def test_one_rank_of_two_is_asked_to_stop_everywhere(
    small_run_of_two: Path, tmp_path: Path
) -> None:
    run = copy_before(small_run_of_two, tmp_path / "run", "pretrain")
    stop_everywhere(run, {"rank": 1}, (signal.SIGTERM, signal.SIGUSR1))
    assert_equal(small_run_of_two, run)


def stop_everywhere(run: Path, fault: dict[str, Any], numbers: tuple[signal.Signals, ...]) -> None:
    """Each start of the line gets one signal, each at the next place; then it runs to its end."""
    # what the first rank packs, the others read; so few prompts are one part, which is the first rank's
    left_out = {"pretrain, data", "sample, responses"} if "rank" in fault else set()
    places = [
        place
        for name, place in PLACES.items()
        if name not in left_out and not (run / name.split(",")[0]).exists()
    ]
    for (where, call), number in zip(places, itertools.cycle(numbers), strict=False):
        plan = {**fault, "do": "signal", "number": number, "where": where, "call": call}
        ended = prefline("run", run, at_call=[plan])
        assert ended.code == 75, f"{plan}: exit {ended.code}\n{ended.said}"
        assert "by force" not in ended.said, plan
    ended = prefline("resume", run)
    assert ended.code == 0, ended.said


def assert_equal(reference: Path, run: Path) -> None:
    for step in STEPS:
        assert result_of(run, step) == result_of(reference, step), step


def test_a_second_interrupt_ends_at_once_and_costs_what_came_after_the_checkpoint(
    small_run: Path, tmp_path: Path
) -> None:
    run = copy_before(small_run, tmp_path / "run", "ppo")
    process = start("run", run)
    while not list((run / "ppo").glob("*/checkpoints/step-00000001/MANIFEST.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    # two signals in one moment are one
    assert process.stderr is not None
    for line in process.stderr:
        if "stopping at the next safe point" in line:
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Everything up to the last checkpoint is kept" in said
    ended = prefline("resume", run)
    assert ended.code == 0, ended.said
    assert "ppo: continuing from step-0000000" in ended.said
    assert_equal(small_run, run)
