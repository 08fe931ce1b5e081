"""dpo: which pairs are trained on, that the loss is the paper's, and what a stop leaves behind."""

import math

import pytest
import torch

from pipeline import worker
from pipeline.errors import StageError, Stopped
from pipeline.job import Input, Out
from pipeline.records import Ranking, write_jsonl
from pipeline.settings import Settings
from stages import dpo
from stages.chat import encode_completion, encode_prompt
from stages.models import load_causal_lm, load_tokenizer
from stages.preferences import encode_pairs, preference_metrics
from tests.unit.tiny_policy import make_job, make_world, rows_of, weights_bytes

OWN = {
    "lr": 3e-3,
    "minibatch_rows": 8,
    "max_steps": 6,
    "eval_every_steps": 3,
    "checkpoint_every_steps": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("llama"))


def run(job):
    out = Out(job)
    return dpo.run(Settings.model_validate(job.settings), job.inputs, out), out


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    return run(make_job("dpo", tmp_path_factory.mktemp("whole") / "run", world, **OWN))


def response_logprob(model, prompt, response):
    """Sum of the logprobs of the response's tokens, one row, from the logits."""
    logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    places = range(len(prompt), len(prompt) + len(response))
    return sum(logprobs[at - 1, (prompt + response)[at]].item() for at in places)


def test_the_policy_learns_the_training_pairs_and_is_published(world, finished):
    metrics, out = finished
    rows = rows_of(out)
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[0]["heldout_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["heldout_margin"] == pytest.approx(0, abs=1e-5)
    assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss"] < rows[1]["loss"] - 0.02
    assert metrics["heldout_accuracy"] > 0.5
    assert [row["step"] for row in rows if "heldout_loss" in row] == [0, 3, 6]
    load_causal_lm(Input("model", "sha256:0", path=out.artifact))
    assert out.contract["pad_id"] != out.contract["eos_id"]


def test_pairs_are_the_strict_ones_and_the_rest_is_counted(world, finished):
    metrics, out = finished
    # 24 rankings of 1 > 2 = 2: 19 to train on, 5 held out, two strict pairs and a tie in each
    assert metrics["pairs"] == 38
    assert metrics["heldout_pairs"] == 10
    assert out.derived["train_pairs_dropped"] == {"tie": 19}
    assert out.derived["heldout_pairs_dropped"] == {"tie": 5}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_on_two_responses_is_that_of_the_paper(architecture, tmp_path):
    """-log sigmoid(beta (log p(c)/q(c) - log p(r)/q(r))), from logits, after a step of training."""
    world = make_world(tmp_path / "world", architecture)
    only = tmp_path / "rankings"
    only.mkdir()
    rows = [
        Ranking(({"role": "user", "content": text},), ("blue it is", "no"), (1, 2), "ann", split)
        for text, split in [("Say blue", "train"), ("Say red", "heldout")]
    ]
    write_jsonl(only / "rankings.jsonl", [row.to_row() for row in rows])
    small = {**OWN, "beta": 0.7, "minibatch_rows": 1, "max_steps": 2, "warmup_fraction": 0.0}
    metrics, out = run(make_job("dpo", tmp_path / "run", {**world, "rankings": only}, **small))
    tokenizer = load_tokenizer(Input("model", "sha256:0", path=world["base"]))
    reference = load_causal_lm(Input("model", "sha256:0", path=world["base"]))
    policy = load_causal_lm(Input("model", "sha256:0", path=out.artifact))
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "Say red"}])
    ratios = []
    for text in ("blue it is", "no"):
        response = encode_completion(tokenizer, text, eos=True)
        with torch.no_grad():
            ratios.append(
                response_logprob(policy, prompt, response)
                - response_logprob(reference, prompt, response)
            )
    margin = 0.7 * (ratios[0] - ratios[1])
    assert metrics["heldout_margin"] == pytest.approx(margin, abs=1e-4)
    assert metrics["heldout_loss"] == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-4)

    # and TRL's loss of the second step is that of the weights after the first
    first = {**small, "max_steps": 1, "lr": small["lr"]}
    metrics, out = run(make_job("dpo", tmp_path / "one", {**world, "rankings": only}, **first))
    policy = load_causal_lm(Input("model", "sha256:0", path=out.artifact))
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "Say blue"}])
    with torch.no_grad():
        chosen, rejected = (
            response_logprob(policy, prompt, encode_completion(tokenizer, text, eos=True))
            - response_logprob(reference, prompt, encode_completion(tokenizer, text, eos=True))
            for text in ("blue it is", "no")
        )
    loss = math.log1p(math.exp(-0.7 * (chosen - rejected)))
    second = rows_of(Out(make_job("dpo", tmp_path / "run", world, **small)))[2]
    assert loss != pytest.approx(math.log(2), abs=1e-3)
    assert second["loss"] == pytest.approx(loss, abs=1e-4)
    assert second["rewards/margins"] == pytest.approx(0.7 * (chosen - rejected), abs=1e-4)


def test_loss_accuracy_and_margin_by_hand():
    logprobs = torch.tensor([-1.0, -5.0]), torch.tensor([-2.0, -5.0])
    reference = torch.tensor([-2.0, -5.0]), torch.tensor([-2.0, -5.0])
    found = preference_metrics(logprobs, reference, beta=2.0)
    assert found["margin"] == pytest.approx(1.0)
    assert found["accuracy"] == pytest.approx(0.75)
    expected = (math.log1p(math.exp(-2.0)) + math.log(2)) / 2
    assert found["loss"] == pytest.approx(expected)


def test_best_against_worst_is_one_pair_a_ranking(world):
    tokenizer = load_tokenizer(Input("model", "sha256:0", path=world["base"]))
    messages = ({"role": "user", "content": "Say red"},)
    ranking = Ranking(messages, ("one", "two", "three", "red"), (2, 1, 3, 3), "ann")
    everything = encode_pairs([ranking], tokenizer, 64)
    assert len(everything.pairs) == 5
    assert everything.tally.reasons == {"tie": 1}
    [pair], tally = encode_pairs([ranking], tokenizer, 64, best_worst=True)
    assert pair.chosen == encode_completion(tokenizer, "two", eos=True)
    assert pair.rejected == encode_completion(tokenizer, "three", eos=True)
    assert tally.reasons == {"tie": 1, "not best against worst": 4}


def test_pairs_that_are_too_long_are_counted(world):
    tokenizer = load_tokenizer(Input("model", "sha256:0", path=world["base"]))
    messages = ({"role": "user", "content": "Say red"},)
    ranking = Ranking(messages, ("one", "two " * 30, "red"), (1, 2, 3), "ann")
    pairs, tally = encode_pairs([ranking], tokenizer, 24)
    assert len(pairs) == 1
    assert tally.reasons == {"longer than 24 tokens with its prompt": 2}


def test_rankings_that_are_all_ties_are_refused(world, tmp_path):
    only = tmp_path / "rankings"
    only.mkdir()
    messages = ({"role": "user", "content": "Say red"},)
    rows = [Ranking(messages, ("a", "b"), (1, 1), "ann", split) for split in ("train", "heldout")]
    write_jsonl(only / "rankings.jsonl", [row.to_row() for row in rows])
    with pytest.raises(StageError, match=r"no train pair can be used.*1 tie"):
        run(make_job("dpo", tmp_path / "run", {**world, "rankings": only}, **OWN))


@pytest.mark.parametrize("lora", [{}, {"rank": 2}])
def test_a_stopped_run_ends_with_the_same_bytes_and_rows(
    world, finished, tmp_path, monkeypatch, lora
):
    own = {**OWN, "lora": lora}
    whole = finished[1] if not lora else run(make_job("dpo", tmp_path / "whole", world, **own))[1]
    job = make_job("dpo", tmp_path / "run", world, **own)
    calls = iter([False] * 2 + [True])
    monkeypatch.setattr(worker, "stop_requested", lambda: next(calls, True))
    with pytest.raises(Stopped):
        run(job)
    monkeypatch.undo()
    _, out = run(job)
    assert out.resumed_from == 3
    assert rows_of(out) == rows_of(whole)
    assert weights_bytes(out) == weights_bytes(whole)


def test_adapters_move_their_layers_only(world, tmp_path):
    from safetensors.torch import load_file

    _, out = run(make_job("dpo", tmp_path / "run", world, **{**OWN, "lora": {"rank": 2}}))
    before = load_file(world["base"] / "model.safetensors")
    after = load_file(out.artifact / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("proj" in name or "c_" in name for name in moved)


def test_accumulation_changes_memory_and_not_the_result(world, finished, tmp_path):
    _, out = run(make_job("dpo", tmp_path / "run", world, **{**OWN, "accumulation_steps": 2}))
    for row, expected in zip(rows_of(out), rows_of(finished[1]), strict=True):
        assert row.get("loss") == pytest.approx(expected.get("loss"), abs=1e-4)
        assert row.get("heldout_loss") == pytest.approx(expected.get("heldout_loss"), abs=1e-4)
