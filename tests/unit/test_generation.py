"""Our decode loop and rollout tensors against `generate` of transformers and against themselves."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stages.generation import generate
from stages.rollout import (
    make_sequences,
    over_responses,
    response_logprobs,
)

EOS, PAD, V = 2, 0, 61
PROMPTS = [[5, 6, 7], [8] * 10, [9, 10], [11, 12, 13, 14]] * 3
CPU = torch.device("cpu")


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shared = {"vocab_size": V, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                **shared,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **shared)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            # sharp distributions, so that a wrong position shows
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


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


both = pytest.mark.parametrize("kind", ["llama", "gpt2"])


@both
def test_greedy_decoding_equals_that_of_transformers(kind: str) -> None:
    model = tiny(kind)
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
    model = tiny(kind)
    found = sample(model, temperature=0.7)
    batch = make_sequences(PROMPTS, [g.tokens for g in found], PAD, CPU)
    with torch.no_grad():
        logprobs = over_responses(lambda b: response_logprobs(model, b, 0.7)[0], batch, 5)
    for row, generated in zip(logprobs, found, strict=True):
        expected = torch.tensor(generated.logprobs)
        assert (row[: len(expected)] - expected).abs().max() < 1e-5


@both
def test_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    model = tiny(kind)
    together = sample(model)
    alone = [sample(model, [p], seeds=[i])[0] for i, p in enumerate(PROMPTS)]
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    assert [g.tokens for g in sample(model, rows_at_once=2)] == [g.tokens for g in alone]
    assert any(g.ended for g in together), "some rows must end early for this to prove anything"


def test_sampled_frequencies_fit_the_exact_probabilities() -> None:
    model = tiny("llama")
    count, temperature = 4000, 1.3
    found = sample(
        model, [[5, 6]] * count, temperature, tokens=1, seeds=list(range(count)), rows_at_once=500
    )
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]])).logits[0, -1]
    probs = (logits / temperature).softmax(-1).double()
    counts = torch.bincount(torch.tensor([g.tokens[0] for g in found]), minlength=V).double()
    assert (probs * count >= 5).all(), "the test needs enough draws of every token"
    expected = probs / probs.sum() * count
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


def test_top_p_never_takes_a_token_outside_the_nucleus() -> None:
    model = tiny("llama")
    found = sample(model, [[5, 6]] * 300, 1.0, tokens=1, seeds=list(range(300)), top_p=0.5)
    with torch.no_grad():
        probs = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    ordered = probs.sort(descending=True)
    size = int((ordered.values.cumsum(0) < 0.5).sum()) + 1
    assert {g.tokens[0] for g in found} <= set(ordered.indices[:size].tolist())
    assert size < V / 2


def test_the_end_token_belongs_to_the_response_and_ends_it() -> None:
    for generated in sample(tiny("llama")):
        assert generated.ended == (generated.tokens[-1] == EOS)
        assert EOS not in generated.tokens[:-1]
        assert len(generated.tokens) == len(generated.logprobs)


def test_positions_of_a_sequence_point_at_the_token_before_each_response_token() -> None:
    batch = make_sequences([[5, 6, 7], [8]], [[9, EOS], [10, 11, EOS]], PAD, CPU)
    assert batch.valid_BR.tolist() == [[True, True, False], [True, True, True]]
    assert batch.predict_BR[0, :2].tolist() == [2, 3]
    assert batch.predict_BR[1].tolist() == [0, 1, 2]
    assert batch.responses_BR[0, :2].tolist() == [9, EOS]
    assert batch.responses_BR[1].tolist() == [10, 11, EOS]
    only = batch.rows([1])
    assert only.tokens_BT.tolist() == [[8, 10, 11, EOS]]
