"""Changing an answer, known answers, repeats, freezing, writing: what a day of labelling is made of."""

import json

import pytest
import sqlalchemy as sa

from labeling_ui import handout
from labeling_ui.assignments import claim, save_draft
from labeling_ui.changes import RECENT, leave, recent, reopen
from labeling_ui.exporting import snapshot
from labeling_ui.forms import Refused
from labeling_ui.progress import my_progress, progress
from labeling_ui.schema import assignments, guidelines, queues, rankings, tasks
from labeling_ui.store import insert_new, task_row
from labeling_ui.submitting import skip, submit
from tests.label_work import store_with_work

NOW = 1_000_000.0


def make(new_store, prompts=3, people=2, kind="rank", responses=3, name="labels", **queue):
    texts = [f"answer {j}" for j in range(responses)]
    return store_with_work(new_store(name), people, prompts, texts, kind, **queue)


def stored(store):
    with store.read() as tx:
        return tx.execute(
            sa.select(rankings).order_by(rankings.c.created, rankings.c.revision)
        ).all()


def change(store, table, **values):
    with store.write() as tx:
        tx.execute(sa.update(table).values(**values))


def rank_next(store, person, now, ranks=(1, 2, 3), **more):
    work = claim(store, person, now)
    submit(store, person, work.token, {"ranks": list(ranks), **more}, now)
    return work


def test_everything_that_was_said_is_kept_by_stored_place(new_store):
    store, (ann, _) = make(new_store)
    change_guidelines(store)
    work = claim(store, ann, NOW)
    marks = [{"score": i + 1, "flags": ["truncated"] if i == 2 else []} for i in range(3)]
    form = {"ranks": [2, 1, 1], "marks": marks, "comment": "hm", "confidence": 3, "ideal": "better"}
    submit(store, ann, work.token, form, NOW + 60, submission="s", active_seconds=9.5)
    (row,) = stored(store)
    with store.read() as tx:
        texts = json.loads(
            tx.execute(sa.select(tasks.c.responses).where(tasks.c.id == work.task_id)).scalar_one()
        )
    by_text = dict(
        zip(texts, zip(json.loads(row.ranks), json.loads(row.marks), strict=True), strict=True)
    )
    assert [by_text[text] for text in work.responses] == list(zip([2, 1, 1], marks, strict=True))
    assert (row.comment, row.confidence, row.ideal) == ("hm", 3, "better")
    assert (row.active_seconds, row.guidelines, row.status) == (9.5, 2, "ranked")


def change_guidelines(store):
    with store.write() as tx:
        for version in (1, 2):
            tx.execute(sa.insert(guidelines).values(version=version, text="x", created=NOW))


def test_nobody_can_have_worked_longer_than_the_prompt_was_theirs(new_store):
    store, (ann, _) = make(new_store)
    work = claim(store, ann, NOW)
    submit(store, ann, work.token, [1, 2, 3], NOW + 60, active_seconds=3600.0)
    assert stored(store)[0].active_seconds == 60.0


def test_all_bad_needs_no_order_fills_the_place_and_teaches_nothing(new_store):
    store, (ann, _) = make(new_store, prompts=1)
    work = claim(store, ann, NOW)
    with pytest.raises(Refused, match="Place every response"):
        submit(store, ann, work.token, {"ranks": [1, None, None]}, NOW)
    saved = submit(store, ann, work.token, {"ranks": [1, None, None], "all_bad": True}, NOW)
    assert saved.state == "unrankable"
    assert progress(store, "rank") == (0, 0)
    assert snapshot(store, 0.0) == []
    # bad, and still an order
    other = make(new_store, prompts=1, name="b")
    store, (ann, _) = other
    rank_next(store, ann, NOW, all_bad=True)
    assert (stored(store)[0].all_bad, len(snapshot(store, 0.0))) == (True, 1)


def test_an_answer_can_be_changed_until_the_round_is_closed(new_store):
    store, (ann, bob) = make(new_store)
    first = rank_next(store, ann, NOW, comment="first")
    second = claim(store, ann, NOW + 1)
    assert [item.token for item in recent(store, ann)] == [first.token]
    with pytest.raises(Refused, match="not yours"):
        reopen(store, bob, first.token)
    reopen(store, ann, first.token, NOW + 2)
    again = claim(store, ann, NOW + 2)
    assert (again.token, again.is_edit) == (first.token, True)
    assert (again.form.ranks, again.form.comment) == ((1, 2, 3), "first")
    assert again.responses == first.responses
    # a draft of the change survives a reload
    assert save_draft(store, ann, first.token, [3, 2, 1], again.revision + 1, NOW + 3)
    assert claim(store, ann, NOW + 4).form.ranks == (3, 2, 1)
    assert submit(store, ann, first.token, [3, 2, 1], NOW + 5).message == "Changed."
    old, new = stored(store)
    assert (old.superseded_by, new.revision) == (new.id, 2)
    assert len(snapshot(store, 0.0)) == 1
    # and the prompt that was begun before is there again
    assert claim(store, ann, NOW + 6).token == second.token
    change(store, queues, open=False)
    assert recent(store, ann) == []
    with pytest.raises(Refused, match="can be changed"):
        reopen(store, ann, first.token)


def test_a_change_that_is_left_changes_nothing(new_store):
    store, (ann, _) = make(new_store)
    first = rank_next(store, ann, NOW)
    reopen(store, ann, first.token, NOW)
    save_draft(store, ann, first.token, [3, 3, 3], 99, NOW)
    leave(store, ann, first.token)
    assert claim(store, ann, NOW).token != first.token
    assert [json.loads(row.ranks) for row in stored(store)] == [sorted_ranks(store, first)]


def sorted_ranks(store, work):
    """Ranks 1, 2, 3 in the order shown, by stored place."""
    with store.read() as tx:
        query = sa.select(assignments.c.display_order).where(assignments.c.token == work.token)
        order = json.loads(tx.execute(query).scalar_one())
    return [order.index(place) + 1 for place in range(len(order))]


def test_a_replayed_submission_is_harmless_whatever_it_holds(new_store):
    store, (ann, _) = make(new_store)
    work = claim(store, ann, NOW)
    submit(store, ann, work.token, [1, 2, 3], NOW, submission="one")
    reopen(store, ann, work.token, NOW)
    submit(store, ann, work.token, [3, 2, 1], NOW + 1, submission="two")
    # the first press arrives again, late: it must not undo the change
    assert submit(store, ann, work.token, [1, 2, 3], NOW + 2, submission="one").state == "already"
    assert len(stored(store)) == 2


def test_a_replay_that_comes_while_the_answer_is_changed_leaves_the_change_alone(new_store):
    store, (ann, _) = make(new_store)
    work = claim(store, ann, NOW)
    submit(store, ann, work.token, [1, 2, 3], NOW, submission="one")
    reopen(store, ann, work.token, NOW + 1)
    save_draft(store, ann, work.token, [3, None, 1], 9, NOW + 2)
    assert submit(store, ann, work.token, [1, 2, 3], NOW + 3, submission="one").state == "already"
    assert claim(store, ann, NOW + 4).form.ranks == (3, None, 1)
    assert submit(store, ann, work.token, [3, 2, 1], NOW + 5).message == "Changed."


@pytest.mark.parametrize("odd", ["", "a\0b", "\ud800", 5, None, ["x"], "x" * 500])
def test_an_odd_submission_id_does_no_harm(new_store, odd):
    store, (ann, _) = make(new_store)
    work = claim(store, ann, NOW)
    assert submit(store, ann, work.token, [1, 2, 3], NOW, submission=odd).state == "ranked"
    assert submit(store, ann, work.token, [1, 2, 3], NOW, submission=odd).state == "already"


def test_only_the_last_ten_can_be_changed(new_store):
    store, (ann, _) = make(new_store, prompts=RECENT + 2)
    done = [rank_next(store, ann, NOW + i) for i in range(RECENT + 2)]
    assert [item.token for item in recent(store, ann)] == [w.token for w in reversed(done[2:])]
    with pytest.raises(Refused, match="last 10"):
        reopen(store, ann, done[0].token)


def test_a_change_fills_no_second_place(new_store):
    store, (ann, bob) = make(new_store, prompts=1, overlap=2)
    work = rank_next(store, ann, NOW)
    reopen(store, ann, work.token, NOW)
    submit(store, ann, work.token, [2, 1, 3], NOW)
    assert progress(store, "rank") == (1, 2)
    assert claim(store, bob, NOW) is not None


def test_frozen_prompts_are_not_handed_out_and_what_still_comes_is_kept_as_late(new_store):
    store, (ann, bob) = make(new_store)
    done = rank_next(store, ann, NOW)
    begun = claim(store, ann, NOW)
    reopen(store, ann, done.token, NOW)
    change(store, queues, frozen=True)
    assert claim(store, bob, NOW) is None
    assert submit(store, ann, begun.token, [1, 2, 3], NOW).state == "late"
    with pytest.raises(Refused, match="stands"):
        submit(store, ann, done.token, [3, 2, 1], NOW)
    assert len(snapshot(store, 0.0)) == 1


def gold(store, count=2):
    rows = []
    for i in range(count):
        ask = [{"role": "user", "content": f"gold {i}"}]
        row = task_row(ask, ["x", "y", "z"], round=1, origin="import", kind="gold")
        rows.append({**row, "gold": "[1,2,3]"})
    with store.write() as tx:
        insert_new(tx, tasks, rows)
    return {row["id"] for row in rows}


def test_known_answers_come_between_once_each_and_never_reach_an_export(new_store):
    store, (ann, bob) = make(new_store, prompts=4, gold_rate=1.0)
    known = gold(store)
    seen = [rank_next(store, ann, NOW + i).task_id for i in range(6)]
    assert set(seen[:2]) == known
    assert not known & set(seen[2:])
    assert claim(store, ann, NOW) is None
    assert len(snapshot(store, 0.0)) == 4
    assert progress(store, "rank") == (4, 4)
    # nothing but the queue decides when a day is over
    assert claim(store, bob, NOW) is None
    assert my_progress(store, ann, NOW) == (6, 0, False)


def test_a_known_answer_made_from_a_prompt_is_not_shown_to_those_who_ranked_it(new_store):
    store, (ann, bob) = make(new_store, prompts=4, overlap=2, gold_rate=1.0)
    first = rank_next(store, ann, NOW)
    with store.write() as tx:
        row = dict(tx.execute(sa.select(tasks).where(tasks.c.id == first.task_id)).mappings().one())
        copy = {**row, "id": "copy", "kind": "gold", "step": None, "gold": "[1,2,3]", "filled": 0}
        tx.execute(sa.insert(tasks).values({**copy, "repeat_of": first.task_id}))
    assert "copy" not in {rank_next(store, ann, NOW + i).task_id for i in range(1, 4)}
    assert rank_next(store, bob, NOW).task_id == "copy"


def test_without_a_rate_no_known_answer_is_handed_out(new_store):
    store, (ann, _) = make(new_store, prompts=3)
    known = gold(store)
    assert not known & {rank_next(store, ann, NOW).task_id for _ in range(3)}


def test_an_own_answer_comes_again_once_in_a_new_order_and_counts_nothing(new_store, monkeypatch):
    monkeypatch.setattr(handout, "REPEAT_AFTER", 2)
    store, (ann, bob) = make(new_store, prompts=5, repeat_rate=1.0)
    seen = [rank_next(store, ann, NOW + i).task_id for i in range(7)]
    assert claim(store, ann, NOW) is None
    with store.read() as tx:
        repeats = {
            row.id: row for row in tx.execute(sa.select(tasks).where(tasks.c.kind == "repeat"))
        }
    assert [task in repeats for task in seen[:3]] == [False] * 3
    assert len(repeats) == 2
    assert all(row.for_user == ann and row.repeat_of in seen for row in repeats.values())
    assert len({row.repeat_of for row in repeats.values()}) == len(repeats)
    assert len(snapshot(store, 0.0)) == 5
    assert progress(store, "rank") == (5, 5)
    assert claim(store, bob, NOW) is None


def test_a_prompt_to_answer_wants_a_text_and_no_order(new_store):
    store, (ann, _) = make(new_store, kind="write", responses=0, prompts=1)
    work = claim(store, ann, NOW)
    assert work.responses == ()
    with pytest.raises(Refused, match="Write an answer"):
        submit(store, ann, work.token, {"ideal": "  "}, NOW)
    save_draft(store, ann, work.token, {"ideal": "Half an"}, 1, NOW)
    assert claim(store, ann, NOW).form.ideal == "Half an"
    assert submit(store, ann, work.token, {"ideal": "Half an answer."}, NOW).message == "Saved."
    (row,) = stored(store)
    assert (row.status, row.ideal, row.ranks) == ("written", "Half an answer.", None)
    assert snapshot(store, 0.0) == []


def test_important_prompts_come_first(new_store):
    store, (ann, _) = make(new_store, prompts=6)
    with store.write() as tx:
        tx.execute(
            sa.update(tasks).where(tasks.c.messages.contains("prompt 4")).values(priority=2.0)
        )
        tx.execute(
            sa.update(tasks).where(tasks.c.messages.contains("prompt 1")).values(priority=1.0)
        )
    first = [rank_next(store, ann, NOW).messages[0]["content"] for _ in range(2)]
    assert first == ["prompt 4", "prompt 1"]


def test_progress_counts_what_is_left_for_each(new_store):
    store, (ann, bob) = make(new_store, prompts=3)
    assert my_progress(store, ann, NOW) == (0, 3, True)
    work = claim(store, ann, NOW)
    assert my_progress(store, ann, NOW) == (0, 3, True)
    assert my_progress(store, bob, NOW) == (0, 2, True)
    submit(store, ann, work.token, [1, 2, 3], NOW)
    assert my_progress(store, ann, NOW) == (1, 2, True)
    skip(store, ann, claim(store, ann, NOW).token, "cannot_judge", NOW)
    assert my_progress(store, ann, NOW) == (1, 1, True)
    assert my_progress(store, bob, NOW) == (0, 2, True)
