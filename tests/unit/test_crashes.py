"""What a crash is told as, from the real exceptions."""

import errno
import os
import resource

import pytest
import torch
from safetensors import SafetensorError

from pipeline import crashes
from pipeline.plan import STAGES


def caught(action):
    try:
        action()
    except Exception as error:  # noqa: BLE001 - whatever it is
        return error
    raise AssertionError("nothing was raised")


def told(action, tmp_path, stage="ppo"):
    return crashes.explain(caught(action), "ppo", stage, tmp_path / "rank0.log")


def fail(error):
    raise error


def write(path, size=1):
    with open(path, "wb") as file:
        file.write(bytes(size))


@pytest.mark.parametrize(
    "action",
    [
        lambda: write("/dev/full"),
        # safetensors replaces what it writes to, so /dev/full is not for it
        lambda: fail(SafetensorError("Error while serializing: I/O error: (os error 28)")),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_is_told_as_such(action, tmp_path):
    error = told(action, tmp_path)
    assert error.message.startswith(f"ppo: the disk of {tmp_path} is full (")
    assert "prefline resume" in error.hint


def test_a_file_that_may_not_grow_is_told_as_such(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        error = told(lambda: write(tmp_path / "file", 5000), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "larger than this system allows" in error.message


def test_a_folder_without_permission_is_told_with_its_name(tmp_path):
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/run/metrics.jsonl")
    error = told(lambda: fail(denied), tmp_path)
    assert "not allowed to write or read" in error.message
    assert "/run/metrics.jsonl" in error.message


@pytest.mark.parametrize(
    "action",
    [lambda: bytearray(2**60), lambda: torch.empty(2**45), lambda: torch.zeros(2**45)],
    ids=["python", "torch", "zeros"],
)
def test_too_little_memory_names_the_setting_to_lower(action, tmp_path):
    error = told(action, tmp_path)
    assert error.message.startswith("ppo: out of memory: ")
    assert "Lower ppo.rows_per_rank" in error.hint


def test_the_class_of_a_gpu_counts_too(tmp_path):
    assert crashes.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to ..."))
    assert not crashes.is_out_of_memory(RuntimeError("shapes do not match"))


def test_every_stage_that_trains_or_decodes_has_a_hint_of_its_own():
    # answers are what evaluate asks for, and stand under its settings
    for stage in set(STAGES) - {"tokenizer", "rank", "judge"}:
        own = "evaluate" if stage == "answers" else stage
        assert f"{own}." in crashes.memory_hint(stage), stage


def test_a_lost_partner_is_no_cause():
    for text in (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer",
        "[..unbound_buffer.cc:84] Timed out waiting 10000ms for recv operation to complete",
    ):
        assert crashes.is_lost_partner(RuntimeError(text))
    assert not crashes.is_lost_partner(RuntimeError("index out of range"))


def test_anything_else_is_told_by_its_own_words(tmp_path):
    error = crashes.explain(ValueError("a bug\nof ours"), "sft", "sft", tmp_path / "rank1.log")
    assert error.message == "sft: ValueError: a bug"
    assert str(tmp_path / "rank1.log") in error.hint
