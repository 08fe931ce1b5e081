"""The clock of the machine jumps while people rank: nobody loses work, and no prompt is blocked for long."""

from __future__ import annotations

import sqlalchemy as sa

from labeling_ui.assignments import claim, save_draft
from labeling_ui.progress import my_progress, progress
from labeling_ui.schema import assignments, rankings
from labeling_ui.submitting import submit
from tests.label_work import store_with_work

NOW = 1_000_000.0
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
TEXTS = ("a", "b", "c")


def test_set_back_an_hour_the_work_in_hand_goes_on_and_is_not_handed_out_twice(new_store):
    store, (ann, bob) = store_with_work(new_store(), 2, 1, TEXTS)
    work = claim(store, ann, NOW)
    assert save_draft(store, ann, work.token, [1, None, None], 1, NOW + MINUTE)
    assert claim(store, ann, NOW - HOUR).token == work.token
    assert save_draft(store, ann, work.token, [1, 2, None], 2, NOW - HOUR)
    assert submit(store, ann, work.token, [1, 2, 3], NOW - HOUR + MINUTE).state == "ranked"
    assert claim(store, bob, NOW - HOUR + MINUTE) is None
    assert progress(store, "rank") == (1, 1)


def test_set_back_an_hour_a_prompt_that_nobody_finishes_is_free_at_once(new_store):
    store, (ann, bob) = store_with_work(new_store(), 2, 1, TEXTS)
    slow = claim(store, ann, NOW)
    # without the jump it would be hers for thirty minutes, with it for ninety
    fast = claim(store, bob, NOW - HOUR)
    assert fast is not None
    assert submit(store, bob, fast.token, [1, 2, 3], NOW - HOUR + MINUTE).state == "ranked"
    # what she has done is kept, as that of anybody who was too slow
    assert submit(store, ann, slow.token, [3, 2, 1], NOW - HOUR + MINUTE).state == "late"
    with store.read() as tx:
        assert tx.execute(sa.select(sa.func.count()).select_from(rankings)).scalar_one() == 2


def test_a_clock_that_is_a_minute_off_ends_no_lease(new_store):
    store, (ann, bob) = store_with_work(new_store(), 2, 1, TEXTS)
    assert claim(store, ann, NOW) is not None
    assert claim(store, bob, NOW - MINUTE) is None


def test_a_day_ahead_and_back_again_leaves_nothing_blocked(new_store):
    store, (ann, bob) = store_with_work(new_store(), 2, 1, TEXTS)
    claim(store, ann, NOW)
    ahead = claim(store, bob, NOW + DAY)
    assert ahead is not None
    # back: both leases are there, his from tomorrow
    again = claim(store, ann, NOW + MINUTE)
    assert again is not None
    assert submit(store, ann, again.token, [1, 2, 3], NOW + 2 * MINUTE).state == "ranked"
    assert my_progress(store, bob, NOW + 3 * MINUTE)[1] >= 0
    with store.read() as tx:
        times = tx.execute(sa.select(assignments.c.leased, assignments.c.expires)).all()
    assert all(row.expires >= row.leased for row in times)
