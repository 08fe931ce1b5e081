"""Prompts and responses as tensors: every number against one row read alone, without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages import ppo_math
from stages.common import micro_batches
from stages.rollout import (
    Sequences,
    all_logprobs,
    in_full,
    in_micro_batches,
    make_sequences,
    mean_repetition,
    over_responses,
    response_logprobs,
    rows_to_score,
    score_all,
)
from tests.tiny_models import EOS, KINDS, PAD, in_float64, tiny_model, tiny_reward_model

CPU = torch.device("cpu")
TEMPERATURE = 0.7
PROMPTS = [[5, 6, 7], [8] * 10, [9, 10], [11, PAD, 13, 14], [15], [16, 17, 18, 19, 20, 21]]
RESPONSES = [[9, EOS], [10, 11, PAD, 12, EOS], [13], [EOS], [14, 15, 16, 17, 18, 19, 20], [21, 22]]
both = pytest.mark.parametrize("kind", KINDS)


def batch_of(order: list[int] | None = None) -> Sequences:
    order = list(range(len(PROMPTS))) if order is None else order
    return make_sequences([PROMPTS[i] for i in order], [RESPONSES[i] for i in order], PAD, CPU)


def alone(model: nn.Module, row: int) -> tuple[Tensor, Tensor]:
    """(logprobs, entropies) of one response, position by position, from an unpadded forward."""
    prompt, response = PROMPTS[row], RESPONSES[row]
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / TEMPERATURE
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    picked = torch.stack([logprobs[r, token] for r, token in enumerate(response)])
    return picked, -(logprobs.exp() * logprobs).sum(-1)


# ---- sequences -----------------------------------------------------------------------------


def test_slots_point_at_the_response_and_at_the_token_before_it() -> None:
    batch = make_sequences([[5, 6, 7], [8]], [[9, EOS], [10, 11, 12, EOS]], PAD, CPU)
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 9, EOS], [8, 10, 11, 12, EOS]]
    assert batch.prompt_tokens_B.tolist() == [3, 1]
    assert batch.response_tokens_B.tolist() == [2, 4]
    assert batch.valid_BR.tolist() == [[True, True, False, False], [True] * 4]
    # clamped where not valid: a position outside of T could not be read
    assert batch.predict_BR.tolist() == [[2, 3, 4, 4], [0, 1, 2, 3]]
    assert batch.responses_BR[batch.valid_BR].tolist() == [9, EOS, 10, 11, 12, EOS]
    assert batch.responses_BR.shape == batch.valid_BR.shape
    assert batch.predicts_BT.tolist() == [
        [False, False, True, True, False],
        [True, True, True, True, False],
    ]


def test_numbers_of_all_response_tokens_find_their_slots() -> None:
    batch = make_sequences([[5, 6, 7], [8]], [[9, EOS], [10, 11, EOS]], PAD, CPU)
    spread = batch.spread(torch.tensor([1, 2, 3, 4, 5], dtype=torch.float64))
    assert spread.tolist() == [[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]]
    assert spread.dtype == torch.float64


def test_some_rows_are_cut_to_the_longest_of_them() -> None:
    batch = make_sequences([[5, 6, 7], [8], [9]], [[9, EOS], [10, 11, EOS], [12]], PAD, CPU)
    some = batch.rows([2, 1])
    assert some.tokens_BT.tolist() == [[9, 12, PAD, PAD], [8, 10, 11, EOS]]
    assert some.prompt_tokens_B.tolist() == [1, 1]
    assert some.response_tokens_B.tolist() == [1, 3]
    assert batch.rows([2]).tokens_BT.tolist() == [[9, 12]]


def test_a_response_without_tokens_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="without tokens"):
        make_sequences([[5], [6]], [[7], []], PAD, CPU)


# ---- logprobs ------------------------------------------------------------------------------


def test_the_padding_comes_off_again() -> None:
    batch = batch_of()
    assert batch.as_lists(batch.responses_BR) == RESPONSES
    with pytest.raises(ValueError, match="longer"):
        batch.as_lists(batch.responses_BR[:-1])


def test_prompts_and_responses_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="longer"):
        make_sequences([[5]], [[6], [7]], PAD, CPU)


def test_a_response_that_was_cut_is_scored_with_an_end_token() -> None:
    rows, is_cut = rows_to_score([[5], [6, 7]], [[8, EOS], [EOS, 9]], EOS)
    assert rows == [[5, 8, EOS], [6, 7, EOS, 9, EOS]]
    assert is_cut == [False, True]
    with pytest.raises(ValueError, match="longer"):
        rows_to_score([[5]], [[8], [9]], EOS)


def test_all_is_made_on_the_device_that_was_given_and_not_on_the_default_one() -> None:
    model, reward_model = tiny_model("llama"), tiny_reward_model("llama")
    rows = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    scores_B = score_all(reward_model, rows, PAD, CPU)
    expected_BR = all_logprobs(model, batch_of(), TEMPERATURE)
    with torch.device("meta"):
        batch = batch_of()
        made = [*batch, *batch.rows([0, 2]), batch.valid_BR, batch.predict_BR, batch.predicts_BT]
        logprobs_BR, entropy_BR = response_logprobs(model, batch, TEMPERATURE, with_entropy=True)
        assert entropy_BR is not None
        again_B = score_all(reward_model, rows, PAD, CPU)
        found_BR = all_logprobs(model, batch, TEMPERATURE)
        made += [logprobs_BR, entropy_BR, again_B, found_BR]
    assert {x.device for x in made} == {CPU}
    # an index on another device reads nothing, in silence
    assert torch.equal(again_B, scores_B)
    assert torch.equal(found_BR, expected_BR)


@both
def test_logprobs_in_batches_of_similar_length_are_those_of_all_at_once(kind: str) -> None:
    model = tiny_model(kind)
    batch = batch_of()
    with torch.no_grad():
        expected_BR, _ = response_logprobs(model, batch, TEMPERATURE)
    for rows_at_once in (1, 2, 64):
        found_BR = all_logprobs(model, batch, TEMPERATURE, rows_at_once)
        assert not found_BR.requires_grad
        torch.testing.assert_close(found_BR, expected_BR, atol=1e-5, rtol=0)


def test_a_head_computes_in_fp32_whatever_the_autocast() -> None:
    torch.manual_seed(0)
    head, hidden_NH = nn.Linear(16, 1), 8 + torch.rand(5, 16)
    expected_N = head(hidden_NH).squeeze(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(in_full(head, hidden_NH), expected_N)
        assert not torch.equal(head(hidden_NH).squeeze(-1).float(), expected_N)
    rounded_NH = hidden_NH.bfloat16()
    assert torch.equal(in_full(head, rounded_NH), head(rounded_NH.float()).squeeze(-1))


@both
def test_logprobs_and_entropy_are_those_of_each_row_alone(kind: str) -> None:
    model = tiny_model(kind).double()
    batch = batch_of()
    with in_float64(), torch.no_grad():
        logprobs_BR, entropy_BR = response_logprobs(model, batch, TEMPERATURE, with_entropy=True)
        assert entropy_BR is not None
        for b in range(len(PROMPTS)):
            logprobs, entropy = alone(model, b)
            valid = batch.valid_BR[b]
            torch.testing.assert_close(logprobs_BR[b, valid], logprobs, atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(entropy_BR[b, valid], entropy, atol=1e-11, rtol=1e-11)
    assert logprobs_BR[~batch.valid_BR].abs().sum() == 0
    assert entropy_BR[~batch.valid_BR].abs().sum() == 0


@both
def test_logprobs_of_temperature_1_are_those_of_the_model(kind: str) -> None:
    model, batch = tiny_model(kind), batch_of([1])
    with torch.no_grad():
        found, _ = response_logprobs(model, batch, 1.0)
        logits = model(input_ids=batch.tokens_BT).logits[0, len(PROMPTS[1]) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(RESPONSES[1]).unsqueeze(-1))
    torch.testing.assert_close(found[0], expected.squeeze(-1), atol=1e-5, rtol=0)


@both
def test_entropy_is_computed_on_request_and_has_a_gradient_on_request(kind: str) -> None:
    model, batch = tiny_model(kind, sharpness=1.0), batch_of()
    logprobs_BR, entropy_BR = response_logprobs(model, batch, TEMPERATURE, with_entropy=True)
    assert logprobs_BR.requires_grad
    assert entropy_BR is not None
    assert not entropy_BR.requires_grad
    again_BR, nothing = response_logprobs(model, batch, TEMPERATURE)
    assert nothing is None
    assert torch.equal(again_BR, logprobs_BR)
    with torch.no_grad():
        _, unasked_BR = response_logprobs(model, batch, TEMPERATURE, True, entropy_gradient=True)
    assert unasked_BR is not None
    assert not unasked_BR.requires_grad
    # against a finite difference along the gradient itself
    _, bonus_BR = response_logprobs(model, batch, TEMPERATURE, True, entropy_gradient=True)
    assert bonus_BR is not None
    bonus_BR.sum().backward()
    gradients = [(p, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    step = 1e-3 / sum(float(g.square().sum()) for _, g in gradients) ** 0.5
    totals = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, gradient in gradients:
                p.add_(sign * step * gradient)
            _, found_BR = response_logprobs(model, batch, TEMPERATURE, True)
            assert found_BR is not None
            totals.append(float(found_BR.double().sum()))
            for p, gradient in gradients:
                p.sub_(sign * step * gradient)
    expected = 2 * step * sum(float(g.square().sum()) for _, g in gradients)
    assert totals[0] - totals[1] == pytest.approx(expected, rel=0.02)


@both
@pytest.mark.parametrize("junk", [PAD, 33])
def test_more_padding_of_any_token_changes_nothing(kind: str, junk: int) -> None:
    model, batch = tiny_model(kind), batch_of()
    padding = torch.full((len(PROMPTS), 9), junk)
    wider = batch._replace(tokens_BT=torch.cat([batch.tokens_BT, padding], dim=-1))
    with torch.no_grad():
        expected, expected_entropy = response_logprobs(model, batch, TEMPERATURE, True)
        found, found_entropy = response_logprobs(model, wider, TEMPERATURE, True)
    assert expected_entropy is not None
    assert found_entropy is not None
    valid = batch.valid_BR
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=0)
    torch.testing.assert_close(found_entropy[valid], expected_entropy[valid], atol=1e-5, rtol=0)


@both
def test_the_order_of_the_rows_changes_nothing(kind: str) -> None:
    model, order = tiny_model(kind), [4, 2, 0, 5, 3, 1]
    with torch.no_grad():
        expected, _ = response_logprobs(model, batch_of(), TEMPERATURE)
        found, _ = response_logprobs(model, batch_of(order), TEMPERATURE)
    valid = batch_of(order).valid_BR
    torch.testing.assert_close(found[valid], expected[order][valid], atol=1e-6, rtol=0)


@both
def test_a_bf16_forward_is_followed_by_a_float32_softmax(kind: str) -> None:
    model, batch = tiny_model(kind).to(torch.bfloat16), batch_of([0])
    with torch.no_grad():
        found, _ = response_logprobs(model, batch, TEMPERATURE)
        logits = model(input_ids=batch.tokens_BT).logits[0, len(PROMPTS[0]) - 1 : -1]
    expected = (logits.double() / TEMPERATURE).log_softmax(-1)
    expected = expected.gather(-1, torch.tensor(RESPONSES[0]).unsqueeze(-1)).squeeze(-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0].double(), expected, atol=1e-5, rtol=0)


@both
def test_only_what_predicts_a_response_passes_the_output_head(kind: str) -> None:
    """Logits are the largest tensors of a batch: prompts must not have any."""
    model, batch = tiny_model(kind), batch_of([5, 3])  # prompts of 6 and 4 tokens, T = 8
    heads: list[torch.Size] = []
    outputs: list[Any] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, y: heads.append(y.shape))
    model.register_forward_hook(lambda _m, _i, y: outputs.append(y))
    with torch.no_grad():
        response_logprobs(model, batch, TEMPERATURE)
    assert heads[0].numel() == (2 + 1) * 61, "two responses of 2 and 1 tokens, 61 logits each"
    assert outputs[0].past_key_values is None, "a cache that nobody reads"


# ---- gradients -----------------------------------------------------------------------------


def surrogate(
    model: nn.Module,
    batch: Sequences,
    old_BR: Tensor,
    advantages_BR: Tensor,
    parts: list[list[int]],
) -> Tensor:
    """The gradient of the policy loss, micro-batch after micro-batch."""
    num_valid = int(batch.response_tokens_B.sum())
    model.zero_grad()
    for rows in parts:
        part = batch.rows(rows)
        R = part.valid_BR.shape[1]
        logprobs_BR, _ = response_logprobs(model, part, TEMPERATURE)
        ppo_math.policy_loss(
            logprobs_BR,
            old_BR[rows, :R],
            advantages_BR[rows, :R],
            part.valid_BR,
            0.2,
            0.2,
            num_valid,
        ).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


PARTITIONS: dict[str, Callable[[Sequences], list[list[int]]]] = {
    "one by one": lambda batch: [[i] for i in range(len(PROMPTS))],
    "two uneven": lambda batch: [[4], [3, 0, 1, 5, 2]],
    "buckets of similar length": lambda batch: micro_batches(
        (batch.prompt_tokens_B + batch.response_tokens_B).tolist(), 3, 20
    ),
}


@both
@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-12), (False, 1e-5)])
def test_micro_batches_give_the_gradient_of_the_whole(
    kind: str, name: str, double: bool, tolerance: float
) -> None:
    model = tiny_model(kind, sharpness=2.0)
    model = model.double() if double else model
    batch = batch_of()
    rng = torch.Generator().manual_seed(3)
    dtype = torch.float64 if double else torch.float32
    advantages_BR = torch.randn(batch.valid_BR.shape, generator=rng, dtype=dtype)
    noise_BR = torch.randn(batch.valid_BR.shape, generator=rng, dtype=dtype)

    def both_ways() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            # some ratios inside of the clip, some outside
            old_BR = response_logprobs(model, batch, TEMPERATURE)[0] + 0.2 * noise_BR
        whole = surrogate(model, batch, old_BR, advantages_BR, [list(range(len(PROMPTS)))])
        parts = surrogate(model, batch, old_BR, advantages_BR, PARTITIONS[name](batch))
        return whole, parts

    if double:
        with in_float64():
            whole, parts = both_ways()
    else:
        whole, parts = both_ways()
    assert len(PARTITIONS[name](batch)) > 1
    assert (whole - parts).norm() / whole.norm() < tolerance


@both
def test_every_response_token_is_trained_and_no_prompt_or_padding(kind: str) -> None:
    """The end token too: without it a policy never learns to stop."""
    model, batch = tiny_model(kind), batch_of()
    logprobs_BR, _ = response_logprobs(model, batch, TEMPERATURE)
    logprobs_BR.retain_grad()
    valid_BR = batch.valid_BR
    ppo_math.policy_loss(
        logprobs_BR,
        logprobs_BR.detach(),
        torch.ones_like(logprobs_BR),
        valid_BR,
        0.2,
        0.2,
        int(valid_BR.sum()),
    ).loss.backward()
    assert logprobs_BR.grad is not None
    expected = torch.where(valid_BR, -1.0 / int(valid_BR.sum()), 0.0)
    torch.testing.assert_close(logprobs_BR.grad, expected, atol=1e-9, rtol=0)
    ended = [response[-1] == EOS for response in RESPONSES]
    assert sum(ended) == 3, "some end by themselves and some are cut"


# ---- in micro-batches ----------------------------------------------------------------------


@both
@pytest.mark.parametrize("rows_at_once", [1, 2, 64])
def test_over_responses_puts_every_row_back_in_its_place(kind: str, rows_at_once: int) -> None:
    model, batch = tiny_model(kind), batch_of()
    seen: list[int] = []

    def logprobs(part: Sequences) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(len(part.tokens_BT))
        return response_logprobs(model, part, TEMPERATURE)[0]

    found = over_responses(logprobs, batch, rows_at_once)
    assert max(seen) <= rows_at_once
    assert sum(seen) == len(PROMPTS)
    with torch.no_grad():
        for b in range(len(PROMPTS)):
            expected = alone(model, b)[0]
            torch.testing.assert_close(found[b, batch.valid_BR[b]], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_micro_batches_hold_all_rows_once_within_the_budget_of_the_device(device: str) -> None:
    lengths = [900, 30, 70, 30, 700, 5000, 5000, 5000, 5000, 200, 64, 200]
    batches = list(in_micro_batches(lengths, 4, torch.device(device)))
    assert sorted(i for rows in batches for i in rows) == list(range(len(lengths)))
    budget = {"cpu": 512, "cuda": 16384}[device]
    for rows in batches:
        assert len(rows) <= 4
        assert len(rows) == 1 or len(rows) * max(lengths[i] for i in rows) <= budget
    assert any(len(rows) > 1 for rows in batches)
    full = max(len(rows) * max(lengths[i] for i in rows) for rows in batches if len(rows) > 1)
    assert full > 0.5 * budget if device == "cpu" else full == 15000


def test_logits_of_a_batch_stay_below_their_limit() -> None:
    def rows_together(vocab_size: int) -> int:
        found = in_micro_batches([8] * 40, 64, torch.device("cuda"), vocab_size)
        return max(len(rows) for rows in found)

    # 2^27 logits: 64 tokens of 2^21, 8 tokens of 2^24, and always one row
    assert rows_together(2**21) == 8
    assert rows_together(2**24) == 1
    assert rows_together(2**30) == 1
    assert rows_together(2**10) == 40


# ---- scores --------------------------------------------------------------------------------


def score_alone(model: PreTrainedModel, row: list[int]) -> float:
    hidden_TH = model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]
    return float(model.score(hidden_TH[-1]))


@both
@pytest.mark.parametrize("rows_at_once", [1, 3, 64])
def test_a_score_is_that_of_the_last_token_of_the_row_alone(kind: str, rows_at_once: int) -> None:
    model = tiny_reward_model(kind)
    # as rows are scored: an end token always stands last; pad may stand anywhere before
    rows = [p + r + [EOS] * (r[-1] != EOS) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    found = score_all(model, rows, PAD, CPU, rows_at_once)
    assert not found.requires_grad
    with torch.no_grad():
        expected = torch.tensor([score_alone(model, row) for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.std() > 0.01


def test_repetition_is_the_share_of_n_grams_that_stood_before():
    # pairs of the first: 12 23 31 12, one of four again; the second has no pair
    assert mean_repetition([[1, 2, 1, 3]], n=2) == 0
    assert mean_repetition([[1, 2, 3, 1, 2], [5]], n=2) == pytest.approx((1 / 4 + 0) / 2)
    assert mean_repetition([[7] * 8]) == pytest.approx(4 / 5)
    assert mean_repetition([[1, 2, 3, 4]]) == 0.0
