"""What keeps a large store fast: plans that stay on an index, and a bounded look at begun tasks."""

import pytest
import sqlalchemy as sa

from labeling_ui import handout
from labeling_ui.assignments import claim
from labeling_ui.changes import recent
from labeling_ui.progress import my_progress
from labeling_ui.schema import tasks
from labeling_ui.store import Store
from labeling_ui.submitting import submit
from tests.label_work import store_with_work

NOW = 1_000_000.0


def make(tmp_path, prompts, overlap=2):
    store = Store(tmp_path / "labels.db")
    return store_with_work(store, 2, prompts, ["a", "b"], overlap=overlap)


def rank_next(store, user):
    work = claim(store, user, NOW)
    if work is not None:
        submit(store, user, work.token, [1, 2], NOW)
    return work and work.task_id


def test_who_has_begun_much_is_given_new_prompts_and_then_those_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(handout, "_PASSED", 2)
    store, (ann, bob) = make(tmp_path, 8)
    mine = [rank_next(store, ann) for _ in range(4)]
    with store.read() as tx:
        places = dict(tx.execute(sa.select(tasks.c.id, tasks.c.lot)).all())
    # bob begins one that stands behind all that ann has begun
    with store.write() as tx:
        tx.execute(sa.update(tasks).where(tasks.c.filled == 0).values(lot=tasks.c.lot + 2**30))
        last = max((task for task in places if task not in mine), key=places.get)
        work = handout_to(tx, bob, last)
    submit(store, bob, work.token, [1, 2], NOW)
    rest = [rank_next(store, ann) for _ in range(4)]
    assert set(mine) | set(rest) == set(places)
    # two were looked at and are ann's own, so what nobody had begun came first
    assert rest[-1] == last
    assert claim(store, ann, NOW) is None
    assert my_progress(store, ann, NOW) == (8, 0, False)
    # and bob, who can finish them, is given begun ones only
    assert {rank_next(store, bob) for _ in range(7)} == set(places) - {last}


def handout_to(tx, user, task):
    from labeling_ui.assignments import claim_task

    return claim_task(tx, user, task, 30, NOW)


@pytest.mark.parametrize("act", ["claim", "recent", "my_progress"])
def test_no_plan_scans_or_sorts_the_tasks(tmp_path, act):
    store, (ann, bob) = make(tmp_path, 4)
    rank_next(store, bob)
    seen = []
    record = lambda _c, _cu, statement, given, *_: seen.append((statement, tuple(given)))  # noqa: E731
    sa.event.listen(store.engine, "before_cursor_execute", record)
    {"claim": lambda: claim(store, ann, NOW), "recent": lambda: recent(store, ann),
     "my_progress": lambda: my_progress(store, ann, NOW)}[act]()  # fmt: skip
    sa.event.remove(store.engine, "before_cursor_execute", record)
    plans = []
    with store.read() as tx:
        for statement, given in seen:
            if statement.startswith("SELECT"):
                rows = tx.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", given)
                plans += [(row[3], statement) for row in rows]
    assert plans
    for step, statement in plans:
        assert not step.startswith(("SCAN tasks", "SCAN assignments", "SCAN rankings")), statement
        if "ix_tasks_queue" in step and "LIMIT" in statement:
            assert not any(
                "TEMP B-TREE" in other and "anon_1" not in statement
                for other, of in plans
                if of == statement
            ), statement
