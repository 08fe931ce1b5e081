"""The arithmetic of PPO: pure functions on tensors, nothing else.

Shapes in names: B rows (responses), R response tokens, right-padded. `valid_BR` is True on the
tokens of a response, its end token included, and False after it.
Sources: PPO arXiv 1707.06347, GAE arXiv 1506.02438, InstructGPT arXiv 2203.02155, Ziegler et al.
arXiv 1909.08593, dual clip arXiv 1912.09729; KL estimators: Schulman, "Approximating KL divergence"
(2020).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]

# exp() of a larger difference says only "far away", but can overflow (verl and OpenRLHF: 20)
_MAX_LOG_RATIO = 20.0


def kl_penalised_rewards(
    scores_B: Tensor,
    logprobs_BR: Tensor,
    ref_logprobs_BR: Tensor,
    valid_BR: Tensor,
    kl_coef: float,
) -> Tensor:
    """Rewards of each token: -kl_coef * (logprob - ref_logprob), and the score on the last valid one.

    The per-token estimator is k1: in the reward it is the one that leads to
    pi* ~ pi_ref * exp(score / kl_coef) (arXiv 2512.21852). Returns `[B, R]`, 0 where not valid.
    """
    rewards_BR = -kl_coef * (logprobs_BR - ref_logprobs_BR)
    rewards_BR = torch.where(valid_BR, rewards_BR, 0.0)
    # the last valid slot, not the last slot: responses end early
    last_B1 = (valid_BR.sum(-1, keepdim=True) - 1).clamp(min=0)
    has_tokens_B1 = valid_BR.any(-1, keepdim=True)
    bonus_B1 = torch.where(has_tokens_B1, scores_B.unsqueeze(-1), 0.0).to(rewards_BR.dtype)
    return rewards_BR.scatter_add(-1, last_B1, bonus_B1)


def gae_advantages(
    rewards_BR: Tensor, values_BR: Tensor, valid_BR: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16): (advantages, returns), `[B, R]`.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}; the value after the
    last valid token is 0. What stands in slots that are not valid has no influence.
    """
    values_BR = torch.where(valid_BR, values_BR, 0.0)
    rewards_BR = torch.where(valid_BR, rewards_BR, 0.0)
    advantages_BR = torch.zeros_like(values_BR)
    next_advantage_B = torch.zeros_like(values_BR[:, 0])
    next_value_B = torch.zeros_like(next_advantage_B)
    for t in range(values_BR.shape[1] - 1, -1, -1):
        delta_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantages_BR[:, t] = torch.where(valid_BR[:, t], advantage_B, 0.0)
        next_advantage_B, next_value_B = advantages_BR[:, t], values_BR[:, t]
    return advantages_BR, advantages_BR + values_BR


def whiten(
    x_BR: Tensor, valid_BR: Tensor, sum_over_ranks: SumOverRanks | None = None, eps: float = 1e-8
) -> Tensor:
    """Shift and scale to mean 0 and biased standard deviation 1 over the valid entries of all ranks.

    Entries that are not valid become 0. With fewer than two different values the result is 0.
    """
    total = sum_over_ranks or (lambda t: t)
    x_BR = torch.where(valid_BR, x_BR, 0.0)
    count = total(valid_BR.sum().to(x_BR.dtype)).clamp(min=1)
    mean = total(x_BR.sum()) / count
    centred_BR = torch.where(valid_BR, x_BR - mean, 0.0)
    variance = total(centred_BR.square().sum()) / count
    return centred_BR * torch.rsqrt(variance + eps)


class PolicyLoss(NamedTuple):
    """loss: scalar, to be minimised. The others are sums over valid tokens, for the log."""

    loss: Tensor
    clipped: Tensor
    dual_clipped: Tensor
    approx_kl: Tensor
    ratio_max: Tensor


def policy_loss(
    logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    valid_BR: Tensor,
    clip_low: float,
    clip_high: float,
    num_valid: Tensor | float,
    weights_BR: Tensor | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate (PPO paper, eq. 7), summed over valid tokens and divided by `num_valid`.

    num_valid: valid tokens of the whole minibatch over all ranks, so that neither micro-batches nor
    ranks change the result. weights_BR: importance weights of tokens that another engine sampled
    (`truncated_importance`); None is 1. dual_clip: c > 1; where the advantage is negative the
    surrogate is c * advantage at least (Ye et al. 2020, arXiv 1912.09729, eq. 5): a token whose ratio
    has grown beyond c teaches nothing, instead of ever more. None: no such bound.
    """
    log_ratio_BR = torch.where(valid_BR, logprobs_BR - old_logprobs_BR, 0.0)
    log_ratio_BR = log_ratio_BR.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio_BR = log_ratio_BR.exp()
    clipped_BR = ratio_BR.clamp(1 - clip_low, 1 + clip_high)
    surrogate_BR = torch.minimum(ratio_BR * advantages_BR, clipped_BR * advantages_BR)
    is_bounded_BR = torch.zeros_like(valid_BR)
    if dual_clip is not None:
        bound_BR = dual_clip * advantages_BR
        # the ratio of a slot that is not valid is 1, which no bound touches
        is_bounded_BR = (advantages_BR < 0) & (surrogate_BR < bound_BR)
        surrogate_BR = torch.where(is_bounded_BR, bound_BR, surrogate_BR)
    if weights_BR is not None:
        surrogate_BR = weights_BR * surrogate_BR
    loss = -torch.where(valid_BR, surrogate_BR, 0.0).sum() / num_valid
    with torch.no_grad():
        is_clipped_BR = valid_BR & (clipped_BR * advantages_BR < ratio_BR * advantages_BR)
        k3_BR = torch.where(valid_BR, ratio_BR - 1 - log_ratio_BR, 0.0)
        return PolicyLoss(
            loss, is_clipped_BR.sum(), is_bounded_BR.sum(), k3_BR.sum(), ratio_BR.max()
        )


def truncated_importance(
    logprobs_BR: Tensor, engine_logprobs_BR: Tensor, valid_BR: Tensor, cap: float
) -> Tensor:
    """Weights min(pi_trainer / pi_engine, cap) of tokens that another engine sampled, `[B, R]`.

    Truncated importance sampling of each token (Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training"): the loss of a token is multiplied by its weight,
    so that the trainer's gradient is right although rounding and kernels made the engine sample
    from a slightly other distribution; the cap bounds the variance. No gradient flows through it.

    logprobs_BR: the trainer's, of the weights that sampled. engine_logprobs_BR: the engine's own.
    0 where not valid.
    """
    log_ratio_BR = torch.where(valid_BR, logprobs_BR - engine_logprobs_BR, 0.0).detach()
    weights_BR = log_ratio_BR.clamp(max=_MAX_LOG_RATIO).exp().clamp(max=cap)
    return torch.where(valid_BR, weights_BR, 0.0)


def value_loss(
    values_BR: Tensor,
    old_values_BR: Tensor,
    returns_BR: Tensor,
    valid_BR: Tensor,
    value_clip: float,
    num_valid: Tensor | float,
) -> Tensor:
    """Half the squared error, with values kept within `value_clip` of the rollout's values.

    The larger of the clipped and the plain error counts (OpenAI baselines, ppo2), summed over valid
    tokens and divided by `num_valid` (see `policy_loss`).
    """
    clipped_BR = old_values_BR + (values_BR - old_values_BR).clamp(-value_clip, value_clip)
    error_BR = torch.maximum((values_BR - returns_BR) ** 2, (clipped_BR - returns_BR) ** 2)
    return 0.5 * torch.where(valid_BR, error_BR, 0.0).sum() / num_valid


class Kl(NamedTuple):
    """Estimates of KL(policy || reference) per token, `[B, R]`, 0 where not valid, in nats."""

    k1_BR: Tensor
    k3_BR: Tensor


def kl_estimates(logprobs_BR: Tensor, ref_logprobs_BR: Tensor, valid_BR: Tensor) -> Kl:
    """k1 = log p/q (unbiased, may be negative) and k3 = q/p - 1 + log p/q (unbiased, never negative)."""
    k1_BR = torch.where(valid_BR, logprobs_BR - ref_logprobs_BR, 0.0)
    k3_BR = torch.expm1(-k1_BR.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)) + k1_BR
    return Kl(k1_BR, k3_BR)


def adaptive_kl(kl_coef: float, kl: float, target: float, rollouts: int, horizon: int) -> float:
    """The next kl_coef: a proportional controller in log space (Ziegler et al. 2019, section 2.2).

    kl and target in nats a response; `rollouts` of the update just done; the error is cut at +-0.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * rollouts / horizon)


def explained_variance(values_BR: Tensor, returns_BR: Tensor, valid_BR: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over valid tokens; 1 is perfect, below 0 is harmful."""
    returns = returns_BR[valid_BR]
    residual = returns - values_BR[valid_BR]
    variance = returns.var(unbiased=False)
    return 1 - residual.var(unbiased=False) / variance.clamp(min=1e-12)
