"""Nobody is handed what others have, nothing that was saved is lost, and nobody can cheat."""

import json

import pytest
import sqlalchemy as sa

from labeling_ui.assignments import claim, save_draft
from labeling_ui.forms import Refused
from labeling_ui.progress import progress
from labeling_ui.schema import assignments, queues, rankings, tasks, users
from labeling_ui.submitting import skip, submit, submit_in
from tests.label_work import store_with_work

NOW = 1_000_000.0
MINUTE = 60.0


def make(new_store, prompts=3, people=2, responses=3, **queue):
    texts = [f"answer {j}" for j in range(responses)]
    return store_with_work(new_store(), people, prompts, texts, **queue)


def stored(store, task):
    with store.read() as tx:
        return tx.execute(
            sa.select(rankings).where(rankings.c.task_id == task).order_by(rankings.c.revision)
        ).all()


def test_a_person_who_comes_back_finds_the_same_prompt_in_the_same_order_with_their_draft(
    new_store,
):
    store, (ann, _) = make(new_store)
    first = claim(store, ann, NOW)
    assert save_draft(store, ann, first.token, [1, None, 2], 1, NOW)
    again = claim(store, ann, NOW + MINUTE)
    assert (again.token, again.responses) == (first.token, first.responses)
    assert again.form.ranks == (1, None, 2)
    assert again.revision == 1


def test_an_older_tab_cannot_overwrite_a_newer_draft(new_store):
    store, (ann, _) = make(new_store)
    work = claim(store, ann, NOW)
    assert save_draft(store, ann, work.token, [1, 2, 3], 5, NOW)
    assert not save_draft(store, ann, work.token, [None, None, None], 5, NOW)
    assert not save_draft(store, ann, work.token, [3, 3, 3], 4, NOW)
    assert claim(store, ann, NOW).form.ranks == (1, 2, 3)


def test_a_prompt_begun_by_one_is_finished_before_another_is_begun(new_store):
    store, people = make(new_store, prompts=5, people=2, overlap=2)
    first = claim(store, people[0], NOW)
    assert claim(store, people[1], NOW).task_id == first.task_id


def test_an_ended_lease_returns_the_prompt_to_the_queue(new_store):
    store, (ann, bob) = make(new_store, prompts=1)
    claim(store, ann, NOW)
    assert claim(store, bob, NOW + 29 * MINUTE) is None
    assert claim(store, bob, NOW + 31 * MINUTE) is not None


def test_a_draft_prolongs_the_lease_but_not_for_ever(new_store):
    store, (ann, bob) = make(new_store, prompts=1)
    work = claim(store, ann, NOW)
    save_draft(store, ann, work.token, [1, None, None], 1, NOW + 25 * MINUTE)
    assert claim(store, bob, NOW + 50 * MINUTE) is None
    for i in range(2, 30):
        save_draft(store, ann, work.token, [1, None, None], i, NOW + i * 20 * MINUTE)
    assert claim(store, bob, NOW + 5 * 60 * MINUTE) is not None


def test_a_late_draft_is_kept_but_does_not_take_the_place_of_another(new_store):
    store, (ann, bob) = make(new_store, prompts=1)
    slow = claim(store, ann, NOW)
    fast = claim(store, bob, NOW + 31 * MINUTE)
    assert save_draft(store, ann, slow.token, [1, 2, None], 1, NOW + 32 * MINUTE)
    assert submit(store, bob, fast.token, [1, 2, 3], NOW + 33 * MINUTE).state == "ranked"
    assert submit(store, ann, slow.token, [1, 2, 3], NOW + 34 * MINUTE).state == "late"
    assert progress(store, "rank") == (1, 1)


def test_ranks_reach_the_responses_that_were_shown_in_their_places(new_store):
    store, (ann, _) = make(new_store, prompts=1, responses=5)
    work = claim(store, ann, NOW)
    liked = {text: place for place, text in enumerate(sorted(work.responses), 1)}
    submit(store, ann, work.token, [liked[text] for text in work.responses], NOW)
    (row,) = stored(store, work.task_id)
    with store.read() as tx:
        texts = json.loads(tx.execute(sa.select(tasks.c.responses)).scalar_one())
    assert dict(zip(texts, json.loads(row.ranks), strict=True)) == liked


def test_annotators_see_different_orders(new_store):
    store, people = make(new_store, prompts=1, people=12, overlap=12, responses=4)
    assert len({claim(store, person, NOW).responses for person in people}) > 1


def test_gaps_between_ranks_are_closed_and_ties_kept(new_store):
    store, (ann, _) = make(new_store, prompts=1, responses=4)
    work = claim(store, ann, NOW)
    submit(store, ann, work.token, [4, 2, 4, 2], NOW)
    (row,) = stored(store, work.task_id)
    assert sorted(json.loads(row.ranks)) == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "ranks",
    [
        [1, 2],
        [1, 2, 3, 1],
        [1, 2, None],
        [0, 1, 2],
        [1, 2, 4],
        [1, 2, "3"],
        [1, 2, 2.0],
        [1, 2, True],
        "123",
        None,
        {"0": 1, "1": 2, "2": 3},
    ],
)
def test_ranks_that_are_not_a_whole_order_are_refused_and_nothing_is_saved(new_store, ranks):
    store, (ann, _) = make(new_store, prompts=1)
    work = claim(store, ann, NOW)
    with pytest.raises(Refused):
        submit(store, ann, work.token, ranks, NOW)
    assert stored(store, work.task_id) == []


def test_the_same_submission_twice_is_saved_once(new_store):
    store, (ann, _) = make(new_store)
    work = claim(store, ann, NOW)
    assert submit(store, ann, work.token, [1, 2, 3], NOW).state == "ranked"
    assert submit(store, ann, work.token, [1, 2, 3], NOW).message == "Already saved."
    other = submit(store, ann, work.token, [3, 2, 1], NOW)
    assert other.state == "already"
    assert "not stored" in other.message
    assert len(stored(store, work.task_id)) == 1


def test_nobody_can_submit_draft_or_skip_for_another(new_store):
    store, (ann, bob) = make(new_store)
    token = claim(store, ann, NOW).token
    for act in (
        lambda: submit(store, bob, token, [1, 2, 3], NOW),
        lambda: save_draft(store, bob, token, [1, 2, 3], 1, NOW),
        lambda: skip(store, bob, token, "broken", NOW),
        lambda: submit(store, ann, "made-up", [1, 2, 3], NOW),
        lambda: submit(store, ann, "\0", [1, 2, 3], NOW),
        lambda: submit(store, ann, "\ud800", [1, 2, 3], NOW),
        lambda: submit(store, ann, None, [1, 2, 3], NOW),
    ):
        with pytest.raises(Refused, match="not yours"):
            act()


def test_a_disabled_person_can_neither_claim_nor_submit(new_store):
    store, (ann, _) = make(new_store)
    token = claim(store, ann, NOW).token
    with store.write() as tx:
        tx.execute(sa.update(users).where(users.c.id == ann).values(active=False))
    with pytest.raises(Refused, match="not active"):
        claim(store, ann, NOW)
    with pytest.raises(Refused, match="not active"):
        submit(store, ann, token, [1, 2, 3], NOW)


def test_work_that_comes_late_is_kept_and_marked(new_store):
    store, (ann, bob) = make(new_store, prompts=1)
    slow = claim(store, ann, NOW)
    fast = claim(store, bob, NOW + 40 * MINUTE)
    submit(store, bob, fast.token, [1, 2, 3], NOW + 41 * MINUTE)
    saved = submit(store, ann, slow.token, [3, 2, 1], NOW + 42 * MINUTE)
    assert saved.state == "late"
    assert [row.late for row in stored(store, slow.task_id)].count(True) == 1
    assert progress(store, "rank") == (1, 1)


def test_late_work_counts_when_nobody_else_has_filled_the_place(new_store):
    store, (ann, _) = make(new_store, prompts=1)
    work = claim(store, ann, NOW)
    assert submit(store, ann, work.token, [1, 2, 3], NOW + 300 * MINUTE).state == "ranked"


def test_a_skip_goes_to_others_unless_nobody_can_rank_it(new_store):
    store, (ann, bob) = make(new_store, prompts=1)
    skip(store, ann, claim(store, ann, NOW).token, "cannot_judge", NOW)
    assert claim(store, ann, NOW) is None
    assert progress(store, "rank") == (0, 1)
    skip(store, bob, claim(store, bob, NOW).token, "broken", NOW)
    assert progress(store, "rank") == (0, 0)


def test_a_skip_needs_a_known_reason(new_store):
    store, (ann, _) = make(new_store)
    token = claim(store, ann, NOW).token
    for reason in ("", None, "because"):
        with pytest.raises(Refused, match="reason"):
            skip(store, ann, token, reason, NOW)


def test_a_changed_mind_is_a_new_revision_and_the_old_one_stays(new_store):
    store, (ann, _) = make(new_store, prompts=1)
    work = claim(store, ann, NOW)
    with store.write() as tx:
        submit_in(tx, ann, work.token, [1, 2, 3], NOW)
        submit_in(tx, ann, work.token, [3, 2, 1], NOW, revise=True)
    first, second = stored(store, work.task_id)
    assert first.superseded_by == second.id
    assert second.superseded_by is None
    assert first.ranks != second.ranks


def test_closed_queues_and_old_samples_are_not_handed_out(new_store):
    store, (ann, _) = make(new_store)
    with store.write() as tx:
        tx.execute(sa.update(queues).values(open=False))
    assert claim(store, ann, NOW) is None
    with store.write() as tx:
        tx.execute(sa.update(queues).values(open=True))
        tx.execute(sa.update(tasks).values(active=False))
    assert claim(store, ann, NOW) is None


def test_a_minimum_above_what_the_prompts_can_give_does_not_wait_for_ever(new_store):
    store, _ = make(new_store, prompts=3, overlap=1, minimum=50)
    assert progress(store, "rank") == (0, 3)


def test_every_claim_has_an_assignment_of_its_own(new_store):
    store, people = make(new_store, prompts=4, people=3)
    tokens = {claim(store, person, NOW).token for person in people}
    with store.read() as tx:
        assert tokens == set(tx.execute(sa.select(assignments.c.token)).scalars())
