"""Which prompt a person gets next.

In this order: what they have begun; now and then a prompt whose answer is known (gold) or one of
their own from before (repeat), neither of which looks different; else the next of a queue, where
prompts that others have begun come first, then those of high priority. Leases that have ended are
noticed here, when somebody asks for work: there is no clock that has to run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from labeling_ui.schema import assignments, queues, tasks, users
from labeling_ui.store import insert_new
from pipeline.records import content_id

REPEAT_AFTER = 20
"""A task comes again when its person has finished so many others since."""
KINDS = ("rank", "write", "judge")
"""Of the tasks that wait in queues."""
_PASSED = 200
"""So many begun tasks are looked at for one that is new to a person."""
_RANDOM = random.SystemRandom()


@dataclass(frozen=True)
class Work:
    """A task for a person, and the rates of its queue."""

    task: str
    lease_minutes: int
    gold_rate: float = 0.0
    repeat_rate: float = 0.0
    is_new: bool = False


def next_task(tx: Connection, user_id: int, now: float) -> tuple[str, int] | None:
    """(task id, lease minutes) of what this person works on, or None."""
    work = _begun(tx, user_id, now) or _from_queue(tx, user_id, now)
    if work is None:
        return None
    other = None
    if work.is_new:
        if _RANDOM.random() < work.gold_rate:
            other = _gold(tx, user_id)
        if other is None and _RANDOM.random() < work.repeat_rate:
            other = _repeat(tx, user_id)
    return other or work.task, work.lease_minutes


def open_queues(tx: Connection) -> Sequence[Row[Any]]:
    """The queues that hand out work now; few, however many tasks they hold."""
    query = sa.select(queues).where(queues.c.open, ~queues.c.frozen, queues.c.by == "people")
    return tx.execute(query.order_by(queues.c.step)).all()


def open_tasks() -> sa.Select[Any]:
    """Tasks of the queues that hand out work now."""
    return (
        sa.select(tasks.c.id)
        .join(queues, queues.c.step == tasks.c.step)
        .where(queues.c.open, ~queues.c.frozen, queues.c.by == "people", tasks.c.active)
        .where(tasks.c.kind.in_(KINDS))
    )


def live_leases(now: float) -> Any:
    """How many people work on a task."""
    return (
        sa.select(sa.func.count())
        .select_from(assignments)
        .where(assignments.c.task_id == tasks.c.id)
        .where(assignments.c.state == "leased", assignments.c.expires > now)
        .scalar_subquery()
    )


def mine(user_id: int, *states: str) -> sa.Select[Any]:
    """This person's assignment of a task, in one of `states` or whatever its state."""
    own = assignments.alias()
    query = sa.select(own.c.id).where(own.c.task_id == tasks.c.id, own.c.user_id == user_id)
    return query.where(own.c.state.in_(states)) if states else query


def has_room(tx: Connection, task: str, now: float) -> bool:
    """Whether a task may still be handed out; one of no queue always may."""
    query = (
        sa.select(queues.c.overlap - tasks.c.filled - live_leases(now))
        .select_from(tasks.join(queues, queues.c.step == tasks.c.step))
        .where(tasks.c.id == task)
    )
    room = tx.execute(query).scalar_one_or_none()
    return room is None or room > 0


def is_frozen(tx: Connection, task: str) -> bool:
    query = (
        sa.select(queues.c.frozen)
        .select_from(tasks.join(queues, queues.c.step == tasks.c.step))
        .where(tasks.c.id == task)
    )
    return bool(tx.execute(query).scalar_one_or_none())


def _begun(tx: Connection, user_id: int, now: float) -> Work | None:
    """What was reopened, a live lease, or an ended one whose place is still free."""
    own = assignments.c.user_id == user_id
    query = (
        sa.select(tasks.c.id, queues.c.lease_minutes, assignments.c.expires, assignments.c.reopened)
        .select_from(assignments.join(tasks).outerjoin(queues, queues.c.step == tasks.c.step))
        # each side has an index: a person may have done very much
        .where((own & (assignments.c.state == "leased")) | (own & (assignments.c.reopened > 0)))
        .where(tasks.c.active)
        .where(queues.c.step.is_(None) | (queues.c.open & ~queues.c.frozen))
        .order_by(sa.func.coalesce(assignments.c.reopened, 0).desc(), assignments.c.expires.desc())
    )
    for row in tx.execute(query).all():
        if row.reopened is not None or row.expires > now or has_room(tx, row.id, now):
            return Work(row.id, row.lease_minutes or 30)
    return None


def _from_queue(tx: Connection, user_id: int, now: float) -> Work | None:
    """The first task that has room and is new to this person: begun ones before the others.

    Queue by queue, so that the index gives the order and the search ends at the first one that
    fits. A person who has done most of what was begun would have to pass all of that each time:
    they look at _PASSED of them, and take one that nobody has begun instead. Only where there is
    none are all looked at.
    """
    waiting = open_queues(tx)
    for begun, limit in ((True, _PASSED), (False, None), (True, None)):
        found = [
            (-row.filled, -row.priority, row.lot, row.id, queue)
            for queue in waiting
            for kind in KINDS
            if (row := _first_of(tx, queue, kind, user_id, now, begun, limit)) is not None
        ]
        if found:
            *_, task, queue = min(found, key=lambda row: row[:4])
            return Work(task, queue.lease_minutes, queue.gold_rate, queue.repeat_rate, is_new=True)
    return None


def _first_of(
    tx: Connection, queue: Row[Any], kind: str, user_id: int, now: float,
    begun: bool, limit: int | None,
) -> Any:  # fmt: skip
    columns = (tasks.c.id, tasks.c.filled, tasks.c.priority, tasks.c.lot)
    filled = tasks.c.filled
    room = queue.overlap - tasks.c.filled > live_leases(now)
    query = (
        sa.select(*columns)
        .where(tasks.c.step == queue.step, tasks.c.kind == kind, tasks.c.active)
        # nothing beside `= 0`, or the index does not give the order
        .where(*(filled > 0, filled < queue.overlap) if begun else (filled == 0,))
        .order_by(tasks.c.filled.desc(), tasks.c.priority.desc(), tasks.c.lot)
    )
    if limit is None:
        return tx.execute(query.where(room, ~mine(user_id).exists()).limit(1)).first()
    fits = (room & ~mine(user_id).exists()).label("fits")
    passed = query.add_columns(fits).limit(limit).subquery()
    found = sa.select(passed).where(passed.c.fits)
    order = (passed.c.filled.desc(), passed.c.priority.desc(), passed.c.lot)
    return tx.execute(found.order_by(*order).limit(1)).first()


def _gold(tx: Connection, user_id: int) -> str | None:
    """A known answer that this person has not seen, nor the prompt that it was made from."""
    seen = sa.select(assignments.c.task_id).where(assignments.c.user_id == user_id)
    query = (
        sa.select(tasks.c.id)
        .where(tasks.c.step.is_(None), tasks.c.kind == "gold", tasks.c.active)
        .where(tasks.c.id.not_in(seen))
        .where(tasks.c.repeat_of.is_(None) | tasks.c.repeat_of.not_in(seen))
        .order_by(sa.func.random())
        .limit(1)
    )
    return tx.execute(query).scalar()


def _repeat(tx: Connection, user_id: int) -> str | None:
    """A task of this person's own, made anew for them alone; each is repeated once at most."""
    done = (
        sa.select(assignments.c.task_id)
        .join(tasks)
        .where(assignments.c.user_id == user_id, assignments.c.state == "ranked")
        .where(tasks.c.kind == "rank")
        .order_by(assignments.c.leased.desc())
        .offset(REPEAT_AFTER)
        .limit(50)
    )
    again = tasks.alias()
    query = (
        sa.select(tasks)
        .where(tasks.c.id.in_(done))
        .where(~sa.exists().where(again.c.repeat_of == tasks.c.id, again.c.for_user == user_id))
    )
    old = tx.execute(query).mappings().all()
    if not old:
        return None
    chosen = dict(_RANDOM.choice(old))
    repeat = content_id("repeat", chosen["id"], user_id)
    row = {**chosen, "id": repeat, "kind": "repeat", "step": None, "filled": 0}
    insert_new(tx, tasks, [{**row, "repeat_of": chosen["id"], "for_user": user_id}])
    return repeat


def active_user(tx: Connection, user_id: int) -> Row[Any] | None:
    """The account, unless it is closed."""
    row = tx.execute(sa.select(users).where(users.c.id == user_id)).first()
    return row if row is not None and row.active else None
