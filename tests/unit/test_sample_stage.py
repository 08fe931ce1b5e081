"""sample: several ranks work at the same time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.job import Job, Out
from pipeline.settings import Settings
from stages import sample


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_waits_for_the_part_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    history: list[str] = []

    def sampled(_settings: Any, prompts: list[Any], *_: Any) -> list[dict[str, Any]]:
        history.append("work")
        return [{} for _ in prompts]

    monkeypatch.setattr(sample, "_sample", sampled)
    monkeypatch.setattr(sample, "stop_if_asked", lambda *_: history.append("meet"))
    accelerator: Any = SimpleNamespace(
        num_processes=2, process_index=rank, wait_for_everyone=lambda: None
    )
    out = Out(Job("sample", "sample", "", 1, "f", tmp_path, tmp_path, {}, {}, {}), rank, 2)
    settings = Settings.model_validate({"pretrain": {"data": "demo:stories"}})
    prompts: Any = range(64 * 4)
    parts = sample._sample_parts(settings, prompts, None, None, accelerator, out)  # type: ignore[arg-type]
    # both ranks sample between two meetings
    assert history == ["meet", "work", "meet", "work"]
    assert [part.exists() for part in parts] == [rank == 0, rank == 1] * 2
