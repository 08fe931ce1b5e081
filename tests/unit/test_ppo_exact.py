"""The gradient of PPO against the exact gradient of what it is meant to maximise.

With three tokens besides the end token and at most three response tokens there are 40 responses, so
the objective E[score - kl_coef * KL] is a finite sum, and autograd gives its gradient without any
policy-gradient theorem. At the old policy, with lambda = gamma = 1 and without whitening, the
expectation of PPO's gradient is that gradient, whatever the values are (a baseline that depends on
the state only adds 0). Errors of temperature, position, sign, mask or normalisation do not cancel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages import ppo_math
from stages.rollout import Sequences, make_sequences, response_logprobs
from tests.tiny_models import KINDS, PAD, all_responses, exact_logprob, in_float64, tiny_model

V, END, LONGEST = 4, 2, 3
PROMPTS = [[1, 3], [3, 0, 1, 1, 0]]
TEMPERATURE, KL_COEF = 0.8, 0.3
ROWS = [(prompt, response) for prompt in PROMPTS for response in all_responses(V, END, LONGEST)]


def score_of(response: list[int]) -> float:
    """A fixed, uneven score of every response."""
    return sum((k + 1) * (token - 1.3) ** 2 for k, token in enumerate(response)) % 2.7 - 1.2


def value_of(prompt: list[int], before: list[int]) -> float:
    """A baseline that knows the state and not the action."""
    return (0.7 * sum(prompt) + sum((i + 2) * t for i, t in enumerate(before)) + len(before)) % 3


@dataclasses.dataclass
class Setup:
    policy: nn.Module
    reference: nn.Module
    batch: Sequences
    probs_B: Tensor
    """Probability of each row, from single unpadded forward passes."""
    exact: Tensor
    """Minus the gradient of the objective, flat."""


def exact_gradient(policy: nn.Module, reference: nn.Module) -> tuple[Tensor, Tensor]:
    """(probability of every row, minus the gradient of the objective).

    The objective: the mean over prompts of E[score] - kl_coef * KL(policy || reference).
    """
    objective, probs = torch.zeros((), dtype=torch.float64), []
    for prompt, response in ROWS:
        logprob = exact_logprob(policy, prompt, response, TEMPERATURE)
        kl = logprob - exact_logprob(reference, prompt, response, TEMPERATURE).detach()
        probs.append(logprob.detach().exp())
        objective = objective + logprob.exp() * (score_of(response) - KL_COEF * kl)
    return torch.stack(probs), flat_gradient(policy, -objective / len(PROMPTS))


def flat_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


@pytest.fixture(scope="module", params=KINDS)
def setup(request: pytest.FixtureRequest) -> Setup:
    policy = tiny_model(request.param, vocab_size=V, width=16, seed=1, sharpness=12.0).double()
    reference = tiny_model(request.param, vocab_size=V, width=16, seed=2, sharpness=12.0).double()
    batch = make_sequences(
        [prompt for prompt, _ in ROWS], [response for _, response in ROWS], PAD, torch.device("cpu")
    )
    with in_float64():
        return Setup(policy, reference, batch, *exact_gradient(policy, reference))


def values_of(batch: Sequences) -> Tensor:
    values_BR = torch.full(batch.valid_BR.shape, torch.nan, dtype=torch.float64)
    for b, (prompt, response) in enumerate(ROWS):
        for r in range(len(response)):
            values_BR[b, r] = value_of(prompt, response[:r])
    return values_BR


Rewards = Callable[..., Tensor]


def ppo_gradient(
    setup: Setup,
    *,
    rewards_of: Rewards = ppo_math.kl_penalised_rewards,
    kl_coef: float = KL_COEF,
    lam: float = 1.0,
    temperature: float = TEMPERATURE,
    valid_BR: Tensor | None = None,
    micro_batches: list[list[int]] | None = None,
    local_mean: bool = False,
) -> Tensor:
    """The gradient of PPO's loss, every response weighted by its probability.

    The weight goes into the advantage, in which the loss is linear (it is positive, so the clipped
    minimum stays on its side).
    """
    batch = setup.batch
    valid_BR = batch.valid_BR if valid_BR is None else valid_BR
    scores_B = torch.tensor([score_of(response) for _, response in ROWS], dtype=torch.float64)
    with torch.no_grad():
        old_BR, _ = response_logprobs(setup.policy, batch, temperature)
        ref_BR, _ = response_logprobs(setup.reference, batch, temperature)
    rewards_BR = rewards_of(scores_B, old_BR, ref_BR, valid_BR, kl_coef)
    advantages_BR, _ = ppo_math.gae_advantages(rewards_BR, values_of(batch), valid_BR, 1.0, lam)
    weighted_BR = advantages_BR * setup.probs_B.unsqueeze(-1) / len(PROMPTS)
    parts = micro_batches or [list(range(len(ROWS)))]
    total: Any = 0.0
    for rows in parts:
        part = batch.rows(rows)
        R = part.valid_BR.shape[1]
        logprobs_BR, _ = response_logprobs(setup.policy, part, temperature)
        own = valid_BR[rows, :R]
        # scaled so that the parts add up to the sum over all tokens if every part is counted right
        scale = len(parts) / valid_BR.sum() * own.sum() if local_mean else 1.0
        loss = ppo_math.policy_loss(
            logprobs_BR, old_BR[rows, :R], weighted_BR[rows, :R], own, 0.2, 0.2, scale
        ).loss
        total = total + flat_gradient(setup.policy, loss)
    return total


def error_of(found: Tensor, expected: Tensor) -> float:
    error = ((found - expected).norm() / expected.norm()).item()
    print(f"relative error {error:.2g}")
    return error


def test_the_responses_are_all_there_are(setup: Setup) -> None:
    per_prompt = setup.probs_B.view(len(PROMPTS), -1).sum(-1)
    torch.testing.assert_close(per_prompt, torch.ones_like(per_prompt), atol=1e-12, rtol=0)


def test_the_expected_gradient_is_that_of_score_minus_kl(setup: Setup) -> None:
    with in_float64():
        error = error_of(ppo_gradient(setup), setup.exact)
    assert error < 1e-12


def test_it_is_in_float32_too(setup: Setup) -> None:
    """As in production: the log-softmax, and the norms of Llama, in float32."""
    assert error_of(ppo_gradient(setup), setup.exact) < 1e-5


def test_micro_batches_add_up_to_it(setup: Setup) -> None:
    parts = [list(range(i, len(ROWS), 7)) for i in range(7)]
    with in_float64():
        error = error_of(ppo_gradient(setup, micro_batches=parts), setup.exact)
    assert error < 1e-12


# ---- what must not pass --------------------------------------------------------------------


def at_first_token(scores_B: Tensor, *others: Any) -> Tensor:
    rewards_BR = ppo_math.kl_penalised_rewards(torch.zeros_like(scores_B), *others)
    rewards_BR[:, 0] += scores_B
    return rewards_BR


def at_last_slot(scores_B: Tensor, *others: Any) -> Tensor:
    """The score in the last column of the batch, which for a short response is padding."""
    rewards_BR = ppo_math.kl_penalised_rewards(torch.zeros_like(scores_B), *others)
    rewards_BR[:, -1] += scores_B
    return rewards_BR


def by_k2(scores_B: Tensor, logprobs: Tensor, ref: Tensor, valid: Tensor, coef: float) -> Tensor:
    zeros = torch.zeros_like(logprobs)
    rewards_BR = ppo_math.kl_penalised_rewards(scores_B, zeros, zeros, valid, coef)
    return rewards_BR - coef * 0.5 * (logprobs - ref) ** 2


def by_k3(scores_B: Tensor, logprobs: Tensor, ref: Tensor, valid: Tensor, coef: float) -> Tensor:
    zeros = torch.zeros_like(logprobs)
    rewards_BR = ppo_math.kl_penalised_rewards(scores_B, zeros, zeros, valid, coef)
    return rewards_BR - coef * ppo_math.kl_estimates(logprobs, ref, valid).k3_BR


MUTANTS: dict[str, dict[str, Any]] = {
    "temperature missing in training": {"temperature": 1.0},
    "sign of the KL turned": {"kl_coef": -KL_COEF},
    "no KL": {"kl_coef": 0.0},
    "score at the first token": {"rewards_of": at_first_token},
    "score in the last column": {"rewards_of": at_last_slot},
    "k2 in the reward": {"rewards_of": by_k2},
    "k3 in the reward": {"rewards_of": by_k3},
    "mean over the tokens of a micro-batch": {
        # by length, as buckets are: the shorter the responses, the more each token would weigh
        "micro_batches": [
            [i for i, (_, response) in enumerate(ROWS) if len(response) == length]
            for length in (1, 2, 3)
        ],
        "local_mean": True,
    },
}


@pytest.mark.parametrize("name", MUTANTS)
def test_an_error_shows(setup: Setup, name: str) -> None:
    with in_float64():
        error = error_of(ppo_gradient(setup, **MUTANTS[name]), setup.exact)
    assert error > 0.1, name


def test_an_end_token_left_out_of_the_loss_shows(setup: Setup) -> None:
    valid_BR = setup.batch.valid_BR.clone()
    for b, (_, response) in enumerate(ROWS):
        if response[-1] == END and len(response) > 1:
            valid_BR[b, len(response) - 1] = False
    with in_float64():
        error = error_of(ppo_gradient(setup, valid_BR=valid_BR), setup.exact)
    assert error > 0.1


class OnePositionLate(nn.Module):
    """A language model of which the logits of the position after are read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *, input_ids: Tensor, logits_to_keep: int | Tensor, **other: Any) -> Any:
        logits_BTV = self.model(input_ids=input_ids, **other).logits.roll(-1, dims=1)
        if isinstance(logits_to_keep, int):
            return SimpleNamespace(logits=logits_BTV[:, -logits_to_keep:])
        return SimpleNamespace(logits=logits_BTV[logits_to_keep])


def test_logits_one_position_late_show(setup: Setup) -> None:
    late = dataclasses.replace(setup, policy=OnePositionLate(setup.policy))
    with in_float64():
        assert error_of(ppo_gradient(late), setup.exact) > 0.1


def test_gae_with_a_wrong_value_is_biased_as_theory_says(setup: Setup) -> None:
    """lambda < 1 trusts the values: with arbitrary ones the gradient is no longer exact."""
    with in_float64():
        error = error_of(ppo_gradient(setup, lam=0.95), setup.exact)
    assert 1e-3 < error < 0.5
