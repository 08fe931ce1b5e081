"""A label store with work in it, as most of its tests begin."""

import sqlalchemy as sa

from labeling_ui.schema import queues, tasks, users
from labeling_ui.store import insert_new, task_row

QUEUE = {"step": "rank", "by": "people", "overlap": 1, "lease_minutes": 30, "open": True}


def queue_prompts(store, prompts=3, responses=("a", "b", "c"), kind="rank", **queue):
    """Put `prompt 0`, `prompt 1`, ... or the given ones into the queue `rank`, each with these
    responses."""
    asked = [f"prompt {i}" for i in range(prompts)] if isinstance(prompts, int) else prompts
    rows = [
        task_row(
            [{"role": "user", "content": text}], responses,
            round=1, origin="t", step="rank", kind=kind,
        )
        for text in asked
    ]  # fmt: skip
    with store.write() as tx:
        insert_new(tx, queues, [{**QUEUE, **queue}])
        insert_new(tx, tasks, rows)


def add_people(store, *names, leads=()):
    """The ids of new accounts without a password, in the order given."""
    created = 1_000_000.0
    rows = [
        {"kind": "person", "name": name, "created": created,
         "role": "lead" if name in leads else "annotator"}
        for name in names
    ]  # fmt: skip
    with store.write() as tx:
        insert_new(tx, users, rows)
        ids = dict(tx.execute(sa.select(users.c.name, users.c.id)).all())
    return [ids[name] for name in names]


def store_with_work(store, people, prompts=3, responses=("a", "b", "c"), kind="rank", **queue):
    """The store with prompts, and the ids of `ann0`, `ann1`, ..."""
    queue_prompts(store, prompts, responses, kind, **queue)
    return store, add_people(store, *(f"ann{i}" for i in range(people)))
