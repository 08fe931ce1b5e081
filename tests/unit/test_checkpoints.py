"""Checkpoints: whole or not at all, verified, pruned only when a newer one is safe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.job import Job, Out
from stages.checkpoints import (
    Checkpointer,
    load_optimizer,
    load_trainable,
    optimizer_tensors,
    trainable_tensors,
)
from stages.common import adamw


@pytest.fixture
def out(tmp_path: Path) -> Out:
    job = Job("ppo", "ppo", "stages.ppo", 1, "f" * 64, tmp_path, tmp_path, {}, {}, {})
    (tmp_path / "checkpoints").mkdir()
    return Out(job)


def save(out: Out, step: int, keep: int = 2) -> None:
    tensors = {"policy": {"w": torch.full((3,), float(step))}}
    Checkpointer(out, keep).save(step, tensors, {"kl_coef": step / 10})


def names(out: Out) -> list[str]:
    return sorted(path.name for path in out.checkpoints.iterdir())


def test_the_newest_checkpoint_comes_back_as_it_was_saved(out: Out) -> None:
    save(out, 1)
    save(out, 2)
    found = Checkpointer(out, 2).load_latest()
    assert found is not None
    assert found.step == 2
    assert found.state == {"kl_coef": 0.2}
    assert found.tensors["policy"]["w"].tolist() == [2.0, 2.0, 2.0]
    assert out.resumed_from == 2


def test_only_the_newest_are_kept(out: Out) -> None:
    for step in range(1, 6):
        save(out, step, keep=2)
    assert names(out) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("file", ["policy.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["change", "truncate", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    out: Out, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    save(out, 1)
    save(out, 2)
    path = out.checkpoints / "step-00000002" / file
    raw = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        raw[-3] ^= 1
        path.write_bytes(raw)
    found = Checkpointer(out, 2).load_latest()
    assert found is not None
    assert found.step == 1
    assert "step-00000002 is damaged" in capsys.readouterr().err


def test_what_a_kill_left_half_written_is_never_loaded_and_cleared_by_the_next_save(
    out: Out,
) -> None:
    save(out, 1)
    (out.checkpoints / "tmp-step-00000002").mkdir()
    found = Checkpointer(out, 2).load_latest()
    assert found is not None
    assert found.step == 1
    save(out, 2)
    assert names(out) == ["step-00000001", "step-00000002"]


def test_metric_rows_after_the_checkpoint_are_forgotten(out: Out) -> None:
    for step in (1, 2, 3):
        out.log(step, {"loss": float(step)})
    with (out.work / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # torn by the kill
    save(out, 2)
    Checkpointer(out, 2).load_latest()
    rows = (out.work / "metrics.jsonl").read_text().splitlines()
    assert ['"step":1' in rows[0], '"step":2' in rows[1], len(rows)] == [True, True, 2]


def test_a_start_that_reached_no_checkpoint_leaves_no_rows(out: Out) -> None:
    # ppo measures its start as step 0, before anything is saved
    out.log(0, {"validation_score": 1.0})
    (out.work / "samples.jsonl").write_text('{"step":0,"text":"a"}\n')
    assert Checkpointer(out, 2).load_latest() is None
    assert (out.work / "metrics.jsonl").read_text() == ""
    assert (out.work / "samples.jsonl").read_text() == ""


def test_texts_of_work_that_is_done_again_are_forgotten_like_its_numbers(out: Out) -> None:
    kept = '{"step":2,"text":"a\\nb}\u2028 c"}\n'
    # torn behind a brace, and in the middle of a character
    torn = '{"step":4,"text":"{}é'.encode()[:-1]
    (out.work / "samples.jsonl").write_bytes((kept + '{"step":3,"text":"b"}\n').encode() + torn)
    save(out, 2)
    Checkpointer(out, 2).load_latest()
    assert (out.work / "samples.jsonl").read_text() == kept


def test_a_damaged_newer_checkpoint_never_costs_the_one_just_written(out: Out) -> None:
    save(out, 1, keep=1)
    save(out, 3, keep=1)
    (out.checkpoints / "step-00000003" / "state.json").unlink()
    save(out, 2, keep=1)
    assert names(out) == ["step-00000002"]


def test_a_whole_checkpoint_of_the_same_step_is_left_alone(
    out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(out, 1)
    monkeypatch.setattr("stages.checkpoints.os.replace", lambda *_: pytest.fail("written again"))
    save(out, 1)
    assert names(out) == ["step-00000001"]


def test_training_goes_on_bit_for_bit_after_a_reload() -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
        for step in range(begin, end):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def new() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        return model, adamw(model, 1e-2, 0.1)

    straight, optimizer = new()
    steps(straight, optimizer, 0, 6)
    first, first_optimizer = new()
    steps(first, first_optimizer, 0, 3)
    saved = {k: v.detach().clone() for k, v in trainable_tensors(first).items()}
    moments = {k: v.clone() for k, v in optimizer_tensors(first_optimizer).items()}
    second, second_optimizer = new()
    load_trainable(second, saved)
    load_optimizer(second_optimizer, moments)
    steps(second, second_optimizer, 3, 6)
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
