"""Somebody whose rankings a real line has learned from wants to be forgotten."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.small_line import ROOT, prefline, work_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]


def said(*words: object) -> str:
    command = [sys.executable, "-m", "pipeline", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def states(run: Path) -> dict[str, str]:
    rows = json.loads(said("status", run, "--json"))["steps"]
    return {row["step"]: f"{row['state']}: {row['reason']}" for row in rows}


def rankings(run: Path) -> list[dict[str, Any]]:
    work = run / "rank" / (run / "rank" / "latest").read_text().strip()
    lines = (work / "artifact" / "rankings.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_what_depends_on_a_person_is_named_and_stale_until_it_is_made_anew(
    small_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    alone = {name: work_of(run, name).name for name in ("rank", "reward", "ppo", "evaluate")}
    rows = [
        {
            "prompt": f"Tell me about number {i}.",
            "responses": [f"It is {i}.", f"I know nothing about {i}."],
            "ranks": [1, 2],
            "annotator": "ann" if i % 2 else "bob",
        }
        for i in range(20)
    ]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said("labels", run, "import", tmp_path / "people.jsonl")
    assert states(run)["rank"] == "stale: 20 new rankings"
    ended = prefline("run", run)
    assert ended.code == 0, ended.said
    by_ann = next(row["id"] for row in rankings(run) if row["annotator"] == "ann")
    touched = said("lineage", run, "--label", by_ann)
    for step in ("rank", "reward", "ppo", "evaluate"):
        new = (run / step / "latest").read_text().strip()
        assert f"{step}  {new}" in touched

    text = said("labels", run, "forget", "--annotator", "ann")
    assert "10 rankings and the account are gone" in text
    for step, old in alone.items():
        new = (run / step / "latest").read_text().strip()
        assert f"  {step}/{new} {'holds them' if step == 'rank' else 'was made from them'}" in text
        # what was made before her is none of it
        assert f"{step}/{old}" not in text
    # as many again by somebody else: the counts alone would look as before
    others = [{**row, "prompt": f"Again: {row['prompt']}", "annotator": "cy"} for row in rows[::2]]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    said("labels", run, "import", tmp_path / "others.jsonl")
    assert states(run)["rank"] == "stale: an annotator was forgotten"
    assert states(run)["reward"] == "stale: input rank changed"
    assert states(run)["ppo"] == "stale: input reward changed"
    ended = prefline("run", run)
    assert ended.code == 0, ended.said
    assert set(states(run).values()) == {"done: None"}
    assert {row["annotator"] for row in rankings(run)} == {"bob", "cy", "sim-1", "sim-2"}
    tree = said("lineage", run)
    assert "ann " not in tree
    assert "bob 10, cy 10" in tree
    assert "ok" in said("verify", run)
