"""PPO on a problem whose answer is known: pi*(y) ~ reference(y) * exp(score(y) / kl_coef).

Real sampling by our decode loop, our rewards, advantages, whitening and losses, Adam: the whole
update but the value model. What the exact gradient (test_ppo_exact.py) cannot see shows here: a
sampler that draws from another distribution than the one that is trained, or a fixed point that is
not the optimum.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stages import ppo_math
from stages.generation import generate
from stages.rollout import make_sequences, response_logprobs
from tests.tiny_models import EOS, KINDS, PAD, all_responses, exact_logprob, tiny_model

V, LONGEST, TEMPERATURE, KL_COEF = 5, 2, 0.8, 0.5
PROMPT = [1, 3]
RESPONSES = all_responses(V, EOS, LONGEST)
UPDATES, ROLLOUTS, EPOCHS, LR = 150, 192, 2, 1e-2

Rewards = Callable[..., Tensor]


def score_of(response: list[int]) -> float:
    return [0.0, 1.0, -1.0, 0.6, 1.6][response[0]] + 0.5 * (response[-1] == EOS)


def kl_to_optimum(
    kind: str, seed: int, *, rewards_of: Rewards, sampled_at: float = TEMPERATURE
) -> tuple[float, float, float]:
    """Train; (KL(policy || optimum) before, after, total variation after)."""
    policy = tiny_model(kind, vocab_size=V, width=16, seed=1, sharpness=6.0)
    reference = tiny_model(kind, vocab_size=V, width=16, seed=1, sharpness=6.0)

    def exact(model: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            rows = [exact_logprob(model, PROMPT, y, TEMPERATURE) for y in RESPONSES]
        return torch.stack(rows).double()

    scores = torch.tensor([score_of(y) for y in RESPONSES], dtype=torch.float64)
    best = (exact(reference) + scores / KL_COEF).log_softmax(-1)

    def distance() -> tuple[float, float]:
        found = exact(policy)
        variation = 0.5 * (found.exp() - best.exp()).abs().sum().item()
        return (found.exp() * (found - best)).sum().item(), variation

    before, _ = distance()
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    for update in range(UPDATES):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - update / UPDATES)
        seeds = [seed * 10**9 + update * ROLLOUTS + i for i in range(ROLLOUTS)]
        responses = [
            g.tokens
            for g in generate(
                policy,
                [PROMPT] * ROLLOUTS,
                seeds,
                eos_id=EOS,
                pad_id=PAD,
                max_response_tokens=LONGEST,
                temperature=sampled_at,
                rows_at_once=ROLLOUTS,
            )
        ]
        batch = make_sequences([PROMPT] * ROLLOUTS, responses, PAD, torch.device("cpu"))
        valid_BR = batch.valid_BR
        with torch.no_grad():
            old_BR, _ = response_logprobs(policy, batch, TEMPERATURE)
            ref_BR, _ = response_logprobs(reference, batch, TEMPERATURE)
        scores_B = torch.tensor([score_of(y) for y in responses])
        rewards_BR = rewards_of(scores_B, old_BR, ref_BR, valid_BR, KL_COEF)
        # lambda = 1 and values of 0: what whitening subtracts is the only baseline
        advantages_BR, _ = ppo_math.gae_advantages(
            rewards_BR, torch.zeros_like(rewards_BR), valid_BR, 1.0, 1.0
        )
        advantages_BR = ppo_math.whiten(advantages_BR, valid_BR)
        for _ in range(EPOCHS):
            logprobs_BR, _ = response_logprobs(policy, batch, TEMPERATURE)
            loss = ppo_math.policy_loss(
                logprobs_BR, old_BR, advantages_BR, valid_BR, 0.2, 0.2, valid_BR.sum()
            ).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
    after, variation = distance()
    print(f"{kind} seed {seed}: KL {before:.3f} -> {after:.4f}, TV {variation:.4f}")
    return before, after, variation


def by_k3(scores_B: Tensor, logprobs: Tensor, ref: Tensor, valid: Tensor, coef: float) -> Tensor:
    zeros = torch.zeros_like(logprobs)
    rewards_BR = ppo_math.kl_penalised_rewards(scores_B, zeros, zeros, valid, coef)
    return rewards_BR - coef * ppo_math.kl_estimates(logprobs, ref, valid).k3_BR


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_policy_reaches_the_optimum(kind: str, seed: int) -> None:
    before, after, variation = kl_to_optimum(kind, seed, rewards_of=ppo_math.kl_penalised_rewards)
    assert before > 0.5
    assert after < 0.01
    assert variation < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_does_not_with_k3_in_the_reward(kind: str) -> None:
    _, after, _ = kl_to_optimum(kind, 1, rewards_of=by_k3)
    assert after > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nor_if_it_samples_at_another_temperature_than_it_trains(kind: str) -> None:
    _, after, _ = kl_to_optimum(kind, 1, rewards_of=ppo_math.kl_penalised_rewards, sampled_at=0.5)
    assert after > 0.1
