"""evaluate: the text that perplexity is measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.job import Input, Job, Out
from pipeline.settings import Settings
from stages.heldout_text import heldout_text as read_heldout


def heldout_text(folder: Path, rows: list[dict[str, str]]) -> tuple[list[str], Out]:
    data = folder / "text.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings.model_validate({"model": {"base": "b"}, "evaluate": {"text": str(data)}})
    out = Out(Job("evaluate", "evaluate", "", 1, "f", folder, folder, {}, {}, {}))
    inputs = {"text": Input("text", "sha256:1", sources=(str(data),))}
    return read_heldout(settings, inputs, out), out


def test_rows_without_a_text_are_counted(tmp_path: Path) -> None:
    texts, out = heldout_text(tmp_path, [{"text": "one"}, {"review": "two"}])
    assert texts == ["one"]
    assert out.derived["documents_dropped"] == {"no column 'text'": 1}


def test_text_of_which_nothing_can_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluate\.text: no usable row in 1\. 1 x no column"):
        heldout_text(tmp_path, [{"review": "two"}])
