"""sft: what is trained, that a resumed run ends with the same bytes, and what is refused."""

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
from pipeline.errors import ConfigError, DataError, StageError, Stopped
from pipeline.job import Input, Job, Out
from pipeline.settings import Settings
from pipeline.settings.model import ModelSettings
from stages import sft
from stages import tokenizer as tokenizer_stage
from stages.chat import encode_completion, encode_conversation
from stages.models import load_causal_lm, load_tokenizer, new_causal_lm, save_model
from stages.trl_checkpoints import COMMITTED, commit

ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": f"Count to {i}.", "completion": f"{i} is {'so ' * (i % 5)}big"} for i in range(64)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tokenizer_stage.train((f"{r['prompt']} {r['completion']}" for r in ROWS), 300, 2)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_length": 64}
    save_model(new_causal_lm(ModelSettings.model_validate(shape), tokenizer), tokenizer, folder)
    return folder


def make_job(work: Path, base: Path, rows: list[dict] | None = None, **settings) -> Job:
    work.mkdir(parents=True, exist_ok=True)
    data = work.parent / f"{work.name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    own = {
        "data": str(data),
        "max_length": 48,
        "minibatch_rows": 8,
        "eval_every_steps": 4,
        **settings,
    }
    tree = Settings.model_validate({"model": {"base": str(base), "precision": "fp32"}, "sft": own})
    inputs = {
        "model": Input("model", "sha256:1", path=base),
        "data": Input("data", "sha256:2", sources=(str(data),)),
    }
    return Job("sft", "sft", "stages.sft", 1, "0" * 12, work, work, tree.model_dump(), inputs, {})


def run(job: Job) -> tuple[dict, Out]:
    out = Out(job)
    return sft.run(Settings.model_validate(job.settings), job.inputs, out), out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def logged(work: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    """One whole run of 6 steps, with its metrics: what the others are compared with."""
    work = tmp_path_factory.mktemp("whole") / "run"
    metrics, out = run(make_job(work, base, max_steps=6, checkpoint_every_steps=2))
    return metrics, out


def test_the_model_learns_and_is_published_as_a_plain_folder(finished, base):
    metrics, out = finished
    rows = [json.loads(line) for line in (out.work / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert {"loss", "lr", "grad_norm"} <= set(rows[0])
    assert [row["step"] for row in rows if "heldout_loss" in row] == [4, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert metrics["heldout_loss"] < rows[3]["heldout_loss"]
    assert not torch.equal(
        weights(out.artifact)["model.embed_tokens.weight"],
        weights(base)["model.embed_tokens.weight"],
    )
    load_causal_lm(Input("model", "sha256:0", path=out.artifact))
    assert out.contract["pad_id"] != out.contract["eos_id"]


def test_exactly_the_completions_tokens_are_trained(finished, base):
    metrics, _out = finished
    tokenizer = load_tokenizer(Input("model", "sha256:0", path=base))
    assert metrics["examples"] + metrics["heldout_examples"] == len(ROWS)
    everything = sum(len(encode_completion(tokenizer, r["completion"], True)) for r in ROWS)
    heldout = [r for r in ROWS if sft.is_heldout([{"role": "user", "content": r["prompt"]}], 0.05)]
    held_back = sum(len(encode_completion(tokenizer, r["completion"], True)) for r in heldout)
    assert len(heldout) == metrics["heldout_examples"] > 0
    assert metrics["trained_tokens"] == everything - held_back


def test_the_logged_loss_is_that_of_the_completions_alone(base, tmp_path):
    """The first step's loss, recomputed by hand from logits, without a label mask of ours."""
    metrics, out = run(make_job(tmp_path / "run", base, max_steps=1))
    item = Input("model", "sha256:0", path=base)
    tokenizer, model = load_tokenizer(item), load_causal_lm(item)
    settings = Settings.model_validate(make_job(tmp_path / "again", base, max_steps=1).settings)
    examples = sft._examples(
        settings, {"data": Input("data", "x", sources=settings.sft.data)}, tokenizer, out
    )
    _, order = sft._order(settings, len(examples.train))
    total = count = 0.0
    for row in order:
        ids = examples.train[row].ids
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        begin = max(
            i for i, t in enumerate(ids) if t == tokenizer.convert_tokens_to_ids("<|assistant|>")
        )
        for place in range(begin + 1, len(ids)):
            total -= logprobs[place - 1, ids[place]].item()
            count += 1
    assert metrics["loss"] == pytest.approx(total / count, abs=1e-4)


def test_a_trainer_that_would_train_other_tokens_is_stopped(finished, base, monkeypatch, tmp_path):
    monkeypatch.setattr(sft, "_labels", lambda row: list(row.ids))
    with pytest.raises(StageError, match="the trainer would train"):
        run(make_job(tmp_path / "run", base, max_steps=1))


def test_accumulation_changes_memory_and_not_the_result(finished, base, tmp_path):
    metrics, out = run(make_job(tmp_path / "run", base, max_steps=6, accumulation_steps=2))
    expected = weights(finished[1].artifact)
    for name, weight in weights(out.artifact).items():
        assert torch.allclose(weight, expected[name], atol=1e-5), name
    assert metrics["heldout_loss"] == pytest.approx(finished[0]["heldout_loss"], abs=1e-4)


def test_adapters_are_merged_and_the_rest_is_as_it_was(base, tmp_path):
    _, out = run(make_job(tmp_path / "run", base, max_steps=3, lora={"rank": 2}))
    before, after = weights(base), weights(out.artifact)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("proj" in name for name in moved)


def test_samples_of_held_out_prompts_are_written(finished):
    rows = [
        json.loads(line) for line in (finished[1].work / "samples.jsonl").read_text().splitlines()
    ]
    assert {row["step"] for row in rows} == {4, 6}
    assert len(rows) == 2 * min(3, finished[0]["heldout_examples"])
    assert all(row["prompt"].startswith("Count to") for row in rows)


# ---- stop, kill, resume


def test_a_stop_saves_and_the_resumed_run_ends_with_the_same_bytes(
    finished, base, tmp_path, monkeypatch
):
    job = make_job(tmp_path / "run", base, max_steps=6, checkpoint_every_steps=100)
    calls = iter([False] * 2 + [True])
    monkeypatch.setattr(worker, "stop_requested", lambda: next(calls, True))
    with pytest.raises(Stopped) as caught:
        run(job)
    assert caught.value.exit_code == 75
    monkeypatch.undo()
    _, out = run(job)
    assert out.resumed_from == 3
    assert logged(out.work) == list(range(1, 7))
    assert same(out.artifact, finished[1].artifact)


@pytest.mark.parametrize("damage", ["flipped byte", "missing file", "not committed"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    finished, base, tmp_path, monkeypatch, damage, capsys
):
    job = make_job(tmp_path / "run", base, max_steps=6, checkpoint_every_steps=2)
    calls = iter([False] * 4 + [True])
    monkeypatch.setattr(worker, "stop_requested", lambda: next(calls, True))
    with pytest.raises(Stopped):
        run(job)
    monkeypatch.undo()
    newest = job.work / "checkpoints" / "checkpoint-5"
    if damage == "flipped byte":
        raw = bytearray((newest / "optimizer.pt").read_bytes())
        raw[len(raw) // 2] ^= 1
        (newest / "optimizer.pt").write_bytes(raw)
    elif damage == "missing file":
        (newest / "rng_state.pth").unlink()
    else:
        (newest / COMMITTED).unlink()
    _, out = run(job)
    assert "checkpoint-5 is not whole" in capsys.readouterr().err
    assert out.resumed_from == 4
    assert logged(out.work) == list(range(1, 7))
    assert same(out.artifact, finished[1].artifact)


def test_a_run_killed_while_it_trains_ends_with_the_same_bytes(finished, base, tmp_path):
    job = make_job(tmp_path / "run", base, max_steps=6, checkpoint_every_steps=1)
    (job.work / "job.json").write_text(job.to_json())
    code = (
        "import sys; from pathlib import Path; from pipeline.job import Job, Out;"
        "from pipeline.settings import Settings; from stages import sft;"
        "job = Job.from_json(Path(sys.argv[1]).read_text());"
        "sft.run(Settings.model_validate(job.settings), job.inputs, Out(job))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(job.work / "job.json")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (job.work / "checkpoints" / "checkpoint-2").exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (job.work / "artifact.tmp" / "model.safetensors").exists()
    _, out = run(job)
    assert out.resumed_from in range(1, 6)
    assert logged(out.work) == list(range(1, 7))
    assert same(out.artifact, finished[1].artifact)


def test_old_checkpoints_go_only_after_the_new_one_counts(tmp_path):
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text(str(step))
        commit(folder, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]


# ---- refused


def test_a_loss_that_is_not_a_number_ends_the_run_before_anything_is_saved(base, tmp_path):
    broken = tmp_path / "broken"
    item = Input("model", "sha256:0", path=base)
    model = load_causal_lm(item)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    save_model(model, load_tokenizer(item), broken)
    job = make_job(tmp_path / "run", broken, max_steps=4, checkpoint_every_steps=1)
    with pytest.raises(StageError, match="loss is nan at step 1"):
        run(job)
    assert not list((job.work / "checkpoints").glob("checkpoint-*"))


def test_examples_that_are_too_long_are_counted_by_reason(base, tmp_path):
    rows = [*ROWS, {"prompt": "p", "completion": "long " * 60}, {"prompt": "p", "completion": ""}]
    _, out = run(make_job(tmp_path / "run", base, rows, max_steps=1))
    assert out.derived["demonstrations_dropped"] == {
        "longer than sft.max_length 48": 1,
        "the answer is empty": 1,
    }


@pytest.mark.parametrize(
    ("rows", "settings", "error", "message"),
    [
        ([{"prompt": "p", "completion": ""}], {}, DataError, "no usable row in 1"),
        (ROWS[:1], {}, DataError, "1 demonstrations are too few"),
        ([*ROWS[:9], {"prompt": "p"}], {}, DataError, "1 of 10 rows cannot be used"),
        (ROWS, {"max_length": 500}, ConfigError, "sft.max_length 500 is more than the 64 tokens"),
        (
            ROWS,
            {"accumulation_steps": 3},
            ConfigError,
            "sft.minibatch_rows = 8 cannot be divided by 3",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_one_message(
    base, tmp_path, rows, settings, error, message
):
    with pytest.raises(error, match=message):
        run(make_job(tmp_path / "run", base, rows, **settings))


def test_every_step_has_full_rows_and_every_row_comes_once_a_pass():
    settings = Settings.model_validate(
        {"model": {"base": "./m"}, "sft": {"minibatch_rows": 8, "epochs": 2.0}}
    )
    steps, order = sft._order(settings, 21)
    assert steps == 6
    assert len(order) == 48
    for epoch in range(2):
        assert sorted(order[21 * epoch : 21 * (epoch + 1)]) == list(range(21))
    assert order[:21] != order[21:42]


def test_several_turns_are_all_trained(base, tmp_path):
    turns = [
        {"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")
    ]
    rows = [*ROWS[:30], {"messages": turns}]
    item = Input("model", "sha256:0", path=base)
    tokenizer = load_tokenizer(item)
    [row] = encode_conversation(tokenizer, turns)
    assert sum(row.trained) == sum(
        len(encode_completion(tokenizer, f"assistant {i}", True)) for i in range(2)
    )
    _, out = run(make_job(tmp_path / "run", base, rows, max_steps=1))
    assert out.derived["rows"] + 1 >= 30


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_train_the_same_model(finished, base, tmp_path):
    job = make_job(tmp_path / "run", base, max_steps=6, checkpoint_every_steps=2)
    (job.work / "job.json").write_text(job.to_json())
    script = tmp_path / "two.py"
    script.write_text(
        "import os, sys; from pathlib import Path; from pipeline.job import Job, Out\n"
        "from pipeline.settings import Settings; from stages import sft\n"
        "job = Job.from_json(Path(sys.argv[1]).read_text())\n"
        "out = Out(job, int(os.environ['RANK']), int(os.environ['WORLD_SIZE']))\n"
        "assert out.world_size == 2\n"
        "metrics = sft.run(Settings.model_validate(job.settings), job.inputs, out)\n"
        "Path(sys.argv[2], f'rank{out.rank}').write_text(str(metrics['heldout_loss']))\n"
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    done = subprocess.run(
        [*launch, str(script), str(job.work / "job.json"), str(tmp_path)],
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
    losses = [float((tmp_path / f"rank{rank}").read_text()) for rank in range(2)]
    assert losses[0] == losses[1] == pytest.approx(finished[0]["heldout_loss"], abs=1e-4)
    assert len(list((job.work / "checkpoints" / "checkpoint-4").glob("rng_state_*"))) == 2
    expected = weights(finished[1].artifact)
    for name, weight in weights(job.work / "artifact.tmp").items():
        assert torch.allclose(weight, expected[name], atol=1e-5), name
