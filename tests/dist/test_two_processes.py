"""Two gloo processes do the work of one: the same losses, the same partition of prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "configs/tiny.yaml",
    "tokenizer.max_documents=300",
    "pretrain.max_documents=300",
    "pretrain.steps=6",
    "pretrain.eval_every_steps=3",
    "sft.max_examples=60",
    "sample.max_prompts=70",
    "sample.max_response_tokens=12",
    "rank.data=null",
]


def run(folder: Path, processes: int) -> dict[str, dict[str, object]]:
    command = [sys.executable, "-m", "pipeline", "run", *SMALL, "--until", "sample"]
    options = [f"run.dir={folder}", f"launch.processes={processes}"]
    answer = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    manifests = {}
    for step in ("pretrain", "sft", "sample"):
        fingerprint = (folder / step / "latest").read_text().strip()
        manifests[step] = json.loads((folder / step / fingerprint / "manifest.json").read_text())
        manifests[step]["folder"] = folder / step / fingerprint
    return manifests


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:  # type: ignore[type-arg]
    folder = tmp_path_factory.mktemp("dist")
    return run(folder / "one", 1), run(folder / "two", 2)


def losses(manifest: dict, key: str) -> list[float]:  # type: ignore[type-arg]
    lines = (manifest["folder"] / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def test_there_really_were_two(both: tuple[dict, dict]) -> None:  # type: ignore[type-arg]
    one, two = both
    assert {m["world_size"] for m in one.values()} == {1}
    assert {m["world_size"] for m in two.values()} == {2}


@pytest.mark.parametrize("step", ["pretrain", "sft"])
@pytest.mark.parametrize("key", ["loss", "heldout_loss", "grad_norm"])
def test_losses_equal_those_of_one_process(both: tuple[dict, dict], step: str, key: str) -> None:  # type: ignore[type-arg]
    one, two = (losses(m[step], key) for m in both)
    assert len(one) == len(two) > 0
    assert one == pytest.approx(two, rel=1e-5, abs=1e-5)


def test_prompts_are_sampled_once_each_however_they_are_shared(both: tuple[dict, dict]) -> None:  # type: ignore[type-arg]
    """In two parts, one of 64 and one of 6: each rank samples one."""
    ids = []
    for manifest in both:
        path = manifest["sample"]["folder"] / "artifact" / "samples.jsonl"
        ids.append([json.loads(line)["id"] for line in path.read_text().splitlines()])
    assert len(set(ids[0])) == len(ids[0]) == 70
    assert ids[0] == ids[1]
