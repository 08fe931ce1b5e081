"""The reward loss and its measures against hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForSequenceClassification

from stages.common import micro_batches
from stages.reward_training import RankedRows, bootstrap_ratio, measure, pairwise_loss
from stages.rollout import last_token_scores, score_all

CPU = torch.device("cpu")


def test_the_loss_is_the_mean_over_strict_pairs() -> None:
    scores = torch.tensor([1.0, 0.0, 0.0, -2.0])
    ranks = torch.tensor([1, 2, 2, 3])  # the middle two are tied: 5 strict pairs of 6
    differences = torch.tensor([1.0, 1.0, 3.0, 2.0, 2.0])
    expected = -logsigmoid(differences).mean()
    assert pairwise_loss(scores, ranks).item() == pytest.approx(expected.item())


def test_two_responses_give_bradley_terry() -> None:
    loss = pairwise_loss(torch.tensor([0.3, 0.8]), torch.tensor([2, 1]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)))


def test_turning_the_order_round_turns_the_gradient_round() -> None:
    scores = torch.zeros(3, requires_grad=True)
    (up,) = torch.autograd.grad(pairwise_loss(scores, torch.tensor([1, 2, 3])), scores)
    (down,) = torch.autograd.grad(pairwise_loss(scores, torch.tensor([3, 2, 1])), scores)
    torch.testing.assert_close(up, -down)
    assert up[0] < 0 < up[2]


def tiny_reward_model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        num_labels=1,
    )
    return LlamaForSequenceClassification(config).eval()


def test_a_score_is_read_at_the_end_token_and_does_not_depend_on_padding() -> None:
    model = tiny_reward_model()
    rows = [[5, 6, 7, 2], [8, 9, 2], [5, 6, 7]]
    with torch.no_grad():
        together = last_token_scores(model, rows, 0, CPU)
        alone = torch.cat([last_token_scores(model, [row], 0, CPU) for row in rows])
        hidden = model.model(torch.tensor([rows[0]])).last_hidden_state[0, 3]
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert together[0].item() == pytest.approx(model.score(hidden).item(), abs=1e-6)
    assert together[0] != together[2], "the end token must count"
    torch.testing.assert_close(score_all(model, rows, 0, CPU, 1), alone, atol=1e-6, rtol=1e-5)


def test_measures_of_a_perfect_and_of_a_reversed_order() -> None:
    model = tiny_reward_model()
    rows = [[5 + i, 6, 7, 2][i % 3 :] for i in range(4)]
    scores = score_all(model, rows, 0, CPU)
    order = scores.argsort(descending=True).argsort() + 1
    lengths = [len(row) for row in rows]
    right = RankedRows(rows, order.tolist(), lengths, "p")
    wrong = RankedRows(rows, (5 - order).tolist(), lengths, "q")
    best = measure(model, [right], 0, CPU, seed=0)
    assert best["accuracy"] == 1.0
    assert best["kendall_tau"] == pytest.approx(1.0)
    assert best["pairs"] == 6
    assert measure(model, [wrong], 0, CPU, seed=0)["accuracy"] == 0.0
    both = measure(model, [right, wrong], 0, CPU, seed=0)
    assert both["accuracy"] == 0.5
    assert both["accuracy_low"] == 0.0
    assert both["accuracy_high"] == 1.0


def test_the_bootstrap_interval_holds_the_ratio_and_shrinks_with_more_items() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    correct = rng.integers(0, 4, size=400).astype(float)
    pairs = np.full(400, 3.0)
    low, high = bootstrap_ratio(correct, pairs, seed=1)
    few_low, few_high = bootstrap_ratio(correct[:25], pairs[:25], seed=1)
    assert low < correct.sum() / pairs.sum() < high
    assert high - low < few_high - few_low


def test_micro_batches_cover_every_row_once_and_respect_both_limits() -> None:
    lengths = [5, 100, 7, 3, 64, 64, 9, 31]
    batches = micro_batches(lengths, max_rows=3, max_tokens=128)
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    for batch in batches:
        assert len(batch) <= 3
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 128
    assert micro_batches([500], max_rows=4, max_tokens=100) == [[0]]
