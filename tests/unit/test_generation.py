"""Our decode loop and rollout tensors against `generate` of transformers and against themselves."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import PreTrainedModel

from stages.generation import Generated, generate
from stages.rollout import (
    make_sequences,
    over_responses,
    response_logprobs,
)
from tests.tiny_models import EOS, KINDS, PAD, all_responses, exact_logprob, tiny_model

PROMPTS = [[5, 6, 7], [8] * 10, [9, 10], [11, 12, 13, 14]] * 3
CPU = torch.device("cpu")


def sample(model: PreTrainedModel, prompts=PROMPTS, temperature=1.0, **options):  # type: ignore[no-untyped-def]
    return generate(
        model,
        prompts,
        options.pop("seeds", list(range(len(prompts)))),
        eos_id=EOS,
        pad_id=PAD,
        max_response_tokens=options.pop("tokens", 30),
        temperature=temperature,
        **options,
    )


both = pytest.mark.parametrize("kind", KINDS)


@both
def test_greedy_decoding_equals_that_of_transformers(kind: str) -> None:
    model = tiny_model(kind)
    for prompt, ours in zip(PROMPTS, sample(model, temperature=0), strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        assert theirs[0, len(prompt) :].tolist() == ours.tokens


@both
def test_logprobs_of_decoding_equal_those_of_a_right_padded_forward(kind: str) -> None:
    model = tiny_model(kind)
    found = sample(model, temperature=0.7)
    batch = make_sequences(PROMPTS, [g.tokens for g in found], PAD, CPU)
    with torch.no_grad():
        logprobs = over_responses(lambda b: response_logprobs(model, b, 0.7)[0], batch, 5)
    for row, generated in zip(logprobs, found, strict=True):
        expected = torch.tensor(generated.logprobs)
        assert (row[: len(expected)] - expected).abs().max() < 1e-5


@both
def test_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    model = tiny_model(kind)
    together = sample(model)
    alone = [sample(model, [p], seeds=[i])[0] for i, p in enumerate(PROMPTS)]
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    assert [g.tokens for g in sample(model, rows_at_once=2)] == [g.tokens for g in alone]
    assert any(g.ended for g in together), "some rows must end early for this to prove anything"


def pvalue_of(found: list[Generated], probs: Tensor, categories: list[list[int]]) -> float:
    """Chi-square of the frequencies of whole responses; what is expected too rarely is put together."""
    place = {tuple(category): i for i, category in enumerate(categories)}
    counts = torch.bincount(
        torch.tensor([place[tuple(g.tokens)] for g in found]), minlength=len(categories)
    ).double()
    expected = probs.double() / probs.double().sum() * len(found)
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
        expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    return float(chisquare(counts.numpy(), expected.numpy()).pvalue)


@both
def test_sampled_responses_fit_their_exact_probabilities(kind: str) -> None:
    """All responses of three tokens, from two prompts that share batches: cache, positions, draws."""
    # four tokens, and a distribution in which the temperature matters
    model = tiny_model(kind, vocab_size=4, width=16, seed=3, sharpness=10.0)
    prompts, each, temperature = [[1, 3], [3, 0, 1, 1, 0]], 1500, 0.8
    found = sample(
        model,
        prompts * each,
        temperature,
        tokens=3,
        seeds=list(range(2 * each)),
        rows_at_once=250,
    )
    categories = all_responses(4, EOS, 3)
    for at, prompt in enumerate(prompts):
        with torch.no_grad():
            right, wrong = (
                torch.stack([exact_logprob(model, prompt, c, t) for c in categories]).exp()
                for t in (temperature, 1.0)
            )
        assert right.sum().item() == pytest.approx(1.0, abs=1e-5)
        assert pvalue_of(found[at::2], right, categories) > 1e-3
        # and the test has the power to see that the temperature was forgotten
        assert pvalue_of(found[at::2], wrong, categories) < 1e-3


def test_sampled_tokens_of_a_larger_vocabulary_fit_their_exact_probabilities() -> None:
    model = tiny_model("llama")
    count, temperature = 4000, 1.3
    found = sample(
        model, [[5, 6]] * count, temperature, tokens=1, seeds=list(range(count)), rows_at_once=500
    )
    with torch.no_grad():
        probs = (model(torch.tensor([[5, 6]])).logits[0, -1] / temperature).softmax(-1)
    assert (probs * count >= 5).all(), "the test needs enough draws of every token"
    assert pvalue_of(found, probs, [[token] for token in range(len(probs))]) > 1e-3


def test_top_p_never_takes_a_token_outside_the_nucleus() -> None:
    model = tiny_model("llama")
    found = sample(model, [[5, 6]] * 300, 1.0, tokens=1, seeds=list(range(300)), top_p=0.5)
    with torch.no_grad():
        probs = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    ordered = probs.sort(descending=True)
    size = int((ordered.values.cumsum(0) < 0.5).sum()) + 1
    assert {g.tokens[0] for g in found} <= set(ordered.indices[:size].tolist())
    assert size < len(probs) / 2


def test_the_end_token_belongs_to_the_response_and_ends_it() -> None:
    for generated in sample(tiny_model("llama")):
        assert generated.ended == (generated.tokens[-1] == EOS)
        assert EOS not in generated.tokens[:-1]
        assert len(generated.tokens) == len(generated.logprobs)
