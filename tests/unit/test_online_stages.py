"""grpo and rloo: the ids and the reward that TRL's trainers see, what they leave, stop and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import worker
from pipeline.errors import Stopped
from pipeline.job import Input, Out
from pipeline.settings import Settings
from stages import grpo, online_rl, rewards, rloo
from stages.chat import encode_prompt
from stages.models import load_causal_lm, load_reward_model, load_tokenizer
from stages.online_rl import OnlineRun
from stages.rules import Rule
from tests.unit.tiny_policy import conversation, make_job, make_world, rows_of, weights_bytes

ROOT = Path(__file__).parents[2]
STAGES = {"grpo": grpo, "rloo": rloo}
OWN = {
    "updates": 4,
    "prompts_per_step": 4,
    "responses_per_prompt": 4,
    "max_response_tokens": 8,
    "lr": 3e-3,
    "kl_coef": 0.01,
    "eval_every_updates": 2,
    "eval_prompts": 4,
    "checkpoint_every_updates": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def run(job):
    out = Out(job)
    return STAGES[job.stage].run(Settings.model_validate(job.settings), job.inputs, out), out


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {name: run(make_job(name, folder / name, world, **OWN)) for name in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_the_reward_rises_and_the_best_policy_is_published(stage, world, finished):
    metrics, out = finished[stage]
    rows = rows_of(out)
    assert [row["step"] for row in rows] == list(range(5))
    assert [row["step"] for row in rows if "validation_reward" in row] == [0, 2, 4]
    assert rows[0]["validation_kl"] == pytest.approx(0, abs=1e-4)
    assert rows[1]["kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["best_update"] > 0
    assert metrics["validation_reward"] > rows[0]["validation_reward"] + 0.01
    assert metrics["validation_reward"] == max(row.get("validation_reward", -9.0) for row in rows)
    assert {"score", "reward", "entropy", "response_tokens", "eos_rate", "loss"} <= set(rows[1])
    load_causal_lm(Input("model", "sha256:0", path=out.artifact))
    assert out.contract["pad_id"] != out.contract["eos_id"]
    samples = (out.work / "samples.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in samples} == {0, 2, 4}


@pytest.mark.parametrize(("stage", "architecture"), [("grpo", "llama"), ("rloo", "gpt2")])
def test_the_reward_is_the_normalised_score_of_the_very_ids(
    stage, architecture, tmp_path, monkeypatch
):
    """Each row recomputed alone, by hand; the prompts are the ids that every stage sees."""
    world = make_world(tmp_path / "world", architecture)
    seen = []

    def call(self, prompts, responses):
        found, means = scored(self, prompts, responses)
        seen.append((prompts, responses, found))
        return found, means

    scored = OnlineRun._scores
    monkeypatch.setattr(OnlineRun, "_scores", call)
    own = {**OWN, "updates": 1, "score_clip": 0.4, "missing_eos_penalty": 0.25}
    _, out = run(make_job(stage, tmp_path / "run", world, **own))
    model = load_reward_model(Input("reward_model", "sha256:3", path=world["reward_model"]))
    tokenizer = load_tokenizer(Input("model", "sha256:0", path=world["base"]))
    known = {tuple(encode_prompt(tokenizer, list(conversation(i)))) for i in range(24)}
    assert [len(prompts) for prompts, _, _ in seen] == [4, 16, 4]  # validation, rollout, validation
    prompts, responses, rewards = seen[1]
    ended = clipped = 0
    for prompt, response, reward in zip(prompts, responses, rewards, strict=True):
        assert tuple(prompt) in known
        ends = response[-1] == tokenizer.eos_token_id
        ids = prompt + response + ([] if ends else [tokenizer.eos_token_id])
        with torch.no_grad():
            raw = model(torch.tensor([ids])).logits.item()
        score = (raw - 0.3) / 0.5
        clipped += abs(score) > 0.4
        ended += ends
        expected = max(-0.4, min(0.4, score)) - (0.0 if ends else 0.25)
        assert reward == pytest.approx(expected, abs=1e-5)
    assert clipped
    row = rows_of(out)[1]
    assert row["score"] == pytest.approx(sum(rewards) / 16, abs=1e-5)
    assert row["eos_rate"] == pytest.approx(ended / 16)
    assert row["response_tokens"] == pytest.approx(sum(map(len, responses)) / 16)
    # the trainer's forward, which pads on the left, sees the same distributions as one row alone
    policy = load_causal_lm(Input("model", "sha256:0", path=world["base"]))
    entropies = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logprobs = policy(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        entropies += entropy[len(prompt) - 1 : -1].tolist()
    assert len({len(prompt) for prompt in prompts}) > 1
    assert row["entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
    # four responses to one prompt, and they differ
    assert prompts[0] == prompts[3] != prompts[4]
    assert len({tuple(r) for r in responses[:4]}) > 1


@pytest.mark.parametrize("stage", STAGES)
def test_rules_alone_may_reward(stage, world, tmp_path, monkeypatch):
    def short(messages, response):
        assert messages[-1]["role"] == "user"
        return -float(len(response))

    monkeypatch.setattr(rewards, "load_rule", lambda name, key: Rule(name, short, "test"))
    own = {**OWN, "reward_weight": 0, "rules": {"short": 1.0, "also": 0.0}, "score_clip": 1.0}
    job = make_job(stage, tmp_path, world, **own, missing_eos_penalty=0.0, length_penalty=0.5)
    del job.inputs["reward_model"]
    _, out = run(job)
    rows = [row for row in rows_of(out) if "score" in row]
    assert len(rows) == 4
    for row in rows:
        # what is watched with weight 0 is counted and not paid for
        assert row["score/short"] == row["score/also"] < 0
        expected = row["score/short"] - 0.5 * row["response_tokens"]
        assert row["score"] == pytest.approx(expected, abs=1e-4)
    assert out.derived["rules"] == {"short": "test", "also": "test"}


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("rloo", {}),
        pytest.param("grpo", {}, marks=pytest.mark.slow),
        pytest.param(
            "grpo",
            {"epochs": 2, "accumulation_steps": 2, "loss": "dapo"},
            marks=pytest.mark.slow,
        ),
        pytest.param("rloo", {"lora": {"rank": 2}}, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_ends_with_the_same_bytes_and_rows(
    stage, more, world, finished, tmp_path, monkeypatch
):
    whole = finished[stage][1]
    if more:
        _, whole = run(make_job(stage, tmp_path / "whole", world, **{**OWN, **more}))
    job = make_job(stage, tmp_path / "run", world, **{**OWN, **more})
    calls = iter([False] * 2 + [True])
    monkeypatch.setattr(worker, "stop_requested", lambda: next(calls, True))
    with pytest.raises(Stopped):
        run(job)
    monkeypatch.undo()
    _, out = run(job)
    assert out.resumed_from == 3
    assert rows_of(out) == rows_of(whole)
    assert weights_bytes(out) == weights_bytes(whole)
    for key in ("tokens", "flops"):
        assert out.cost[key] == whole.cost[key], key


def test_a_policy_that_is_only_harmed_is_not_published(world, tmp_path):
    own = {**OWN, "updates": 1, "lr": 0.1, "warmup_fraction": 0.0, "kl_coef": 5.0}
    metrics, out = run(make_job("rloo", tmp_path / "run", world, **own))
    assert metrics["best_update"] == 0
    assert rows_of(out)[1]["validation_reward"] < metrics["validation_reward"] - 1
    expected = load_file(world["base"] / "model.safetensors")
    for name, weight in load_file(out.artifact / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


def test_adapters_move_their_layers_only(world, tmp_path):
    own = {**OWN, "updates": 2, "lora": {"rank": 2}, "kl_coef": 0.0}
    _, out = run(make_job("grpo", tmp_path / "run", world, **own))
    before = load_file(world["base"] / "model.safetensors")
    after = load_file(out.artifact / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("proj" in name for name in moved)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_on_the_left_changes_no_position(architecture, tmp_path):
    """TRL's forward passes a mask and no positions: GPT-2 is wrong by far without ours."""
    world = make_world(tmp_path, architecture)
    model = load_causal_lm(Input("model", "sha256:0", path=world["base"]))
    ids = [5, 6, 7, 8]
    padded = torch.tensor([[0, 0, 0, *ids]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        alone = model(torch.tensor([ids])).logits[0]
        before = model(input_ids=padded, attention_mask=mask).logits[0, 3:]
        online_rl._number_positions(model)
        after = model(input_ids=padded, attention_mask=mask).logits[0, 3:]
    assert torch.allclose(after, alone, atol=1e-5)
    if architecture == "gpt2":
        assert (before - alone).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_applied_and_the_weights_stay_fp32(stage, world, finished, tmp_path):
    job = make_job(stage, tmp_path / "run", world, **{**OWN, "updates": 1})
    job.settings["model"]["precision"] = "bf16"
    _, out = run(job)
    exact, rounded = rows_of(finished[stage][1])[1], rows_of(out)[1]
    assert rounded["entropy"] != exact["entropy"]
    assert rounded["entropy"] == pytest.approx(exact["entropy"], rel=0.01)
    saved = load_file(out.artifact / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    # rounded once to bf16 and back, the weights would be multiples of its steps
    assert any((t != t.bfloat16().float()).any() for t in saved.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["dpo", "kto", "grpo", "rloo"])
def test_a_killed_run_ends_with_the_same_bytes(stage, world, tmp_path):
    """SIGKILL while it trains, at no chosen place."""
    own = {**OWN, "checkpoint_every_updates": 1, "updates": 12}
    if stage in ("dpo", "kto"):
        own = {"lr": 3e-3, "minibatch_rows": 4, "max_steps": 12, "checkpoint_every_steps": 1}
    code = (
        "import importlib, sys; from pathlib import Path; from pipeline.job import Job, Out;"
        "from pipeline.settings import Settings;"
        "job = Job.from_json(Path(sys.argv[1]).read_text());"
        "stage = importlib.import_module(job.module);"
        "stage.run(Settings.model_validate(job.settings), job.inputs, Out(job))"
    )

    def start(work):
        job = make_job(stage, work, world, **own)
        (job.work / "job.json").write_text(job.to_json())
        return job, subprocess.Popen(
            [sys.executable, "-c", code, str(job.work / "job.json")],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    job, child = start(tmp_path / "run")
    deadline = time.monotonic() + 240
    while not (job.work / "checkpoints" / "checkpoint-4").exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (job.work / "artifact.tmp" / "model.safetensors").exists()
    assert start(tmp_path / "run")[1].wait() == 0
    assert start(tmp_path / "whole")[1].wait() == 0
    killed, whole = Out(job), Out(make_job(stage, tmp_path / "whole", world, **own))
    assert rows_of(killed) == rows_of(whole)
    assert weights_bytes(killed) == weights_bytes(whole)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["dpo", "kto", "grpo", "rloo"])
def test_two_processes_train_the_same_model(stage, world, tmp_path):
    own = {**OWN, "updates": 2, "eval_prompts": 3}
    if stage in ("dpo", "kto"):
        own = {"lr": 3e-3, "minibatch_rows": 8, "max_steps": 2}
    code = (
        "import importlib, os, sys; from pathlib import Path; from pipeline.job import Job, Out\n"
        "from pipeline.settings import Settings\n"
        "job = Job.from_json(Path(sys.argv[1]).read_text())\n"
        "out = Out(job, int(os.environ['RANK']), int(os.environ['WORLD_SIZE']))\n"
        "stage = importlib.import_module(job.module)\n"
        "stage.run(Settings.model_validate(job.settings), job.inputs, out)\n"
    )
    (tmp_path / "ranks.py").write_text(code)
    outs = []
    for ranks in (1, 2):
        job = make_job(stage, tmp_path / str(ranks), world, **own)
        (job.work / "job.json").write_text(job.to_json())
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run(
            [sys.executable, *launch, str(tmp_path / "ranks.py"), str(job.work / "job.json")],
            cwd=ROOT,
            env={
                **os.environ,
                "ACCELERATE_USE_CPU": "true",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outs.append(Out(job))
    one, two = (rows_of(out) for out in outs)
    for row, expected in zip(two, one, strict=True):
        assert row == pytest.approx(expected, abs=2e-3)
