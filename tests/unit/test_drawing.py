"""Drawing a token: the chunked inversion against the plain one, and its corners."""

from __future__ import annotations

import pytest
import torch

from stages.generation import _inverted, choose


@pytest.mark.parametrize("V", [1, 7, 256, 257, 1000])
def test_a_draw_is_the_first_token_whose_running_sum_exceeds_the_number(V: int) -> None:
    rng = torch.Generator().manual_seed(V)
    weights_BV = torch.rand(200, V, generator=rng)
    weights_BV[:, ::3] *= 0 if V > 1 else 1
    uniform_B = torch.rand(200, generator=rng, dtype=torch.float64)
    found_B = _inverted(weights_BV, uniform_B).squeeze(-1)
    for weights_V, uniform, found in zip(
        weights_BV.tolist(), uniform_B.tolist(), found_B.tolist(), strict=True
    ):
        total, target = 0.0, uniform * sum(weights_V)
        for token, weight in enumerate(weights_V):  # noqa: B007
            total += weight
            if total > target:
                break
        assert found == token


@pytest.mark.parametrize("V", [5, 600])
def test_the_ends_of_the_interval_never_take_a_token_without_weight(V: int) -> None:
    weights_BV = torch.zeros(3, V)
    weights_BV[:, 1] = 0.1
    weights_BV[:, V - 3] = 0.3
    uniform_B = torch.tensor([0.0, 0.25 + 1e-6, 1 - 2**-53], dtype=torch.float64)
    assert _inverted(weights_BV, uniform_B).squeeze(-1).tolist() == [1, V - 3, V - 3]


def test_rare_tokens_of_a_large_vocabulary_are_as_frequent_as_they_should_be() -> None:
    """Evenly spread numbers: each token is taken as often as its probability says, to one draw."""
    V, draws = 50_000, 1000
    logits_V = torch.linspace(0, 3, V)
    uniform_B = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    taken = torch.cat(
        [choose(logits_V.expand(len(u), V), u, 1.0, 1.0)[0] for u in uniform_B.split(250)]
    )
    probs_V = logits_V.double().softmax(-1)
    # in ranges of 1000 tokens: the expected count is right to the draws at both ends
    counts = torch.bincount(taken // 1000, minlength=50).double()
    expected = probs_V.view(50, 1000).sum(-1) * draws
    assert (counts - expected).abs().max() <= 1.01
    assert (taken.diff() >= 0).all()
