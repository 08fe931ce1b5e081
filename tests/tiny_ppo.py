"""A ppo step small enough to be run whole, again and again, inside a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.job import Input, Inputs, Job, Metrics, Out
from pipeline.records import Prompt
from pipeline.settings import Settings
from stages import ppo
from stages import tokenizer as tokenizer_stage
from stages.models import contract_of, save_model
from tests.tiny_models import tiny_model, tiny_reward_model

TINY: dict[str, Any] = {
    "updates": 3,
    "prompts_per_step": 4,
    "minibatch_rows": 2,
    "epochs": 2,
    "max_prompt_tokens": 40,
    "max_response_tokens": 10,
    "temperature": 0.8,
    "lr": 1e-3,
    "warmup_fraction": 0.0,
    "max_update_kl": 1e6,  # no early stop: the number of steps is what was asked for
    "eval_every_updates": 3,
    "eval_prompts": 3,
    "checkpoint_every_updates": 1,
}


def make_inputs(
    folder: Path, kind: str, train: int = 5, validation: int = 3, double: bool = False
) -> Inputs:
    """Policy = reference, a reward model and prompts of different length."""
    tokenizer = tokenizer_stage.train(iter(["one two three"] * 9), 300, 2)
    policy = tiny_model(kind, vocab_size=len(tokenizer), width=16, seed=7, sharpness=8.0)
    reward = tiny_reward_model(kind, vocab_size=len(tokenizer), width=16, seed=6, sharpness=8.0)
    with torch.no_grad():
        # without it one response in thirty would end by itself
        policy.get_output_embeddings().weight[tokenizer.eos_token_id] *= 5
    for name, model in (("policy", policy), ("reward", reward)):
        _set_ids(model, tokenizer)
        save_model(model.double() if double else model, tokenizer, folder / name)
    words = ["a", "one two", "three three three", "two", "one one one one one"]
    prompts = [
        Prompt(({"role": "user", "content": f"{words[i % 5]} {i}"},), split)
        for split, count in (("train", train), ("validation", validation))
        for i in range(count)
    ]
    (folder / "prompts").mkdir()
    lines = [json.dumps(prompt.to_row()) + "\n" for prompt in prompts]
    (folder / "prompts" / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    contract = {**contract_of(tokenizer, reward), "score_mean": 0.1, "score_std": 0.5}
    return {
        "model": Input("model", "sha256:1", path=folder / "policy"),
        "reference": Input("reference", "sha256:1", path=folder / "policy"),
        "reward_model": Input(
            "reward_model", "sha256:2", path=folder / "reward", contract=contract
        ),
        "prompts": Input("prompts", "sha256:3", path=folder / "prompts"),
    }


def _set_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id


def make_job(
    work: Path, inputs: Inputs, precision: str = "fp32", seed: int = 1, **changes: Any
) -> Job:
    work.mkdir(parents=True, exist_ok=True)
    tree = Settings.model_validate(
        {
            "run": {"seed": seed},
            "model": {"base": "given", "precision": precision},
            "ppo": {**TINY, **changes},
        }
    )
    return Job("ppo", "ppo", "stages.ppo", 1, "0" * 12, work, work, tree.model_dump(), inputs, {})


def run_ppo(job: Job, rank: int = 0, world_size: int = 1) -> tuple[Metrics, Out]:
    out = Out(job, rank, world_size)
    return ppo.run(Settings.model_validate(job.settings), job.inputs, out), out


def rows_of(work: Path) -> list[dict[str, Any]]:
    """The metrics rows, without the wall clock."""
    lines = (work / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]
