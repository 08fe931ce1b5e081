"""The reward losses against hand-worked numbers and against every order that agrees with a ranking."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.reward_losses import (
    MAX_TIED,
    centering_penalty,
    correct_pairs,
    off_prompt_loss,
    pairwise_loss,
    plackett_luce_loss,
)


def test_the_loss_is_the_mean_over_strict_pairs() -> None:
    scores = torch.tensor([1.0, 0.0, 0.0, -2.0])
    ranks = torch.tensor([1, 2, 2, 3])  # the middle two are tied: 5 strict pairs of 6
    differences = torch.tensor([1.0, 1.0, 3.0, 2.0, 2.0])
    expected = -logsigmoid(differences).mean()
    assert pairwise_loss(scores, ranks).item() == pytest.approx(expected.item())


def test_two_responses_give_bradley_terry_in_both_losses() -> None:
    scores, ranks = torch.tensor([0.3, 0.8]), torch.tensor([2, 1])
    expected = pytest.approx(math.log(1 + math.exp(-0.5)))
    assert pairwise_loss(scores, ranks).item() == expected
    assert plackett_luce_loss(scores, ranks).item() == expected


@pytest.mark.parametrize("loss", [pairwise_loss, plackett_luce_loss])
def test_a_better_response_is_pushed_up_and_a_worse_one_down(loss) -> None:  # type: ignore[no-untyped-def]
    scores = torch.zeros(3, requires_grad=True)
    (up,) = torch.autograd.grad(loss(scores, torch.tensor([1, 2, 3])), scores)
    assert up[0] < 0 < up[2]
    assert up.sum().item() == pytest.approx(0.0, abs=1e-6), "the level of scores is free"


def test_turning_the_order_round_turns_the_pairwise_gradient_round() -> None:
    scores = torch.zeros(3, requires_grad=True)
    (up,) = torch.autograd.grad(pairwise_loss(scores, torch.tensor([1, 2, 3])), scores)
    (down,) = torch.autograd.grad(pairwise_loss(scores, torch.tensor([3, 2, 1])), scores)
    torch.testing.assert_close(up, -down)


def test_the_margin_grows_with_the_levels_between_and_gaps_in_ranks_do_not_count() -> None:
    scores = torch.tensor([0.5, 0.2, -0.4])
    # 1, 3, 7 are three levels: pairs are 1, 2 and 1 apart
    z = torch.tensor([0.3 - 0.2, 0.9 - 0.4, 0.6 - 0.2])
    found = pairwise_loss(scores, torch.tensor([1, 3, 7]), margin=0.2)
    assert found.item() == pytest.approx(-logsigmoid(z).mean().item())


def test_smoothed_labels_are_a_mixture_of_both_directions() -> None:
    found = pairwise_loss(torch.tensor([1.5, 0.0]), torch.tensor([1, 2]), label_smoothing=0.1)
    sigmoid = 1 / (1 + math.exp(-1.5))
    assert found.item() == pytest.approx(-0.9 * math.log(sigmoid) - 0.1 * math.log(1 - sigmoid))


def test_smoothing_has_its_optimum_where_the_model_is_as_sure_as_the_labels() -> None:
    sure = torch.tensor([math.log(0.9 / 0.1), 0.0], requires_grad=True)
    loss = pairwise_loss(sure, torch.tensor([1, 2]), label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, sure)
    torch.testing.assert_close(gradient, torch.zeros(2), atol=1e-6, rtol=0)


def test_ties_that_count_pull_two_scores_together() -> None:
    scores = torch.tensor([1.0, 0.0, -1.0])
    # labels 1, 1/2 and 1 of the pairs (1 2), (2 3), (1 3)
    found = pairwise_loss(scores, torch.tensor([1, 2, 2]), ties_count=True)
    p = torch.tensor([1.0, 2.0, 1.0]).sigmoid()
    expected = -(p[0].log() + p[1].log() + 0.5 * (p[2].log() + (1 - p[2]).log())) / 3
    assert found.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("loss", [pairwise_loss, plackett_luce_loss, None])
def test_heads_are_as_many_single_losses(loss) -> None:  # type: ignore[no-untyped-def]
    scores_KH = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    ranks = torch.tensor([2, 1, 2, 2, 3])

    def of(scores: Tensor) -> Tensor:
        if loss is None:
            return pairwise_loss(scores, ranks, 0.3, 0.1, True) + centering_penalty(scores)
        return loss(scores, ranks)

    single = torch.stack([of(scores_KH[:, h]) for h in range(3)])
    torch.testing.assert_close(of(scores_KH), single)


def enumerated(scores: list[float], ranks: list[int]) -> float:
    """-log of the summed probability of all orders that put no worse rank before a better one."""
    weights = [math.exp(score) for score in scores]
    total = 0.0
    for order in permutations(range(len(scores))):
        if any(ranks[a] > ranks[b] for a, b in pairwise(order)):
            continue
        probability = 1.0
        for at, item in enumerate(order):
            probability *= weights[item] / sum(weights[j] for j in order[at:])
        total += probability
    return -math.log(total)


@pytest.mark.parametrize(
    "ranks",
    [
        [1, 2, 3, 4, 5, 6],  # an order
        [4, 1, 3, 3, 2, 2],  # ties above, in the middle and at the end
        [1, 1, 1, 2, 3, 3],
        [2, 2, 2, 2, 2, 1],  # best of six
        [1, 1, 1, 1, 1, 2],  # worst of six
        [5, 5, 9, 1, 9, 5],  # gaps
    ],
)
def test_plackett_luce_is_the_sum_over_the_orders_that_agree(ranks: list[int]) -> None:
    scores = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) * 2
    found = plackett_luce_loss(scores, torch.tensor(ranks)).item()
    assert found == pytest.approx(enumerated(scores.tolist(), ranks), rel=1e-12)


def test_the_probabilities_of_all_rankings_with_one_tie_of_two_sum_to_one() -> None:
    # tie the first two: each unordered pair that comes first, then any order of the rest
    scores = torch.tensor([0.4, -1.0, 2.0, 0.1], dtype=torch.float64)
    rankings = {(1, 1, *r) for r in permutations((3, 4))}
    rankings = {
        tuple(row[i] for i in order) for row in rankings for order in permutations(range(4))
    }
    total = sum(math.exp(-plackett_luce_loss(scores, torch.tensor(r)).item()) for r in rankings)
    assert total == pytest.approx(1.0, rel=1e-12)


def test_plackett_luce_holds_with_far_scores_and_its_gradient_is_right() -> None:
    scores = torch.tensor([300.0, -250.0, 0.0, 40.0], requires_grad=True)
    loss = plackett_luce_loss(scores, torch.tensor([1, 1, 2, 2]))
    assert loss.item() == pytest.approx(
        290.0, rel=1e-5
    )  # the second, 290 below the best of the rest
    (gradient,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -1.0, 0.0, 1.0]))
    random = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([1, 1, 2, 2, 2, 3])
    assert torch.autograd.gradcheck(lambda x: plackett_luce_loss(x, ranks), random)


def test_responses_that_are_all_tied_say_nothing_and_too_many_are_refused() -> None:
    assert plackett_luce_loss(torch.randn(4), torch.ones(4)).item() == 0.0
    many = torch.tensor([1] * (MAX_TIED + 1) + [2])
    with pytest.raises(ValueError, match="13 tied"):
        plackett_luce_loss(torch.zeros(len(many)), many)
    allowed = torch.tensor([1] * MAX_TIED + [2])
    # by symmetry the one that is last is last in one of 13
    assert plackett_luce_loss(torch.zeros(13), allowed).item() == pytest.approx(math.log(13))


def test_centering_is_the_mean_square_of_the_sums_of_pairs() -> None:
    assert centering_penalty(torch.tensor([2.0, 1.0])).item() == 9.0
    assert centering_penalty(torch.tensor([2.0, 1.0, -1.0])).item() == pytest.approx((9 + 1) / 3)


def test_correct_pairs_count_equal_scores_half_and_ties_not_at_all() -> None:
    scores, ranks = torch.tensor([3.0, 1.0, 1.0, 5.0]), torch.tensor([1, 2, 3, 3])
    # right: (0 1), (0 2); wrong: (0 3), (1 3); half: (1 2)
    assert correct_pairs(scores, ranks).tolist() == [2.5, 5.0]


def test_a_response_is_held_against_itself_behind_another_prompt() -> None:
    on_H, off_H = torch.tensor([1.0, -0.5]), torch.tensor([0.25, 0.25])
    expected = [math.log1p(math.exp(-0.75)), math.log1p(math.exp(0.75))]
    assert off_prompt_loss(on_H, off_H).tolist() == pytest.approx(expected, abs=1e-6)
