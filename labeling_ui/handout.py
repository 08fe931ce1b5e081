"""Which prompt a person gets next.

In this order: what they have begun; now and then a prompt whose answer is known (gold) or one of
their own from before (repeat), neither of which looks different; else the next of a queue, where
prompts that others have begun come first, then those of high priority. Leases that have ended are
noticed here, when somebody asks for work: there is no clock that has to run.
"""

from __future__ import annotations

import random
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from labeling_ui.schema import assignments, queues, tasks, users
from labeling_ui.store import insert_new
from pipeline.records import content_id

REPEAT_AFTER = 20
"""A task comes again when its person has finished so many others since."""
_RANDOM = random.SystemRandom()


def next_task(tx: Connection, user_id: int, now: float) -> tuple[str, int] | None:
    """(task id, lease minutes) of what this person works on, or None."""
    row = _begun(tx, user_id, now) or _from_queue(tx, user_id, now)
    if row is None:
        return None
    other = None
    if row.is_new:
        if _RANDOM.random() < row.gold_rate:
            other = _gold(tx, user_id)
        if other is None and _RANDOM.random() < row.repeat_rate:
            other = _repeat(tx, user_id)
    return other or row.id, row.lease_minutes


def open_tasks() -> sa.Select[Any]:
    """Tasks of the queues that hand out work now."""
    return (
        sa.select(tasks.c.id, queues.c.lease_minutes, queues.c.gold_rate, queues.c.repeat_rate)
        .join(queues, queues.c.step == tasks.c.step)
        .where(queues.c.open, ~queues.c.frozen, queues.c.by == "people", tasks.c.active)
        .where(tasks.c.kind.in_(("rank", "write")))
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


def mine(user_id: int) -> sa.Select[Any]:
    """This person's assignment of a task, whatever its state."""
    own = assignments.alias()
    return sa.select(own.c.id).where(own.c.task_id == tasks.c.id, own.c.user_id == user_id)


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


def _begun(tx: Connection, user_id: int, now: float) -> Row[Any] | None:
    """What was reopened, a live lease, or an ended one whose place is still free."""
    queue = sa.func.coalesce(queues.c.lease_minutes, 30).label("lease_minutes")
    query = (
        sa.select(
            tasks.c.id, queue, sa.false().label("is_new"),
            assignments.c.expires, assignments.c.reopened,
        )
        .select_from(assignments.join(tasks).outerjoin(queues, queues.c.step == tasks.c.step))
        .where(assignments.c.user_id == user_id, tasks.c.active)
        .where((assignments.c.state == "leased") | assignments.c.reopened.is_not(None))
        .where(queues.c.step.is_(None) | (queues.c.open & ~queues.c.frozen))
        .order_by(sa.func.coalesce(assignments.c.reopened, 0).desc(), assignments.c.expires.desc())
    )  # fmt: skip
    for row in tx.execute(query).all():
        if row.reopened is not None or row.expires > now or has_room(tx, row.id, now):
            return row
    return None


def _from_queue(tx: Connection, user_id: int, now: float) -> Row[Any] | None:
    """A prompt with overlap 2 is finished before the next one is begun."""
    query = (
        open_tasks()
        .add_columns(sa.true().label("is_new"))
        .where(tasks.c.filled < queues.c.overlap)
        .where(queues.c.overlap - tasks.c.filled > live_leases(now))
        .where(~mine(user_id).exists())
        .order_by(tasks.c.filled.desc(), tasks.c.priority.desc(), tasks.c.lot)
        .limit(1)
    )
    return tx.execute(query).first()


def _gold(tx: Connection, user_id: int) -> str | None:
    query = (
        sa.select(tasks.c.id)
        .where(tasks.c.kind == "gold", tasks.c.active, ~mine(user_id).exists())
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
