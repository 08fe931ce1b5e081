"""Seeds, orders, learning rates and divisions that every stage relies on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pipeline.errors import ConfigError
from stages.common import (
    epoch_order,
    exact_div,
    pad_right,
    permutation,
    seed_for,
    warmup_cosine,
    warmup_linear,
)


def test_a_seed_depends_on_every_part_of_its_purpose_and_on_nothing_else() -> None:
    assert seed_for(1, "ppo", 3) == seed_for(1, "ppo", 3)
    others = [seed_for(2, "ppo", 3), seed_for(1, "sft", 3), seed_for(1, "ppo", 4)]
    assert len({seed_for(1, "ppo", 3), *others}) == 4
    assert 0 <= seed_for(1, "ppo", 3) < 2**63


def test_every_pass_of_an_epoch_order_holds_every_item_once() -> None:
    order = epoch_order(7, 0, 21, 5, "rows")
    for epoch in range(3):
        assert sorted(order[epoch * 7 : epoch * 7 + 7]) == list(range(7))
    assert order[:7] != order[7:14]


def test_an_epoch_order_is_the_same_however_it_is_cut() -> None:
    whole = epoch_order(7, 0, 23, 5, "rows")
    cut = [i for at in range(0, 23, 4) for i in epoch_order(7, at, min(4, 23 - at), 5, "rows")]
    assert cut == whole


def test_a_batch_larger_than_the_data_wraps_and_does_not_hang() -> None:
    counts = Counter(epoch_order(3, 0, 8, 0, "x"))
    assert sorted(counts.values()) == [2, 3, 3]


def test_a_permutation_is_one() -> None:
    assert sorted(permutation(50, 1, "a")) == list(range(50))


def test_an_inexact_division_names_the_setting() -> None:
    assert exact_div(12, 4, "ppo.minibatch_rows") == 3
    with pytest.raises(ConfigError, match=r"ppo\.minibatch_rows = 13 cannot be divided by 4"):
        exact_div(13, 4, "ppo.minibatch_rows")


def test_cosine_warms_up_to_1_and_ends_at_the_floor() -> None:
    factors = [warmup_cosine(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.6)
    assert warmup_cosine(100, 100, 0.1, 0.2) == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_linear_goes_down_to_0_and_works_without_warm_up() -> None:
    assert warmup_linear(0, 10, 0.0) == 1.0
    assert warmup_linear(5, 10, 0.0) == pytest.approx(0.5)
    assert warmup_linear(10, 10, 0.0) == 0.0
    assert warmup_linear(0, 1, 0.03) == 1.0, "a single step trains"


def test_rows_are_filled_on_the_right() -> None:
    padded = pad_right([[1, 2, 3], [4]], 9, torch.device("cpu"))
    assert padded.tolist() == [[1, 2, 3], [4, 9, 9]]
