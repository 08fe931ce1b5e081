"""Prompts of a stage: which split, how long, and what is said of those that are left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.job import Job, Out
from pipeline.records import Prompt
from pipeline.settings import Settings
from stages import prompts
from stages.prompts import encode_prompts, longest_prompt, of_split

SETTINGS = Settings.model_validate({"pretrain": {"data": "demo:stories"}})


@pytest.fixture
def out(tmp_path: Path) -> Out:
    return Out(Job("ppo", "ppo", "stages.ppo", 1, "f" * 64, tmp_path, tmp_path, {}, {}, {}))


def prompt(text: str, split: str = "train") -> Prompt:
    return Prompt(({"role": "user", "content": text},), split)


def test_a_split_without_a_prompt_is_named() -> None:
    given = [prompt("a"), prompt("b", "validation")]
    assert [p.text for p in of_split(given, "validation", SETTINGS)] == ["b"]
    with pytest.raises(DataError, match="of 2 prompts none is a test prompt") as error:
        of_split(given, "test", SETTINGS)
    assert "sample.test_fraction" in str(error.value)


def test_prompts_that_are_too_long_add_up_over_the_splits(
    out: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "encode_prompt", lambda _, messages: messages[0]["content"])
    for part in (["a", "long", "longer"], ["b", "longest"]):
        encode_prompts([prompt(text) for text in part], None, 3, out)  # type: ignore[arg-type]
    assert out.derived["prompts_too_long"] == 3


def test_a_prompt_leaves_room_for_the_response(
    out: Out, capsys: pytest.CaptureFixture[str]
) -> None:
    assert longest_prompt(64, 128, 512, out) == 64
    assert longest_prompt(64, 128, None, out) == 64
    assert capsys.readouterr().err == ""
    assert longest_prompt(256, 128, 192, out) == 63
    assert "at most 63 tokens: the model can read 192" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="leaves no room for a prompt in the 100 tokens"):
        longest_prompt(256, 128, 100, out)
