"""The arithmetic of PPO against hand-worked numbers and a slow second way."""

from __future__ import annotations

import math

import pytest
import torch

from stages import ppo_math

VALID = torch.tensor([[True, True, True, False], [True, False, False, False], [True] * 4])


def random_rows(seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, generator=rng, dtype=torch.float64)


def test_score_lands_on_the_last_valid_token_and_the_kl_on_every_one() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, 99.0]])
    reference = torch.tensor([[-1.5, -1.0, -3.0, -99.0]])
    valid = torch.tensor([[True, True, True, False]])
    rewards = ppo_math.kl_penalised_rewards(
        torch.tensor([2.0]), logprobs, reference, valid, kl_coef=0.1
    )
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 2.0, 0.0]]))


def test_score_lands_on_the_last_slot_of_a_response_that_fills_it() -> None:
    zeros = torch.zeros(1, 3)
    rewards = ppo_math.kl_penalised_rewards(
        torch.tensor([-1.0]), zeros, zeros, torch.ones(1, 3, dtype=torch.bool), kl_coef=1.0
    )
    assert rewards.tolist() == [[0.0, 0.0, -1.0]]


def test_a_response_without_tokens_gets_no_reward() -> None:
    zeros = torch.zeros(1, 3)
    rewards = ppo_math.kl_penalised_rewards(
        torch.tensor([5.0]), zeros, zeros, torch.zeros(1, 3, dtype=torch.bool), kl_coef=1.0
    )
    assert rewards.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_gae_equals_the_sum_over_all_later_errors(gamma: float, lam: float) -> None:
    rewards, values = random_rows(1), random_rows(2)
    advantages, returns = ppo_math.gae_advantages(rewards, values, VALID, gamma, lam)
    for b in range(3):
        length = int(VALID[b].sum())
        for t in range(length):
            total = 0.0
            for later in range(t, length):
                next_value = values[b, later + 1].item() if later + 1 < length else 0.0
                delta = rewards[b, later].item() + gamma * next_value - values[b, later].item()
                total += (gamma * lam) ** (later - t) * delta
            assert advantages[b, t].item() == pytest.approx(total, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(total + values[b, t].item(), abs=1e-12)
        assert advantages[b, length:].abs().sum() == 0


def test_gae_does_not_look_beyond_the_end_of_a_response() -> None:
    rewards, values = random_rows(1), random_rows(2)
    expected = ppo_math.gae_advantages(rewards, values, VALID, 1.0, 0.95)
    junk = torch.where(VALID, 0.0, torch.nan).double()
    found = ppo_math.gae_advantages(rewards + junk, values + junk, VALID, 1.0, 0.95)
    assert torch.equal(expected[0][VALID], found[0][VALID])
    assert torch.equal(expected[1][VALID], found[1][VALID])


def test_whitened_values_have_mean_0_and_biased_std_1_over_the_valid_ones() -> None:
    white = ppo_math.whiten(random_rows(3) * 7 + 100, VALID)
    assert white[VALID].mean().abs() < 1e-12
    assert white[VALID].std(unbiased=False) == pytest.approx(1.0, abs=1e-6)
    assert white[~VALID].abs().sum() == 0


def test_whitening_two_halves_with_summed_moments_equals_whitening_the_whole() -> None:
    x = random_rows(4)
    whole = ppo_math.whiten(x, VALID)
    sums: list[torch.Tensor] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        sums.append(tensor)
        return tensor

    # what the ranks add up, in order: the count, the sum, the squares about the common mean
    count = VALID.sum()
    mean = x[VALID].sum() / count
    squares = (x[VALID] - mean).square().sum()
    totals = iter([count.double(), x[VALID].sum(), squares])
    top = ppo_math.whiten(x[:1], VALID[:1], lambda tensor: (record(tensor), next(totals))[1])
    torch.testing.assert_close(top, whole[:1])
    assert sums[0].item() == 3


def test_equal_values_whiten_to_zero() -> None:
    assert ppo_math.whiten(torch.full((3, 4), 5.0), VALID).abs().max() < 1e-3


def test_policy_loss_of_an_unchanged_policy_is_minus_the_mean_advantage() -> None:
    logprobs, advantages = random_rows(5), random_rows(6)
    found = ppo_math.policy_loss(logprobs, logprobs, advantages, VALID, 0.2, 0.2, VALID.sum())
    assert found.loss.item() == pytest.approx(-advantages[VALID].mean().item())
    assert found.clipped.item() == 0
    assert found.approx_kl.item() == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.5, 1.0, -1.2), (0.5, 1.0, -0.5), (1.5, -1.0, 1.5), (0.5, -1.0, 0.7)],
)
def test_the_ratio_is_clipped_only_where_that_is_pessimistic(
    ratio: float, advantage: float, expected: float
) -> None:
    one = torch.ones(1, 1)
    found = ppo_math.policy_loss(
        one * math.log(ratio), one * 0, one * advantage, one.bool(), 0.3, 0.2, 1
    )
    assert found.loss.item() == pytest.approx(expected)
    assert found.clipped.item() == (expected in (-1.2, 0.7))
    assert found.approx_kl.item() == pytest.approx(ratio - 1 - math.log(ratio))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        # beyond the bound: 3 * 2, and nothing to learn from it
        (5.0, -2.0, 6.0, 0.0),
        # within: ratio * 2 as without it, with the gradient of that
        (2.5, -2.0, 5.0, 5.0),
        (1.0, -2.0, 2.0, 2.0),
        # the other clips stay as they were: 0.7 * 2 and 1.2 * 2
        (0.5, -2.0, 1.4, 0.0),
        (5.0, 2.0, -2.4, 0.0),
        # a positive advantage has no such bound, though 0.5 * 2 lies below 3 * 2
        (0.5, 2.0, -1.0, -1.0),
    ],
)
def test_the_dual_clip_bounds_the_loss_of_a_negative_advantage(
    ratio: float, advantage: float, expected: float, gradient: float
) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    logprobs = (one * math.log(ratio)).requires_grad_()
    found = ppo_math.policy_loss(
        logprobs, one * 0, one * advantage, one.bool(), 0.3, 0.2, 1, dual_clip=3.0
    )
    assert found.loss.item() == pytest.approx(expected)
    # d ratio / d logprob is the ratio
    (found_gradient,) = torch.autograd.grad(found.loss, logprobs)
    assert found_gradient.item() == pytest.approx(gradient)
    assert found.dual_clipped.item() == (expected == 6.0)
    assert found.clipped.item() == (expected in (1.4, -2.4))


def test_the_dual_clip_counts_valid_tokens_beyond_the_bound() -> None:
    valid = torch.tensor([[True, True, True, False]])
    log_ratio = torch.tensor([[4.0, 3.0, 2.0, 9.0]], dtype=torch.float64).log()
    zeros, advantages = torch.zeros_like(log_ratio), -torch.ones_like(log_ratio)
    # the second stands exactly on the bound
    bound = log_ratio.exp()[0, 1].item()
    weights = torch.tensor([[0.5, 1.0, 1.0, 1.0]])
    found = ppo_math.policy_loss(
        log_ratio, zeros, advantages, valid, 0.2, 0.2, 3, weights, dual_clip=bound
    )
    assert found.dual_clipped.item() == 1
    # importance weights multiply what the bound left
    assert found.loss.item() == pytest.approx((0.5 * 3 + 3 + 2) / 3)


@pytest.mark.parametrize("dual_clip", [None, 1e9])
def test_without_a_dual_clip_the_loss_is_bit_for_bit_that_of_the_ppo_paper(
    dual_clip: float | None,
) -> None:
    logprobs, old, advantages = random_rows(5).requires_grad_(), random_rows(7), random_rows(6)
    ratio = (logprobs - old).exp()
    plain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    expected = -torch.where(VALID, plain, 0.0).sum() / 8
    found = ppo_math.policy_loss(logprobs, old, advantages, VALID, 0.2, 0.2, 8, None, dual_clip)
    assert torch.equal(found.loss, expected)
    assert torch.equal(
        *(torch.autograd.grad(x, logprobs, retain_graph=True)[0] for x in (found.loss, expected))
    )
    assert found.dual_clipped.item() == 0


def test_junk_beyond_the_end_changes_neither_loss_nor_gradient() -> None:
    logprobs = random_rows(5).requires_grad_()
    junk = torch.where(VALID, 0.0, 1e6).double()
    found = ppo_math.policy_loss(
        logprobs + junk, random_rows(7), random_rows(6) + junk, VALID, 0.2, 0.2, 8
    )
    clean = ppo_math.policy_loss(logprobs, random_rows(7), random_rows(6), VALID, 0.2, 0.2, 8)
    assert found.loss == clean.loss
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    assert gradient[~VALID].abs().sum() == 0


def test_value_loss_counts_the_larger_of_the_clipped_and_the_plain_error() -> None:
    one = torch.ones(1, 1)

    def loss(value: float, old: float, target: float) -> float:
        return ppo_math.value_loss(one * value, one * old, one * target, one.bool(), 0.2, 1).item()

    assert loss(1.0, 0.0, 1.0) == pytest.approx(0.5 * 0.8**2)  # moved too far: clipped counts
    assert loss(0.1, 0.0, 1.0) == pytest.approx(0.5 * 0.9**2)  # within the clip: plain
    assert loss(-1.0, 0.0, 1.0) == pytest.approx(0.5 * 2.0**2)  # the wrong way: plain is larger


def test_kl_of_a_model_with_itself_is_zero_and_k3_is_never_negative() -> None:
    logprobs, reference = random_rows(8), random_rows(9)
    same = ppo_math.kl_estimates(logprobs, logprobs, VALID)
    assert same.k1_BR.abs().sum() == 0
    assert same.k3_BR.abs().sum() == 0
    other = ppo_math.kl_estimates(logprobs, reference, VALID)
    assert (other.k3_BR >= 0).all()
    assert other.k3_BR[~VALID].abs().sum() == 0


def test_k1_and_k3_have_the_same_expectation_as_the_exact_kl() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = (p * (p / q).log()).sum().item()
    valid = torch.ones(1, 3, dtype=torch.bool)
    found = ppo_math.kl_estimates(p.log().unsqueeze(0), q.log().unsqueeze(0), valid)
    assert (p * found.k1_BR[0]).sum().item() == pytest.approx(exact)
    assert (p * found.k3_BR[0]).sum().item() == pytest.approx(exact)


def test_adaptive_kl_follows_the_sequence_worked_by_hand() -> None:
    coefs = [0.1]
    for kl in (6.0, 12.0, 3.0, 6.6):
        coefs.append(ppo_math.adaptive_kl(coefs[-1], kl, target=6.0, rollouts=64, horizon=640))
    # errors 0, +1 -> +0.2, -0.5 -> -0.2, +0.1; each times 64 / 640
    expected = [0.1, 0.1, 0.1 * 1.02, 0.1 * 1.02 * 0.98, 0.1 * 1.02 * 0.98 * 1.01]
    assert coefs == pytest.approx(expected, abs=1e-12)


def test_explained_variance_is_1_for_perfect_values_and_0_for_a_constant() -> None:
    returns = random_rows(10)
    assert ppo_math.explained_variance(returns, returns, VALID).item() == pytest.approx(1.0)
    constant = torch.full_like(returns, 3.0)
    assert ppo_math.explained_variance(constant, returns, VALID).item() == pytest.approx(0.0)


def test_importance_weights_are_the_ratio_up_to_the_cap() -> None:
    trainer = torch.tensor([[-1.0, -1.0, -3.0, -50.0], [-0.5, 9.0, 9.0, 9.0]])
    engine = torch.tensor(
        [[-1.0, -1.0 - math.log(1.5), -2.0, -90.0], [-0.5 - math.log(3), 0, 0, 0]]
    )
    valid = torch.tensor([[True] * 4, [True, False, False, False]])
    weights = ppo_math.truncated_importance(trainer, engine, valid, cap=2.0)
    # equal: 1; one and a half times as probable: 1.5; e times less: 1/e; far more: the cap; and
    # three times as probable: the cap
    expected = torch.tensor([[1.0, 1.5, 1 / math.e, 2.0], [2.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(weights, expected)


def test_importance_weights_without_a_cap_undo_the_engines_distribution() -> None:
    engine = torch.tensor([0.7, 0.2, 0.1]).log().unsqueeze(0)
    trainer = torch.tensor([0.5, 0.3, 0.2]).log().unsqueeze(0)
    valid = torch.ones(1, 3, dtype=torch.bool)
    weights = ppo_math.truncated_importance(trainer, engine, valid, cap=10.0)
    # sum over tokens of pi_engine * weight * f is the expectation of f under pi_trainer
    torch.testing.assert_close(engine.exp() * weights, trainer.exp())


def test_junk_where_not_valid_and_gradients_stay_out_of_the_importance_weights() -> None:
    trainer = torch.tensor([[-1.0, math.nan, math.inf]], requires_grad=True)
    engine = torch.tensor([[-1.0, 1.0, -math.inf]])
    valid = torch.tensor([[True, False, False]])
    weights = ppo_math.truncated_importance(trainer, engine, valid, cap=2.0)
    assert weights.tolist() == [[1.0, 0.0, 0.0]]
    assert not weights.requires_grad


# ---- the edges -----------------------------------------------------------------------------


def test_a_response_without_tokens_takes_nothing_from_the_others() -> None:
    valid = torch.tensor([[False, False, False], [True, True, False], [True, True, True]])
    zeros = torch.zeros(3, 3)
    rewards = ppo_math.kl_penalised_rewards(
        torch.tensor([5.0, 6.0, 7.0]), zeros, zeros, valid, kl_coef=1.0
    )
    assert rewards.tolist() == [[0.0, 0.0, 0.0], [0.0, 6.0, 0.0], [0.0, 0.0, 7.0]]


def test_scores_in_another_precision_than_the_logprobs_are_taken() -> None:
    zeros = torch.zeros(1, 2, dtype=torch.float64)
    valid = torch.ones(1, 2, dtype=torch.bool)
    rewards = ppo_math.kl_penalised_rewards(torch.tensor([0.5]), zeros, zeros, valid, 1.0)
    assert rewards.tolist() == [[0.0, 0.5]]
    assert rewards.dtype == torch.float64


def test_whitening_nothing_or_one_number_gives_zeros() -> None:
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert ppo_math.whiten(torch.ones(2, 2), nothing).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    one = torch.tensor([[True, False], [False, False]])
    assert ppo_math.whiten(torch.full((2, 2), 3.0), one).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_whitening_tiny_numbers_is_held_back_by_eps() -> None:
    x, valid = torch.tensor([[1e-4, -1e-4]]).double(), torch.ones(1, 2, dtype=torch.bool)
    # variance 1e-8, eps 1e-8
    assert ppo_math.whiten(x, valid)[0, 0].item() == pytest.approx(0.5**0.5)


def test_a_far_ratio_is_cut_before_it_overflows() -> None:
    one, true = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    far = ppo_math.policy_loss(one * 500, one * 0, -one, true, 0.2, 0.2, 1)
    assert far.loss.item() == pytest.approx(math.exp(20))
    near = ppo_math.policy_loss(one * -500, one * 0, one, true, 0.2, 0.2, 1)
    assert near.loss.item() == pytest.approx(-math.exp(-20), rel=1e-6)
    assert ppo_math.kl_estimates(one * -500, one * 0, true).k3_BR.item() == pytest.approx(
        math.exp(20) - 1 - 500
    )
    assert ppo_math.kl_estimates(one * 500, one * 0, true).k3_BR.item() == pytest.approx(
        math.exp(-20) - 1 + 500
    )


def test_the_log_counts_valid_tokens_only() -> None:
    valid = torch.tensor([[True, True, False]])
    log_ratio = torch.tensor([[math.log(1.5), 0.0, math.log(4.0)]])
    found = ppo_math.policy_loss(
        log_ratio, torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 1.0]]), valid, 0.2, 0.2, 2
    )
    assert found.loss.item() == pytest.approx(-(1.2 + 1.0) / 2)
    assert found.clipped.item() == 1
    assert found.approx_kl.item() == pytest.approx(0.5 - math.log(1.5))
    assert found.ratio_max.item() == pytest.approx(1.5)


def test_weights_multiply_the_loss_of_their_token() -> None:
    ones, valid = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    advantages, weights = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 0.5]])
    found = ppo_math.policy_loss(ones, ones, advantages, valid, 0.2, 0.2, 2, weights)
    assert found.loss.item() == pytest.approx(-(2.0 * 1.0 + 0.5 * 3.0) / 2)


def test_value_loss_is_the_mean_over_valid_tokens() -> None:
    valid = torch.tensor([[True, True, False]])
    values, junk = torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([[0.0, 0.0, 1e6]])
    found = ppo_math.value_loss(values, values, torch.tensor([[0.0, 2.0, 0.0]]) + junk, valid, 1, 2)
    assert found.item() == pytest.approx(0.5 * (1.0 + 4.0) / 2)


def test_explained_variance_worked_by_hand() -> None:
    valid = torch.tensor([[True, True, False]])
    returns, values = torch.tensor([[0.0, 2.0, 50.0]]), torch.tensor([[0.0, 1.0, -50.0]])
    # variance of the returns 1, of what is left of them 1/4
    assert ppo_math.explained_variance(values, returns, valid).item() == pytest.approx(0.75)
    # the same on a small scale, and returns that are all alike
    small = ppo_math.explained_variance(values * 1e-3, returns * 1e-3, valid)
    assert small.item() == pytest.approx(0.75, rel=1e-4)
    alike = ppo_math.explained_variance(torch.zeros(1, 3), torch.ones(1, 3), valid)
    assert alike.item() == 1.0


def test_a_ratio_inside_of_the_clip_is_not_counted_as_clipped() -> None:
    one = torch.ones(1, 1)
    for ratio, advantage in ((1.1, 1.0), (0.9, 1.0), (1.1, -1.0), (0.9, -1.0)):
        found = ppo_math.policy_loss(
            one * math.log(ratio), one * 0, one * advantage, one.bool(), 0.2, 0.2, 1
        )
        assert found.clipped.item() == 0


def test_what_is_only_logged_carries_no_graph() -> None:
    logprobs = torch.zeros(1, 1, requires_grad=True)
    one = torch.ones(1, 1)
    found = ppo_math.policy_loss(logprobs, one * 0, one, one.bool(), 0.2, 0.2, 1)
    assert found.loss.requires_grad
    assert not any(x.requires_grad for x in (found.clipped, found.approx_kl, found.ratio_max))


def test_a_value_is_clipped_around_its_old_one() -> None:
    one = torch.ones(1, 1)
    # from 3 to 3.5 with a clip of 0.2 is 3.2: further from 3.4 than 3.5 is
    loss = ppo_math.value_loss(one * 3.5, one * 3, one * 3.4, one.bool(), 0.2, 1)
    assert loss.item() == pytest.approx(0.5 * 0.2**2)
