"""What a lead decides: who may, what is changed, and the line in the log that says so."""

import json

import pytest
import sqlalchemy as sa

from labeling_ui.administration import (
    MAX_GUIDELINES,
    change_queue,
    freeze_queue,
    guidelines_text,
    pause_annotator,
    queue_values,
    release_lease,
    resume_annotator,
    set_guidelines,
)
from labeling_ui.assignments import claim, guidelines_version
from labeling_ui.exporting import snapshot
from labeling_ui.forms import Refused
from labeling_ui.gold import import_gold, make_gold, retire_gold
from labeling_ui.handout import next_task
from labeling_ui.progress import progress
from labeling_ui.schema import assignments, events, guidelines, queues, tasks, users
from labeling_ui.store import Store, insert_new, log_event
from labeling_ui.submitting import submit
from tests.label_work import add_people, queue_prompts

NOW = 1_000_000.0


@pytest.fixture
def place(tmp_path):
    """A store with 3 prompts, a lead and two annotators: (store, lead, ann, bob)."""
    store = Store(tmp_path / "labels.db")
    queue_prompts(store)
    return (store, *add_people(store, "lea", "ann", "bob", leads=["lea"]))


def queue_of(store):
    with store.read() as tx:
        return tx.execute(sa.select(queues).where(queues.c.step == "rank")).one()


def logged(store, kind):
    """(who, task, detail) of the events of a kind."""
    with store.read() as tx:
        query = sa.select(events).where(events.c.kind == kind).order_by(events.c.id)
        return [(row.user_id, row.task_id, json.loads(row.detail)) for row in tx.execute(query)]


def count_events(store):
    with store.read() as tx:
        return tx.execute(sa.select(sa.func.count()).select_from(events)).scalar_one()


def first_task(store):
    with store.read() as tx:
        return tx.execute(sa.select(tasks).order_by(tasks.c.id)).first()


def actions(store):
    """Everything that a lead may do, as calls of a user id."""
    task = first_task(store).id
    row = '{"prompt": "p", "responses": [{"text": "x", "rank": 1}, {"text": "y", "rank": 2}]}'
    return [
        lambda user: set_guidelines(store, user, "be fair"),
        lambda user: change_queue(store, user, "rank", {"overlap": 2}),
        lambda user: freeze_queue(store, user, "rank", True),
        lambda user: pause_annotator(store, user, 3),
        lambda user: resume_annotator(store, user, 3),
        lambda user: release_lease(store, user, "x"),
        lambda user: make_gold(store, user, task, [1, 2, 3]),
        lambda user: import_gold(store, user, row),
        lambda user: retire_gold(store, user, task),
    ]


@pytest.mark.parametrize("number", range(9))
def test_only_an_active_lead_may_do_anything(place, number):
    store, lead, ann, _ = place
    act = actions(store)[number]
    before = count_events(store)
    for nobody in (ann, 99):
        with pytest.raises(Refused, match="Only a lead"):
            act(nobody)
    with store.write() as tx:
        tx.execute(sa.update(users).where(users.c.id == lead).values(active=False))
    with pytest.raises(Refused, match="Only a lead"):
        act(lead)
    # a simulated or imported annotator is nobody who acts
    with store.write() as tx:
        change = sa.update(users).where(users.c.id == lead)
        tx.execute(change.values(active=True, kind="imported"))
    with pytest.raises(Refused, match="Only a lead"):
        act(lead)
    assert count_events(store) == before
    assert queue_of(store).overlap == 1


# ---- guidelines ----------------------------------------------------------------------------


def test_guidelines_are_versions_and_the_same_text_is_none(place):
    store, lead, *_ = place
    with store.read() as tx:
        assert (guidelines_text(tx), guidelines_version(tx)) == ("", None)
    assert set_guidelines(store, lead, "be fair\r\n") == 1
    assert set_guidelines(store, lead, " be fair") == 1
    assert set_guidelines(store, lead, "be kind\0") == 2
    with store.read() as tx:
        assert (guidelines_text(tx), guidelines_version(tx)) == ("be kind", 2)
        rows = tx.execute(sa.select(guidelines).order_by(guidelines.c.version)).all()
    assert [(row.version, row.text, row.user_id) for row in rows] == [
        (1, "be fair", lead), (2, "be kind", lead),
    ]  # fmt: skip
    assert [detail["version"] for _, _, detail in logged(store, "guidelines")] == [
        [None, 1],
        [1, 2],
    ]


def test_a_ranking_remembers_the_guidelines_in_force(place):
    store, lead, ann, _ = place
    set_guidelines(store, lead, "first")
    set_guidelines(store, lead, "second")
    work = claim(store, ann, NOW)
    submit(store, ann, work.token, [1, 2, 3], NOW)
    with store.read() as tx:
        assert tx.execute(sa.text("SELECT guidelines FROM rankings")).scalar_one() == 2


@pytest.mark.parametrize("text", ["", "  \n", None, 3, ["x"], "x" * (MAX_GUIDELINES + 1)])
def test_guidelines_must_be_a_text_of_a_sane_length(place, text):
    store, lead, *_ = place
    with pytest.raises(Refused):
        set_guidelines(store, lead, text)


# ---- queues --------------------------------------------------------------------------------


def test_a_change_of_a_queue_is_logged_as_old_and_new(place):
    store, lead, *_ = place
    wanted = {"overlap": 2.0, "minimum": None, "gold_rate": 0.1, "repeat_rate": 0}
    assert change_queue(store, lead, "rank", wanted) == ["overlap", "gold_rate"]
    assert (queue_of(store).overlap, queue_of(store).gold_rate) == (2, 0.1)
    ((who, _, detail),) = logged(store, "queue settings")
    changes = {"overlap": [1, 2], "gold_rate": [0.0, 0.1]}
    assert (who, detail) == (lead, {"step": "rank", "changes": changes})
    assert change_queue(store, lead, "rank", wanted) == []
    assert len(logged(store, "queue settings")) == 1
    # the line waits for the new number
    assert progress(store, "rank") == (0, 6)
    change_queue(store, lead, "rank", {"minimum": 4})
    assert progress(store, "rank") == (0, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("overlap", 0), ("overlap", 21), ("overlap", 1.5), ("overlap", None), ("overlap", True),
        ("overlap", "2"), ("minimum", 0), ("minimum", float("nan")), ("minimum", float("inf")),
        ("lease_minutes", 0), ("lease_minutes", 10**6), ("gold_rate", -0.1), ("gold_rate", 0.6),
        ("gold_rate", float("nan")), ("gold_rate", None), ("gold_rate", True),
        ("repeat_rate", "0.1"), ("open", False), ("step", "x"), ("frozen", True),
    ],
)  # fmt: skip
def test_a_queue_takes_no_value_that_makes_no_sense(place, name, value):
    store, lead, *_ = place
    before = queue_of(store)
    with pytest.raises(Refused):
        change_queue(store, lead, "rank", {"overlap": 3, name: value})
    assert queue_of(store) == before


def test_a_closed_or_unknown_queue_is_left_alone(place):
    store, lead, *_ = place
    with pytest.raises(Refused, match="no such queue"):
        change_queue(store, lead, "rank-9", {"overlap": 2})
    with store.write() as tx:
        tx.execute(sa.update(queues).values(open=False))
    for act in (
        lambda: change_queue(store, lead, "rank", {"overlap": 2}),
        lambda: freeze_queue(store, lead, "rank", True),
    ):
        with pytest.raises(Refused, match="closed"):
            act()


def test_a_frozen_queue_hands_nothing_out_until_it_is_unfrozen(place):
    store, lead, ann, _ = place
    assert freeze_queue(store, lead, "rank", True)
    assert not freeze_queue(store, lead, "rank", True)
    assert claim(store, ann, NOW) is None
    assert freeze_queue(store, lead, "rank", False)
    assert claim(store, ann, NOW) is not None
    assert [who for who, *_ in logged(store, "queue frozen")] == [lead]
    assert len(logged(store, "queue unfrozen")) == 1


def test_a_resume_brings_only_what_the_config_has_changed(place):
    store, lead, *_ = place
    config = {"by": "people", "overlap": 1, "minimum": None}
    with store.write() as tx:
        assert queue_values(tx, "rank", config) == config
        log_event(tx, "queue", None, None, step="rank", config=config)
        log_event(tx, "queue", None, None, step="rank-2", config={**config, "overlap": 7})
    change_queue(store, lead, "rank", {"overlap": 3})
    with store.read() as tx:
        # the config says what it said before: the lead's 3 stays
        assert queue_values(tx, "rank", config) == {}
        assert queue_values(tx, "rank", {**config, "overlap": 2}) == {"overlap": 2}
        assert queue_values(tx, "rank", {**config, "lease_minutes": 5}) == {"lease_minutes": 5}


# ---- people and leases ---------------------------------------------------------------------


def test_a_paused_annotator_is_logged_out_and_their_prompt_goes_to_another(place):
    store, lead, ann, bob = place
    work = [claim(store, ann, NOW)]
    with store.write() as tx:
        # a lease that runs now: pausing looks at the clock
        tx.execute(sa.update(assignments).values(expires=10**12))
        tx.execute(sa.delete(tasks).where(tasks.c.id != work[0].task_id))
    assert claim(store, bob, NOW) is None
    pause_annotator(store, lead, ann)
    with store.read() as tx:
        row = tx.execute(sa.select(users).where(users.c.id == ann)).one()
    assert (row.active, row.session) == (False, 1)
    assert claim(store, bob).task_id == work[0].task_id
    with pytest.raises(Refused, match="not active"):
        claim(store, ann)
    resume_annotator(store, lead, ann)
    assert claim(store, ann) is None
    assert logged(store, "user paused") == [(lead, None, {"user": ann, "leases": 1})]
    assert logged(store, "user resumed") == [(lead, None, {"user": ann})]


def test_nobody_pauses_themselves_or_an_imported_voice(place):
    store, lead, *_ = place
    with pytest.raises(Refused, match="yourself"):
        pause_annotator(store, lead, lead)
    with store.write() as tx:
        insert_new(tx, users, [{"kind": "imported", "name": "x", "created": NOW}])
        imported = tx.execute(sa.select(users.c.id).where(users.c.name == "x")).scalar_one()
    for person in (imported, 99):
        with pytest.raises(Refused, match="Only people"):
            pause_annotator(store, lead, person)


def test_a_released_lease_is_handed_to_the_next_and_its_draft_is_kept(place):
    store, lead, ann, bob = place
    work = claim(store, ann, NOW)
    with store.write() as tx:
        tx.execute(sa.delete(tasks).where(tasks.c.id != work.task_id))
        lease = tx.execute(sa.select(assignments)).one()
        tx.execute(sa.update(assignments).values(draft="[1,null,null]"))
    assert claim(store, bob, NOW + 1) is None
    assert release_lease(store, lead, lease.id, NOW + 2)
    assert not release_lease(store, lead, lease.id, NOW + 3)
    # its owner was away, and comes back first
    assert claim(store, ann, NOW + 3).form.ranks == (1, None, None)
    assert release_lease(store, lead, lease.id, NOW + 4)
    assert claim(store, bob, NOW + 5).task_id == work.task_id
    assert logged(store, "lease released")[0] == (lead, work.task_id, {"user": ann})
    with pytest.raises(Refused, match="no such lease"):
        release_lease(store, lead, "x", NOW)


# ---- known answers -------------------------------------------------------------------------


def gold_rows(store):
    with store.read() as tx:
        return tx.execute(sa.select(tasks).where(tasks.c.kind == "gold")).all()


def test_a_task_becomes_a_known_answer_beside_itself(place):
    store, lead, ann, _ = place
    task = first_task(store)
    made = make_gold(store, lead, task.id, [3, 1, 3])
    (row,) = gold_rows(store)
    assert (row.id, row.step, row.active, json.loads(row.gold)) == (made, None, True, [2, 1, 2])
    assert (row.messages, row.responses, row.repeat_of) == (task.messages, task.responses, task.id)
    assert first_task(store) is not None
    assert progress(store, "rank") == (0, 3)
    assert logged(store, "gold") == [(lead, made, {"ranks": [None, [2, 1, 2]]})]
    # the same again is nothing, other ranks correct it
    assert make_gold(store, lead, task.id, [2, 1, 2]) == made
    make_gold(store, lead, task.id, [1, 2, 3])
    assert [json.loads(row.gold) for row in gold_rows(store)] == [[1, 2, 3]]
    assert logged(store, "gold")[-1][2] == {"ranks": [[2, 1, 2], [1, 2, 3]]}
    # it is handed out and never exported
    change_queue(store, lead, "rank", {"gold_rate": 0.5})
    found = set()
    with store.read() as tx:
        for _ in range(64):
            found.add(next_task(tx, ann, NOW)[0] == made)
    assert found == {True, False}
    assert snapshot(store, 0.0) == []


@pytest.mark.parametrize(
    "ranks", [[1, 1, 1], [1, 2], [1, 2, 3, 3], [0, 1, 2], [1, 2, 4], [1, 2, "3"]]
)
def test_a_known_answer_needs_an_order(place, ranks):
    store, lead, *_ = place
    with pytest.raises(Refused):
        make_gold(store, lead, first_task(store).id, ranks)
    assert gold_rows(store) == []


def test_a_known_answer_or_a_repeat_is_no_source_of_another(place):
    store, lead, *_ = place
    made = make_gold(store, lead, first_task(store).id, [1, 2, 3])
    with pytest.raises(Refused, match="Choose a prompt"):
        make_gold(store, lead, made, [1, 2, 3])


def test_known_answers_are_read_from_lines_and_the_others_are_told(place):
    store, lead, *_ = place
    lines = [
        {"prompt": "p", "responses": [{"text": "good", "rank": 1}, {"text": "bad", "rank": 2}]},
        {"messages": [{"role": "user", "content": "q"}], "responses": ["x", "y", "z"], "ranks": [3, 1, 1]},
        {"prompt": "p", "responses": [{"text": "a", "rank": 1}, {"text": "b", "rank": 1}]},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "responses": [{"text": str(i), "rank": i} for i in range(1, 11)]},
    ]  # fmt: skip
    text = "\n".join(map(json.dumps, lines)) + "\n\n{broken\n[1]"
    report = import_gold(store, lead, text)
    assert (report.stored, report.unchanged) == (3, 0)
    assert [line.split(":")[0] for line in report.refused] == [
        f"line {number}" for number in (3, 5, 7, 8)
    ]
    assert "all responses are tied" in report.refused[0]
    assert "more than 9" in report.refused[1]
    by_text = {
        tuple(sorted(zip(json.loads(row.responses), json.loads(row.gold), strict=True)))
        for row in gold_rows(store)
    }
    assert by_text == {
        (("bad", 2), ("good", 1)), (("x", 2), ("y", 1), ("z", 1)), (("a", 1), ("b", 2)),
    }  # fmt: skip
    again = import_gold(store, lead, text)
    assert (again.stored, again.unchanged) == (0, 3)
    assert len(logged(store, "gold")) == 3
    with pytest.raises(Refused, match="no row"):
        import_gold(store, lead, " \n ")


def test_a_retired_known_answer_is_handed_out_no_more(place):
    store, lead, ann, _ = place
    made = make_gold(store, lead, first_task(store).id, [1, 2, 3])
    change_queue(store, lead, "rank", {"gold_rate": 0.5})
    assert retire_gold(store, lead, made)
    assert not retire_gold(store, lead, made)
    with store.read() as tx:
        assert all(next_task(tx, ann, NOW)[0] != made for _ in range(64))
    assert retire_gold(store, lead, made, active=True)
    assert [len(logged(store, kind)) for kind in ("gold retired", "gold used again")] == [1, 1]
    with pytest.raises(Refused, match="no known answer"):
        retire_gold(store, lead, first_task(store).id if made != first_task(store).id else "x")
