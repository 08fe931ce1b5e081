"""Many at once, in processes of their own: nothing is lost, doubled or handed out too often."""

import itertools
import json
import multiprocessing
import random
import traceback
from collections import Counter
from contextlib import suppress

import pytest
import sqlalchemy as sa

from labeling_ui import database
from labeling_ui.assignments import claim, save_draft
from labeling_ui.changes import leave, recent, reopen
from labeling_ui.forms import Refused
from labeling_ui.progress import progress
from labeling_ui.schema import assignments, events, meta, queues, rankings, tasks
from labeling_ui.store import Store, log_event
from labeling_ui.submitting import submit
from tests.label_work import store_with_work

NOW = 1_000_000.0
MINUTE = 60.0
_FORK = multiprocessing.get_context("fork")


def make(new_store, prompts, people, overlap=1):
    """URL of a store with a queue of `prompts`, closed again, and the ids of `people`."""
    store, ids = store_with_work(new_store(), people, prompts, overlap=overlap)
    # a forked child must not share a connection
    store.close()
    return new_store.url(), ids


def together(work, arguments):
    """work(*argument) in a process for each, all let go at once; what they returned."""
    gate = _FORK.Barrier(len(arguments))

    def child(pipe, argument):
        # no test of speed: on a busy machine a turn may be long in coming
        database.BUSY_SECONDS = 900.0
        try:
            gate.wait(300)
            pipe.send((work(*argument), None))
        except BaseException:  # noqa: BLE001 - told to the parent, whatever it is
            pipe.send((None, traceback.format_exc()))

    children = []
    for argument in arguments:
        ours, theirs = _FORK.Pipe()
        process = _FORK.Process(target=child, args=(theirs, argument), daemon=True)
        process.start()
        theirs.close()
        children.append((process, ours))
    answers = [pipe.recv() for _, pipe in children]
    for process, _ in children:
        process.join()
    assert [problem for _, problem in answers if problem] == []
    return [answer for answer, _ in answers]


def look(store, query):
    with store.read() as tx:
        return tx.execute(query).all()


def check_sound(store, overlap):
    """What must hold in every store at every time."""
    rows = look(store, sa.select(rankings).order_by(rankings.c.revision))
    of = {row.id: row for row in rows}
    by_assignment = {}
    for row in rows:
        by_assignment.setdefault(row.assignment_id, []).append(row)
    for revisions in by_assignment.values():
        assert [row.revision for row in revisions] == list(range(1, len(revisions) + 1))
        for row, following in itertools.pairwise(revisions):
            assert of[row.superseded_by] is following
        assert revisions[-1].superseded_by is None
    owners = look(store, sa.select(assignments.c.task_id, assignments.c.user_id))
    assert len(set(owners)) == len(owners)
    states = look(store, sa.select(assignments.c.task_id, assignments.c.state))
    counted = Counter(task for task, state in states if state in ("ranked", "unrankable"))
    filled = dict(look(store, sa.select(tasks.c.id, tasks.c.filled)))
    assert {task: count for task, count in filled.items() if count} == dict(counted)
    assert max(filled.values()) <= overlap


# ---- many people ---------------------------------------------------------------------------


def work_until_nothing_is_left(url, person):
    store, done = Store(url), []
    while (work := claim(store, person)) is not None:
        said = submit(store, person, work.token, [1, 2, 3], submission=f"{person} {len(done)}")
        assert said.state == "ranked"
        done.append(work.task_id)
    return done


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("people", "prompts"), [(8, 30), pytest.param(16, 400, marks=pytest.mark.slow)]
)
def test_each_prompt_is_ranked_by_exactly_as_many_different_people_as_asked_for(
    new_store, people, prompts
):
    url, ids = make(new_store, prompts, people, overlap=2)
    done = together(work_until_nothing_is_left, [(url, person) for person in ids])
    assert all(len(set(mine)) == len(mine) for mine in done)
    counts = Counter(itertools.chain(*done))
    assert len(counts) == prompts
    assert set(counts.values()) == {2}
    store = new_store()
    check_sound(store, 2)
    assert progress(store, "rank") == (2 * prompts, 2 * prompts)
    said = {(ids[i], task) for i, mine in enumerate(done) for task in mine}
    kept = look(store, sa.select(rankings.c.user_id, rankings.c.task_id))
    assert len(kept) == 2 * prompts
    assert said == {tuple(row) for row in kept}


# ---- one person in several tabs ------------------------------------------------------------


def use_a_tab(url, person, tab):
    """Claim, draft, submit, replay, reopen and leave at random; ids of what was acknowledged."""
    store, dice, stored = Store(url), random.Random(tab), []
    for turn in range(15):
        mine = recent(store, person)
        if mine and dice.random() < 0.4:
            with suppress(Refused):  # another tab may have taken up or finished it
                reopen(store, person, dice.choice(mine).token)
        work = claim(store, person)
        if work is None:
            break
        ranks = [dice.randint(1, 3) for _ in range(3)]
        with suppress(Refused):
            save_draft(store, person, work.token, ranks, work.revision + 1)
        if work.is_edit and dice.random() < 0.3:
            leave(store, person, work.token)
            continue
        press = f"{tab}-{turn}"
        for _ in range(dice.choice([1, 1, 2])):
            if submit(store, person, work.token, ranks, submission=press).state != "already":
                stored.append((press, json.dumps(ranks)))
    return stored


def test_tabs_of_one_person_that_do_everything_at_once_lose_and_double_nothing(new_store):
    url, (ann,) = make(new_store, prompts=25, people=1)
    said = [*itertools.chain(*together(use_a_tab, [(url, ann, tab) for tab in range(5)]))]
    store = new_store()
    check_sound(store, 1)
    kept = look(store, sa.select(rankings.c.submission))
    assert sorted(press for press, _ in said) == sorted(row.submission for row in kept)


def change_to(url, person, token, ranks):
    return submit(Store(url), person, token, ranks).message


def test_of_two_changes_at_once_one_is_stored_and_the_other_is_told_that_it_was_not(new_store):
    url, (ann,) = make(new_store, prompts=1, people=1)
    store = new_store()
    work = claim(store, ann)
    submit(store, ann, work.token, [1, 2, 3])
    reopen(store, ann, work.token)
    store.close()
    changes = [(url, ann, work.token, ranks) for ranks in ([3, 2, 1], [2, 2, 1], [1, 1, 2])]
    said = together(change_to, changes)
    assert said.count("Changed.") == 1
    assert sum("not stored" in message for message in said) == 2
    check_sound(new_store(), 1)


# ---- leases, freezing ----------------------------------------------------------------------


def finish_or_take(url, person, begun, now):
    """Finish what one has begun, as long as it takes, and then what others have left."""
    store = Store(url)
    for token in begun:
        save_draft(store, person, token, [1, None, 2], 5, now)
        submit(store, person, token, [1, 2, 3], now)
    while (work := claim(store, person, now)) is not None:
        submit(store, person, work.token, [1, 2, 3], now)


def test_when_leases_end_while_their_owners_submit_no_place_is_filled_twice(new_store):
    url, ids = make(new_store, prompts=8, people=6)
    store = new_store()
    begun = {person: [claim(store, person, NOW).token] for person in ids[:4]}
    store.close()
    now = NOW + 31 * MINUTE
    together(finish_or_take, [(url, person, begun.get(person, []), now) for person in ids])
    store = new_store()
    check_sound(store, 1)
    assert progress(store, "rank") == (8, 8)
    # whoever came late is kept, too
    kept = Counter(row.late for row in look(store, sa.select(rankings.c.late)))
    late = look(store, sa.select(assignments.c.id).where(assignments.c.state == "late"))
    assert (kept[False], kept[True]) == (8, len(late))


def rank_and_freeze(url, person):
    """Rank until nothing is handed out; whoever has ranked eight first freezes the queue."""
    store, states = Store(url), []
    while (work := claim(store, person)) is not None:
        if len(states) == 8:
            with store.write() as tx:
                freeze = sa.update(queues).where(~queues.c.frozen).values(frozen=True)
                if tx.execute(freeze).rowcount:
                    log_event(tx, "frozen")
        states.append(submit(store, person, work.token, [1, 2, 3]).state)
    return states


def test_what_comes_before_a_freeze_counts_and_what_comes_after_is_late(new_store):
    url, ids = make(new_store, prompts=60, people=5)
    said = together(rank_and_freeze, [(url, person) for person in ids])
    store = new_store()
    check_sound(store, 1)
    log = look(store, sa.select(events.c.kind, events.c.detail).order_by(events.c.id))
    at = [row.kind for row in log].index("frozen")
    states = [
        [json.loads(row.detail)["state"] for row in part if row.kind == "submit"]
        for part in (log[:at], log[at:])
    ]
    assert set(states[0]) == {"ranked"}
    assert set(states[1]) == {"late"}
    assert Counter(itertools.chain(*said)) == Counter(itertools.chain(*states))
    assert "claim" not in {row.kind for row in log[at:]}


# ---- making and migrating a store ----------------------------------------------------------


def open_store(url):
    store = Store(url)
    return store.secret("pseudonyms"), store.secret("sessions")


def test_processes_that_make_one_store_at_once_make_one_store(new_store):
    found = together(open_store, [(new_store.url(),)] * 4)
    assert len(set(found)) == 1
    assert len(look(new_store(), sa.select(meta))) == 3


def test_processes_that_migrate_one_store_at_once_migrate_it_once(new_store, old_store):
    url = old_store(new_store)
    assert set(together(open_store, [(url,)] * 4)) == {(b"\0", b"\1")}
    store = new_store()
    kinds = [row.kind for row in look(store, sa.select(events.c.kind).order_by(events.c.id))]
    assert kinds == ["submit", "migrated"]
    assert claim(store, 1).token == "t2"
    if store.file is not None:
        (copy,) = store.file.parent.glob("*backup*")
        assert copy.name.endswith(".schema-1.backup")
