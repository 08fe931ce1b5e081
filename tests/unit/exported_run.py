"""A finished run whose models are real, tiny and different from each other, made in a moment."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from pipeline.records import write_jsonl
from tests.unit import fake_run
from tests.unit.tiny_policy import make_model, make_rankings, make_reward_model

SEEDS = {"pretrain": 1, "sft": 2, "ppo": 3}


@cache
def _models() -> dict[str, Path]:
    folder = Path(mkdtemp(prefix="models-"))
    made = {stage: make_model(folder / stage, seed=seed) for stage, seed in SEEDS.items()}
    return {**made, "reward": make_reward_model(folder / "reward", made["sft"])}


def make_run(folder: Path, monkeypatch, rankings=None, **options) -> Path:
    """`fake_run.make_run` with models in it. rankings: rows of the rank step."""
    extras = fake_run.write_extras

    def write(work, artifact, stage, rng):
        extras(work, artifact, stage, rng)
        if stage in _models():
            (artifact / "some.jsonl").unlink()
            shutil.copytree(_models()[stage], artifact, dirs_exist_ok=True)
        if stage == "rank":
            (artifact / "some.jsonl").unlink()
            if rankings is None:
                made = make_rankings(folder / "rankings")
                shutil.copyfile(made / "rankings.jsonl", artifact / "rankings.jsonl")
            else:
                write_jsonl(artifact / "rankings.jsonl", rankings)

    monkeypatch.setattr(fake_run, "write_extras", write)
    return fake_run.make_run(folder, **options)
