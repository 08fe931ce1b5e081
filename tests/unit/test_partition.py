"""Who does what among the ranks: everything once, for any number of things and of ranks."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from stages.common import epoch_order, micro_batches, own_share

WORLDS = (1, 2, 3, 4, 5, 7, 8, 64)


@pytest.mark.parametrize("world", WORLDS)
def test_shares_cover_everything_once_and_in_order(world: int) -> None:
    for count in [*range(20), 63, 64, 65, 1000, 10**12 + 1]:
        shares = [
            own_share(count, SimpleNamespace(process_index=rank, num_processes=world))
            for rank in range(world)
        ]
        # gathered in rank order they are the whole: each begins where the one before ended
        assert (shares[0].start, shares[-1].stop) == (0, count)
        assert all(a.stop == b.start for a, b in itertools.pairwise(shares))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_rows_of_a_step_are_shared_without_loss_or_repeat(world: int, count: int) -> None:
    """As pretrain, reward, ppo and its text do it: every world-th row, and those in micro-batches."""
    for start in (0, 5, 29):
        step = epoch_order(11, start, count, 3, "rows")
        shares = [step[rank::world] for rank in range(world)]
        assert sorted(row for share in shares for row in share) == sorted(step)
        for share in shares:
            lengths = [1 + row % 4 for row in share]
            parts = micro_batches(lengths, max_rows=3, max_tokens=6)
            assert sorted(i for part in parts for i in part) == list(range(len(share)))


@pytest.mark.parametrize("world", WORLDS)
def test_steps_of_any_world_are_the_same_rows(world: int) -> None:
    """What a step trains on does not depend on how many share it: passes go on where they ended."""
    seen = []
    for step in range(6):
        picked = epoch_order(10, step * 4, 4, 3, "rows")
        seen += sorted(row for rank in range(world) for row in picked[rank::world])
    assert sorted(seen) == sorted(epoch_order(10, 0, 24, 3, "rows"))
