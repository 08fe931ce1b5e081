"""Which validation is published, by hand; and across a stop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stages.keeping import Keeper


def fill(
    keeper: Keeper, parameters: dict[str, nn.Parameter], name: str, values: list[float]
) -> None:
    for update, value in enumerate(values):
        with torch.no_grad():
            parameters["w"].fill_(update)
        keeper.offer(update, {name: value})


def parameters() -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.zeros(2))}


def test_the_highest_reward_is_kept_as_it_was_then() -> None:
    given = parameters()
    keeper = Keeper(given, "best_reward", updates=3)
    fill(keeper, given, "validation_reward", [1.0, 3.0, 2.0, 3.0])
    assert keeper.metrics == {"best_update": 1, "validation_reward": 3.0}
    assert keeper.best["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("golds", "best"),
    [
        # smoothed: 1.67, 2.25, 1.5, 1.75, 2.33: the spike at 1 is no peak
        ([0.0, 5.0, -1.0, 3.0, 2.0], 4),
        ([0.0, 1.0, 2.0, 3.0, 4.0], 4),
        ([4.0, 3.0, 2.0, 1.0, 0.0], 0),
    ],
)  # fmt: skip
def test_a_lucky_draw_of_gold_is_no_peak(golds: list[float], best: int) -> None:
    given = parameters()
    keeper = Keeper(given, "best_gold", updates=len(golds) - 1)
    fill(keeper, given, "validation_gold", golds)
    assert keeper.metrics["best_update"] == best
    assert keeper.best["w"].tolist() == [best, best]


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_a_stop_changes_nothing(stopped_after: int) -> None:
    golds = [1.0, 4.0, 3.5, 1.0]
    given = parameters()
    whole = Keeper(given, "best_gold", updates=3)
    fill(whole, given, "validation_gold", golds)
    before = Keeper(given, "best_gold", updates=3)
    fill(before, given, "validation_gold", golds[:stopped_after])
    after = Keeper(given, "best_gold", updates=3)
    after.restore(before.tensors(), before.state())
    for update in range(stopped_after, 4):
        with torch.no_grad():
            given["w"].fill_(update)
        after.offer(update, {"validation_gold": golds[update]})
    assert after.metrics == whole.metrics
    assert after.state() == whole.state()
    assert after.best["w"].equal(whole.best["w"])
