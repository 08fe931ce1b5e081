"""A finished run on disk, made by hand in a second: base, sft, reward and a ppo step with its critic."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipeline import artifacts, workspace
from pipeline.files import write_atomic
from pipeline.job import Input, Job, Out
from pipeline.manifest import Manifest
from pipeline.plan import STAGES, plan
from pipeline.records import Prompt, write_jsonl
from pipeline.settings import Settings
from pipeline.workspace import Run
from stages.checkpoints import Checkpointer
from stages.models import contract_of, load_causal_lm, load_tokenizer
from stages.ppo_models import make_agent
from tests.unit.tiny_policy import conversation, make_model, make_reward_model

MEAN, STD = 0.3, 0.5
PPO = {"kl_coef": 0.1, "gamma": 0.9, "lam": 0.8, "temperature": 0.7, "score_clip": 2.0}


def make_run(folder: Path, architecture: str = "llama", **ppo: object) -> Run:
    """Steps pretrain, sft, sample, reward and ppo, each with an artifact and a manifest."""
    folder.mkdir(parents=True)
    settings = Settings.model_validate(
        {
            "run": {"name": "tiny"},
            "pretrain": {"data": ["demo:stories"]},
            "sft": {"data": ["demo:demonstrations"]},
            "sample": {"prompts": ["demo:prompts"]},
            "ppo": {**PPO, **ppo},
        }
    )
    (folder / "config.yaml").write_text(workspace.config_text(settings, {}), encoding="utf-8")
    run = Run(folder, settings, {})
    works: dict[str, Path] = {}
    for number, step in enumerate(["pretrain", "sft", "sample", "reward", "ppo"]):
        works[step] = run.step_dir(step, f"{number}" * 64)
        artifact = works[step] / artifacts.FOLDER
        artifact.mkdir(parents=True)
        if step == "sample":
            prompts = [Prompt(conversation(i), "test").to_row() for i in range(6)]
            write_jsonl(artifact / "prompts.jsonl", prompts)
        elif step == "reward":
            make_reward_model(artifact, works["sft"] / artifacts.FOLDER)
        else:
            make_model(artifact, architecture, seed=number)
    for step, work in works.items():
        _publish(run, step, work, works)
    write_atomic(
        folder / workspace.RUN_FILE,
        json.dumps({"schema": workspace.SCHEMA, "name": "tiny", "made_by": "test", "created": ""}),
    )
    _save_critic(run, works)
    return run


def _publish(run: Run, step: str, work: Path, works: dict[str, Path]) -> None:
    reads = next((one.inputs for one in plan(run.settings) if one.name == step), {})
    contract = {}
    if step != "sample":
        tokenizer = load_tokenizer(Input("model", "", path=work / artifacts.FOLDER))
        contract = contract_of(tokenizer)
        if step == "reward":
            contract |= {"score_mean": MEAN, "score_std": STD}
    flat = {
        f"ppo.{key}": value
        for key, value in run.settings.ppo.model_dump(mode="json").items()
        if not isinstance(value, dict)
        and key not in ("reward_models", "gold", "ptx_data", "prompts")
    }
    number = list(works).index(step)
    manifest = Manifest.model_validate(
        {
            "stage": step,
            "stage_version": 1,
            "kind": STAGES[step].kind,
            "step": step,
            "round": 1,
            "fingerprint": f"{number}" * 64,
            "digest": f"sha256:{number}",
            "inputs": {
                role: {
                    "digest": f"sha256:{list(works).index(other)}",
                    "step": other,
                    "stage": other,
                    "fingerprint": f"{list(works).index(other)}" * 64,
                }
                for role, other in reads.items()
                if other in works
            },
            "settings": flat if step == "ppo" else {},
            "contract": contract,
        }
    )
    manifest.write(work)
    (work.parent / artifacts.LATEST).write_text(work.name + "\n", encoding="utf-8")


def _save_critic(run: Run, works: dict[str, Path]) -> None:
    """A checkpoint of update 7, whose critic is one that was read and then changed a little."""
    own = run.settings.ppo
    tokenizer = load_tokenizer(Input("model", "", path=works["sft"] / artifacts.FOLDER))
    item = Input("model", "sha256:1", path=works["sft"] / artifacts.FOLDER)
    contract = {**contract_of(tokenizer), "score_mean": MEAN, "score_std": STD}
    reward = Input("reward_model", "sha256:3", path=works["reward"] / "artifact", contract=contract)
    policy = load_causal_lm(item)
    agent = make_agent(
        own.critic or "separate", own, policy, item, reward, False, torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in agent.value_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    job = Job("ppo", "ppo", "stages.ppo", 1, "4" * 12, works["ppo"], run.path, {}, {}, {})
    keeper = Checkpointer(Out(job), 2)
    keeper.save(7, {"policy": agent.policy_parameters(), "value": agent.value_parameters()}, {})
