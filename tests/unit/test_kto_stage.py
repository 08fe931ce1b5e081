"""kto: which responses are desirable, that the loss is the paper's, and what a stop leaves behind."""

import math

import pytest
import torch
from pydantic import ValidationError

from pipeline import worker
from pipeline.errors import StageError, Stopped
from pipeline.job import Input, Out
from pipeline.records import Ranking, write_jsonl
from pipeline.settings import Settings
from stages import dpo, kto
from stages.chat import encode_completion, encode_prompt
from stages.models import load_causal_lm, load_tokenizer
from stages.preferences import Pair, encode_labels, kto_metrics, mismatched
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


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_tokenizer(Input("model", "sha256:0", path=world["base"]))


def run(job):
    out = Out(job)
    return kto.run(Settings.model_validate(job.settings), job.inputs, out), out


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    return run(make_job("kto", tmp_path_factory.mktemp("whole") / "run", world, **OWN))


def response_logprob(model, prompt, response):
    """Sum of the logprobs of the response's tokens, one row, from the logits."""
    logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    places = range(len(prompt), len(prompt) + len(response))
    return sum(logprobs[at - 1, (prompt + response)[at]].item() for at in places)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def question(text):
    return ({"role": "user", "content": text},)


# ---- labels --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((1, 2), [True, False]),
        ((2, 1, 3), [None, True, False]),
        ((1, 2, 2), [True, False, False]),
        ((1, 1, 2), [True, True, False]),
        ((1, 2, 3, 4), [True, True, False, False]),
        # the middle tier of three, but above three responses and below one
        ((1, 2, 3, 3, 3), [True, True, False, False, False]),
        ((1, 2, 2, 3), [True, None, None, False]),
        ((1, 1), [None, None]),
    ],
)
def test_what_stands_above_more_than_below_is_desirable(tokenizer, ranks, expected):
    texts = ("one", "two", "three", "red", "blue")[: len(ranks)]
    examples, tally = encode_labels([Ranking(question("Say"), texts, ranks, "a")], tokenizer, 64)
    labels = {tuple(e.response): e.desirable for e in examples}
    ids = [tuple(encode_completion(tokenizer, text, eos=True)) for text in texts]
    assert [labels.get(i) for i in ids] == expected
    assert tally.reasons["in the middle of its ranking"] == expected.count(None)
    assert tally.used == len(examples) == len(ranks) - expected.count(None)
    assert all(e.prompt == encode_prompt(tokenizer, list(question("Say"))) for e in examples)


def test_a_label_is_that_of_most_of_the_pairs(tokenizer):
    """Taking pairs apart gives a response one label for each of its pairs."""
    texts = ("one", "two", "three", "red", "blue")
    for ranks in [(1, 2, 3, 4, 5), (1, 3, 2, 2, 4), (1, 1, 2, 2, 2), (2, 1, 1, 3, 3)]:
        ranking = Ranking(question("Say"), texts, ranks, "a")
        votes = dict.fromkeys(texts, 0)
        for chosen, rejected in ranking.strict_pairs:
            votes[texts[chosen]] += 1
            votes[texts[rejected]] -= 1
        examples, _ = encode_labels([ranking], tokenizer, 64)
        labels = {tuple(e.response): e.desirable for e in examples}
        for text, vote in votes.items():
            found = labels.get(tuple(encode_completion(tokenizer, text, eos=True)))
            assert found == (None if vote == 0 else vote > 0)


def test_what_is_left_out_is_counted(world, finished, tokenizer):
    metrics, out = finished
    # 24 rankings of 1 > 2 = 2: 19 to train on with a good and two bad ones each
    assert (metrics["responses"], metrics["desirable"], metrics["heldout_pairs"]) == (57, 19, 10)
    assert out.derived["train_responses_dropped"] == {}
    assert out.derived["heldout_pairs_dropped"] == {"tie": 5}
    # both kinds count the same in sum
    assert out.derived["desirable_weight"] == 2.0
    ranking = Ranking(question("Say"), ("one", "two " * 30, "red"), (1, 2, 3), "ann")
    examples, tally = encode_labels(
        [ranking, Ranking(question("Say"), ("two " * 30, "red"), (1, 2), "ann")], tokenizer, 24
    )
    assert len(examples) == 3
    assert tally.reasons == {
        "in the middle of its ranking": 1,
        "longer than 24 tokens with its prompt": 1,
    }


# ---- the loss ------------------------------------------------------------------------------


def test_the_policy_learns_and_is_published(finished):
    metrics, out = finished
    rows = rows_of(out)
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[0]["heldout_loss"] == pytest.approx(0.5, abs=1e-6)
    assert rows[0]["heldout_margin"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["heldout_kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["rewards/margins"] > 0.02
    assert rows[-1]["heldout_loss"] < 0.5
    assert metrics["heldout_accuracy"] > 0.5
    assert [row["step"] for row in rows if "heldout_loss" in row] == [0, 3, 6]
    load_causal_lm(Input("model", "sha256:0", path=out.artifact))
    assert out.contract["pad_id"] != out.contract["eos_id"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_of_a_step_is_that_of_the_paper(architecture, tmp_path, monkeypatch):
    """Eq. 7 from logits after a step of training, the reference point from the row before."""
    world = make_world(tmp_path / "world", architecture)
    only = tmp_path / "rankings"
    only.mkdir()
    rankings = [
        Ranking(question(text), ("blue it is " * n, "no"), (1, 2), "ann", split)
        for n, (text, split) in enumerate(
            [("Say blue", "train"), ("Say red please", "train"), ("Say two", "heldout")], 1
        )
    ]
    write_jsonl(only / "rankings.jsonl", [ranking.to_row() for ranking in rankings])
    world = {**world, "rankings": only}
    beta, desirable, undesirable = 0.7, 1.3, 0.6
    own = {
        **OWN,
        "beta": beta,
        "desirable_weight": desirable,
        "undesirable_weight": undesirable,
        "minibatch_rows": 4,
        "warmup_fraction": 0.0,
    }
    seen = []
    real = kto._rows
    monkeypatch.setattr(kto, "_rows", lambda *a: (seen.append(a[0]), real(*a))[1])
    _, out = run(make_job("kto", tmp_path / "run", world, **{**own, "max_steps": 2}))
    second = rows_of(out)[2]
    examples = seen[0][4:]
    assert {e.desirable for e in examples} == {True, False}

    _, first = run(make_job("kto", tmp_path / "one", world, **{**own, "max_steps": 1}))
    policy = load_causal_lm(Input("model", "sha256:0", path=first.artifact))
    reference = load_causal_lm(Input("model", "sha256:0", path=world["base"]))

    @torch.no_grad()
    def ratio(prompt, response):
        return response_logprob(policy, prompt, response) - response_logprob(
            reference, prompt, response
        )

    # the row before, and for the first one the last
    point = sum(ratio(e.prompt, examples[i - 1].response) for i, e in enumerate(examples)) / 4
    point = max(0.0, point)
    losses = [
        desirable * (1 - sigmoid(beta * (ratio(e.prompt, e.response) - point)))
        if e.desirable
        else undesirable * (1 - sigmoid(beta * (point - ratio(e.prompt, e.response))))
        for e in examples
    ]
    assert second["kl"] == pytest.approx(point, abs=1e-4)
    assert second["loss"] == pytest.approx(sum(losses) / 4, abs=1e-4)
    gains = [beta * ratio(e.prompt, e.response) for e in examples if e.desirable]
    assert second["rewards/chosen"] == pytest.approx(sum(gains) / len(gains), abs=1e-4)
    # and it moved: none of this holds trivially
    assert abs(second["rewards/margins"]) > 1e-2


def test_heldout_loss_and_reference_point_by_hand():
    logprobs = torch.tensor([-1.0, -5.0]), torch.tensor([-2.0, -7.0])
    reference = torch.tensor([-2.0, -5.0]), torch.tensor([-2.0, -5.0])
    other = torch.tensor([-3.0, -3.0]), torch.tensor([-4.0, -4.0])
    ref_other = torch.tensor([-4.0, -3.0]), torch.tensor([-4.0, -5.0])
    found = kto_metrics(logprobs, reference, other, ref_other, beta=2.0)
    # log ratios 1 and 0 of the chosen, 0 and -2 of the rejected; mismatched 1, 0, 0, 1
    assert found["kl"] == pytest.approx(0.5)
    values = [sigmoid(2 * 0.5), sigmoid(-2 * 0.5), sigmoid(2 * 0.5), sigmoid(2 * 2.5)]
    assert found["loss"] == pytest.approx(1 - sum(values) / 4)
    assert found["accuracy"] == 1.0
    assert found["margin"] == pytest.approx((2.0 + 4.0) / 2)
    # below 0 the estimate says nothing
    assert kto_metrics(logprobs, reference, ref_other, other, beta=2.0)["kl"] == 0.0


def test_mismatched_responses_come_from_half_the_list_away_and_fit():
    pairs = [Pair([i] * (i + 1), [i] * 5, [i + 10] * 3, str(i)) for i in range(5)]
    found = mismatched(pairs, 7)
    assert [pair.prompt for pair in found] == [pair.prompt for pair in pairs]
    assert [pair.chosen[0] for pair in found] == [2, 3, 4, 0, 1]
    assert [pair.rejected[0] for pair in found] == [12, 13, 14, 10, 11]
    assert [len(pair.chosen) for pair in found] == [5, 5, 4, 3, 2]
    assert [len(pair.rejected) for pair in found] == [3, 3, 3, 3, 2]


def test_the_heldout_pairs_are_those_of_dpo(world, finished, tmp_path):
    job = make_job("dpo", tmp_path / "run", world, **{**OWN, "max_steps": 1})
    out = Out(job)
    metrics = dpo.run(Settings.model_validate(job.settings), job.inputs, out)
    assert metrics["heldout_pairs"] == finished[0]["heldout_pairs"]
    one, two = rows_of(out)[0], rows_of(finished[1])[0]
    assert one["heldout_accuracy"] == two["heldout_accuracy"]


# ---- rows ----------------------------------------------------------------------------------


def test_the_reference_point_s_responses_stay_within_a_step():
    examples = [kto.Labelled([i], [10 + i], i % 2 == 0, str(i)) for i in range(6)]
    rows = kto._rows(examples, 3)
    assert [row["completion_ids"] for row in rows] == [[10], [11], [12], [13], [14], [15]]
    assert [row["KL_completion_ids"] for row in rows] == [[12], [10], [11], [15], [13], [14]]
    assert [row["label"] for row in rows] == [True, False] * 3


@pytest.mark.parametrize("mask", ["completion_mask", "KL_completion_mask"])
def test_a_collator_that_loses_a_token_is_noticed(world, tmp_path, monkeypatch, mask):
    real = kto.make_trainer

    def broken(*given, **special):
        trainer = real(*given, **special)
        collate = trainer.data_collator

        def lose(rows):
            batch = collate(rows)
            batch[mask][0, batch[mask][0].nonzero()[0]] = 0
            return batch

        trainer.data_collator = lose
        return trainer

    monkeypatch.setattr(kto, "make_trainer", broken)
    with pytest.raises(StageError, match=rf"would compare \d+ tokens \({mask}\)"):
        run(make_job("kto", tmp_path / "run", world, **OWN))


def test_a_response_that_does_not_fit_behind_another_prompt_is_cut(world, tmp_path, monkeypatch):
    """Long prompts have short responses and the other way round: no row alone is too long."""
    only = tmp_path / "rankings"
    only.mkdir()
    rankings = [
        Ranking(question("Say " + "red " * n), ("blue " * (18 - n), "no"), (1, 2), "ann", split)
        for n in (1, 9, 17)
        for split in ("train", "heldout")
    ]
    write_jsonl(only / "rankings.jsonl", [ranking.to_row() for ranking in rankings])
    seen = []
    real = kto._rows
    monkeypatch.setattr(kto, "_rows", lambda *a: (seen.extend(real(*a)), seen)[1])
    job = make_job("kto", tmp_path / "run", {**world, "rankings": only}, **OWN, max_length=40)
    metrics, out = run(job)
    assert metrics["responses"] == 6, out.derived
    assert max(len(row["prompt_ids"] + row["completion_ids"]) for row in seen) <= 40
    assert max(len(row["prompt_ids"] + row["KL_completion_ids"]) for row in seen) > 40
    assert math.isfinite(metrics["heldout_loss"])


# ---- what cannot work ----------------------------------------------------------------------


def test_rankings_that_are_all_ties_are_refused(world, tmp_path):
    only = tmp_path / "rankings"
    only.mkdir()
    rows = [
        Ranking(question("Say red"), ("a", "b"), (1, 1), "ann", split)
        for split in ("train", "heldout")
    ]
    write_jsonl(only / "rankings.jsonl", [row.to_row() for row in rows])
    with pytest.raises(StageError, match=r"no train response can be used.*2 in the middle"):
        run(make_job("kto", tmp_path / "run", {**world, "rankings": only}, **OWN))


def test_responses_of_one_kind_are_refused(world, tmp_path):
    only = tmp_path / "rankings"
    only.mkdir()
    rows = [
        Ranking(question("Say red"), ("blue " * n, "no"), (1, 2), "ann", split)
        for split, n in (("train", 40), ("heldout", 1))
    ]
    write_jsonl(only / "rankings.jsonl", [row.to_row() for row in rows])
    job = make_job("kto", tmp_path / "run", {**world, "rankings": only}, **OWN, max_length=40)
    with pytest.raises(StageError, match=r"all of the 1 responses .* are undesirable"):
        run(job)


def test_a_micro_batch_of_one_row_is_refused_before_anything_starts():
    tree = {"model": {"base": "b"}, "rank": {"data": "r"}, "run": {"policy": "kto"}}
    with pytest.raises(ValidationError, match="two rows in every micro-batch"):
        Settings.model_validate({**tree, "kto": {"minibatch_rows": 4, "accumulation_steps": 4}})
    Settings.model_validate({**tree, "kto": {"minibatch_rows": 4, "accumulation_steps": 2}})


# ---- stop and resume -----------------------------------------------------------------------


@pytest.mark.parametrize("lora", [{}, {"rank": 2}])
def test_a_stopped_run_ends_with_the_same_bytes_and_rows(
    world, finished, tmp_path, monkeypatch, lora
):
    own = {**OWN, "lora": lora}
    whole = finished[1] if not lora else run(make_job("kto", tmp_path / "whole", world, **own))[1]
    job = make_job("kto", tmp_path / "run", world, **own)
    calls = iter([False] * 2 + [True])
    monkeypatch.setattr(worker, "stop_requested", lambda: next(calls, True))
    with pytest.raises(Stopped):
        run(job)
    monkeypatch.undo()
    _, out = run(job)
    assert out.resumed_from == 3
    assert rows_of(out) == rows_of(whole)
    assert weights_bytes(out) == weights_bytes(whole)


def test_accumulation_starts_at_the_same_loss(world, finished, tmp_path):
    """Later on the reference points of smaller micro-batches differ, and with them the numbers."""
    _, out = run(make_job("kto", tmp_path / "run", world, **{**OWN, "accumulation_steps": 2}))
    one, two = rows_of(finished[1])[1], rows_of(out)[1]
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
