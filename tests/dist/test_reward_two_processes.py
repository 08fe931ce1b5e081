"""Two gloo processes train the reward model of one, though their micro-batches are not as many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.records import Ranking, write_jsonl
from pipeline.settings.model import ModelSettings
from stages import tokenizer as tokenizer_stage
from stages.models import new_causal_lm, save_model
from tests.dist.ranks import run_ranks

pytestmark = pytest.mark.dist

WORKER = Path(__file__).with_name("reward_worker.py")


def rankings() -> list[Ranking]:
    """Eleven to train on, of two to four responses, every other one long."""
    found = []
    for number in range(15):
        long = "so very " * 12 if number % 2 else ""
        texts = [f"{long}word {number * k} {'ha ' * k}" for k in range(2 + number % 3)]
        found.append(
            Ranking(
                messages=({"role": "user", "content": f"Ask {number} {long}"},),
                responses=tuple(texts),
                ranks=tuple(range(1, len(texts) + 1)),
                annotator="a",
                split="train" if number < 11 else "heldout",
            )
        )
    return found


def run(folder: Path, base: Path, processes: int, reward: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    settings = {
        "model": {"base": str(base), "precision": "fp32"},
        "reward": {"prompts_per_step": 4, "epochs": 1, "lr": 1e-3, "eval_every_steps": 1, **reward},
    }
    given = {"settings": settings, "base": str(base), "rankings": str(base)}
    (folder / "given.json").write_text(json.dumps(given))
    run_ranks(WORKER, folder, processes)
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def rows(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    texts = (f"{r.messages[0]['content']} {t}" for r in rankings() for t in r.responses)
    tokenizer = tokenizer_stage.train(texts, 300, 2)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_length": 512}
    save_model(new_causal_lm(ModelSettings.model_validate(shape), tokenizer), tokenizer, folder)
    write_jsonl(folder / "rankings.jsonl", (r.to_row() for r in rankings()))
    return folder


def test_two_processes_equal_one(tmp_path: Path, base: Path) -> None:
    # steps of 5, 5 and 1: the ranks have 3 and 2 micro-batches, and in the end 1 and none
    reward = {"prompts_per_step": 5, "accumulation_steps": 3, "heads": 3}
    one = run(tmp_path / "one", base, 1, reward)
    two = run(tmp_path / "two", base, 2, reward)
    assert len(rows(tmp_path / "one")) == 3
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    assert one == pytest.approx(two, rel=1e-4, abs=1e-4)
    weights = [load_file(tmp_path / name / "artifact.tmp" / "model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-5, rtol=1e-4)
