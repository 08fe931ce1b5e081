"""A finished run whose models are real, tiny and different from each other, made in a moment."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

from pipeline.job import Input
from pipeline.records import write_jsonl
from pipeline.settings import LoraSettings
from stages.models import add_lora, load_causal_lm, load_tokenizer, merge_lora, save_model
from tests.unit import fake_run
from tests.unit.tiny_policy import make_model, make_rankings, make_reward_model

SEEDS = {"pretrain": 1, "sft": 2, "ppo": 3}


@cache
def _models() -> dict[str, Path]:
    folder = Path(mkdtemp(prefix="models-"))
    made = {stage: make_model(folder / stage, seed=seed) for stage, seed in SEEDS.items()}
    return {**made, "reward": make_reward_model(folder / "reward", made["sft"])}


@cache
def adapted_model(kind: str = "llama", rank: int = 4) -> tuple[Path, Path]:
    """A model, and the same after a LoRA training that was merged."""
    folder = Path(mkdtemp(prefix="adapted-"))
    base = make_model(folder / "base", kind, seed=5)
    item = Input("model", "", path=base)
    torch.manual_seed(7)
    model = add_lora(load_causal_lm(item), LoraSettings(rank=rank), "policy")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    save_model(merge_lora(model), load_tokenizer(item), folder / "policy")
    return base, folder / "policy"


def make_run(folder: Path, monkeypatch, rankings=None, models=None, **options) -> Path:
    """`fake_run.make_run` with models in it. rankings: rows of the rank step. models: by stage."""
    extras = fake_run.write_extras
    models = {**_models(), **(models or {})}

    def write(work, artifact, stage, rng):
        extras(work, artifact, stage, rng)
        if stage in models:
            (artifact / "some.jsonl").unlink()
            shutil.copytree(models[stage], artifact, dirs_exist_ok=True)
        if stage == "rank":
            (artifact / "some.jsonl").unlink()
            if rankings is None:
                made = make_rankings(folder / "rankings")
                shutil.copyfile(made / "rankings.jsonl", artifact / "rankings.jsonl")
            else:
                write_jsonl(artifact / "rankings.jsonl", rankings)

    monkeypatch.setattr(fake_run, "write_extras", write)
    return fake_run.make_run(folder, **options)
