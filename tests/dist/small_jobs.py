"""Jobs of pretrain, sft, reward, ppo and evaluate that take seconds, with data that does not divide by two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.job import Input, Inputs, Job
from pipeline.records import Prompt, Ranking, write_jsonl
from pipeline.settings import Settings
from pipeline.settings.model import ModelSettings
from stages import tokenizer as tokenizer_stage
from stages.models import load_tokenizer, new_causal_lm, save_model
from tests import tiny_ppo

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_length": 512}
PPO: dict[str, Any] = {
    # one validation prompt: rank 0 has none; responses of every length: the ranks differ in tokens
    "eval_prompts": 1,
    "eval_every_updates": 1,
    "max_response_tokens": 12,
    "rows_per_rank": 2,
    "prompts_per_step": 8,
    "minibatch_rows": 4,
    "kl_control": "adaptive",
    "kl_horizon": 16,
}


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


def make_base(folder: Path) -> Path:
    """A model, and beside it rankings, texts and demonstrations."""
    folder.mkdir()
    texts = [f"{r.messages[0]['content']} {t}" for r in rankings() for t in r.responses]
    tokenizer = tokenizer_stage.train(iter(texts), 300, 2)
    torch.manual_seed(0)
    save_model(new_causal_lm(ModelSettings.model_validate(SHAPE), tokenizer), tokenizer, folder)
    write_jsonl(folder / "rankings.jsonl", (r.to_row() for r in rankings()))
    write_jsonl(folder / "texts.jsonl", ({"text": f"{t} {i} " * 9} for i, t in enumerate(texts)))
    demonstrations = (
        {"prompt": f"Count to {i}.", "completion": f"{i} is {'so ' * (i % 5)}big"} for i in range(61)
    )
    write_jsonl(folder / "demonstrations.jsonl", demonstrations)
    prompts = (Prompt(({"role": "user", "content": f"Say {i}"},), "test") for i in range(7))
    write_jsonl(folder / "prompts.jsonl", (prompt.to_row() for prompt in prompts))
    return folder


def make_model(folder: Path, base: Path) -> Path:
    """Another model with the tokenizer of `base`."""
    tokenizer = load_tokenizer(Input("model", "sha256:0", path=base))
    torch.manual_seed(1)
    save_model(new_causal_lm(ModelSettings.model_validate(SHAPE), tokenizer), tokenizer, folder)
    return folder


def make_job(stage: str, work: Path, base: Path, precision: str = "fp32", **own: Any) -> Job:
    """A job of pretrain, sft, reward or evaluate on what `make_base` made."""
    work.mkdir(parents=True)
    model = Input("model", "sha256:1", path=base)
    texts, shown = str(base / "texts.jsonl"), str(base / "demonstrations.jsonl")
    small: dict[str, Any]
    inputs: Inputs
    if stage == "pretrain":
        # three rows to evaluate on: the ranks have one and two
        small = {"data": texts, "steps": 4, "minibatch_rows": 8, "accumulation_steps": 2}
        small |= {"sequence_length": 32, "eval_rows": 3, "eval_every_steps": 2, "lr": 1e-3}
        data = Input("data", "sha256:2", sources=(texts,))
        inputs = {"base": Input("base", "sha256:1", sources=(str(base),)), "data": data}
    elif stage == "sft":
        small = {"data": shown, "max_steps": 4, "minibatch_rows": 8, "accumulation_steps": 2}
        small |= {"max_length": 48, "eval_every_steps": 2, "heldout_fraction": 0.1, "lr": 1e-3}
        inputs = {"model": model, "data": Input("data", "sha256:2", sources=(shown,))}
    elif stage == "evaluate":
        # seven prompts for two, and a judge that is trained on four rankings
        small = {"judge": "reward_model", "max_response_tokens": 8}
        other = make_model(base.with_name(f"{work.name}-policy"), base)
        inputs = {role: Input(role, f"sha256:{role}", path=base) for role in ("rankings", "prompts")}
        inputs |= {"sft": model, "policy": Input("policy", "sha256:5", path=other)}
    else:
        # steps of 5, 5 and 1: the ranks have 3 and 2 micro-batches, and in the end 1 and none
        small = {"prompts_per_step": 5, "accumulation_steps": 3, "epochs": 1, "lr": 1e-3}
        small |= {"eval_every_steps": 1, "heads": 3}
        inputs = {"model": model, "rankings": Input("rankings", "sha256:2", path=base)}
    given = {"base": str(base), "precision": precision}
    tree = Settings.model_validate({"model": given, stage: {**small, **own}}).model_dump()
    return Job(stage, stage, f"stages.{stage}", 1, "0" * 12, work, work, tree, inputs, {})


def make_ppo_job(work: Path, kind: str, **changes: Any) -> Job:
    """Three updates in float64."""
    inputs = work.with_name(f"{work.name}-inputs")
    inputs.mkdir()
    found = tiny_ppo.make_inputs(inputs, kind, train=7, double=True)
    return tiny_ppo.make_job(work, found, **{**PPO, **changes})
