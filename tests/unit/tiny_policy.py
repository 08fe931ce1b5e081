"""A tiny world for the stages that make a policy: models, rankings and prompts of a few tokens."""

import json
from pathlib import Path

import torch

from pipeline.job import Input, Job, Out
from pipeline.records import Prompt, Ranking, write_jsonl
from pipeline.settings import Settings
from pipeline.settings.model import ModelSettings
from stages import tokenizer as tokenizer_stage
from stages.models import contract_of, load_tokenizer, new_causal_lm, new_reward_model, save_model

WORDS = ("red", "green", "blue", "one", "two", "three")


def conversation(i: int) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": f"Say {WORDS[i % 6]} {i}" + " please" * (i % 3)},)


def make_model(folder: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """A random model of two layers with a tokenizer of 300 tokens."""
    text = (f"Say {word} {i} please blue and red" for i in range(40) for word in WORDS)
    tokenizer = tokenizer_stage.train(text, 300, 2)
    torch.manual_seed(seed)
    shape = {
        "architecture": architecture,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_length": 64,
    }
    save_model(new_causal_lm(ModelSettings.model_validate(shape), tokenizer), tokenizer, folder)
    return folder


def make_reward_model(folder: Path, base: Path) -> Path:
    item = Input("model", "sha256:1", path=base)
    save_model(new_reward_model(item, seed=3), load_tokenizer(item), folder)
    return folder


def make_rankings(folder: Path, count: int = 24) -> Path:
    """Three responses a prompt, the last two tied; every fifth prompt is held out."""
    folder.mkdir(parents=True)
    rows = [
        Ranking(
            conversation(i),
            (f"{WORDS[i % 6]} it is", "no", f"never {i}"),
            (1, 2, 2),
            "ann",
            "heldout" if i % 5 == 0 else "train",
        ).to_row()
        for i in range(count)
    ]
    write_jsonl(folder / "rankings.jsonl", rows)
    splits = [
        "test" if i % 5 == 0 else "validation" if i % 5 == 1 else "train" for i in range(count)
    ]
    prompts = [Prompt(conversation(i), split).to_row() for i, split in enumerate(splits)]
    write_jsonl(folder / "prompts.jsonl", prompts)
    return folder


def make_job(stage: str, work: Path, world: dict[str, Path], **settings: object) -> Job:
    """A job of dpo, kto, grpo or rloo on the folders of `world`: base, reward_model, rankings."""
    work.mkdir(parents=True, exist_ok=True)
    tree = Settings.model_validate(
        {
            "model": {"base": str(world["base"]), "precision": "fp32"},
            "run": {"policy": stage},
            stage: settings,
        }
    )
    item = Input("model", "sha256:1", path=world["base"])
    contract = contract_of(load_tokenizer(item))
    inputs = {
        "model": item,
        "reference": Input("reference", "sha256:1", path=world["base"]),
        "rankings": Input("rankings", "sha256:2", path=world["rankings"]),
        "prompts": Input("prompts", "sha256:2", path=world["rankings"]),
        "reward_model": Input(
            "reward_model",
            "sha256:3",
            path=world["reward_model"],
            contract={**contract, "score_mean": 0.3, "score_std": 0.5},
        ),
    }
    module = f"stages.{stage}"
    return Job(stage, stage, module, 1, "0" * 12, work, work, tree.model_dump(), inputs, {})


def make_world(folder: Path, architecture: str = "llama") -> dict[str, Path]:
    base = make_model(folder / "base", architecture)
    return {
        "base": base,
        "reward_model": make_reward_model(folder / "reward_model", base),
        "rankings": make_rankings(folder / "rankings"),
    }


def rows_of(out: Out) -> list[dict]:
    lines = (out.work / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def weights_bytes(out: Out) -> bytes:
    return (out.artifact / "model.safetensors").read_bytes()
