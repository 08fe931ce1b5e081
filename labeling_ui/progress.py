"""How many rankings the line waits for, and how many prompts a person: counted in the store.

`prefline status` is told by a file.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from labeling_ui.database import Unavailable
from labeling_ui.handout import KINDS, mine, open_queues, open_tasks
from labeling_ui.schema import assignments, queues, rankings, tasks, users
from labeling_ui.store import EXTRA, Store

PROGRESS_FILE = "rank-progress.json"


def progress(store: Store, step: str) -> tuple[int, int]:
    """(have, need): rankings by people of the step's tasks, and how many it takes to go on."""
    with store.read() as tx:
        queue = tx.execute(sa.select(queues).where(queues.c.step == step)).first()
        if queue is None:
            # imported rankings alone
            return 0, 0
        active = (tasks.c.step == step) & tasks.c.active
        count, filled = tx.execute(
            sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(tasks.c.filled), 0)).where(
                active
            )
        ).one()
        unrankable = tx.execute(
            sa.select(sa.func.count())
            .select_from(assignments.join(tasks).join(users))
            .where(active, users.c.kind == "person", assignments.c.state == "unrankable")
        ).scalar_one()
    have = filled - unrankable
    possible = queue.overlap * count - unrankable
    # a minimum that the prompts cannot give would keep the line waiting for ever
    return have, possible if queue.minimum is None else min(queue.minimum, possible)


def labels(store: Store, step: str) -> dict[str, int]:
    """How many rankings an export of this step would hold by people or by hand, and how many rows
    they have had: with a change of mind there are more of these. Written down with every export, so
    that labels which came afterwards are noticed.
    """
    counted = (rankings.c.status == "ranked") & ~rankings.c.late & (tasks.c.kind == "rank")
    by_person = (users.c.kind == "person") & tasks.c.active
    here = by_person & (tasks.c.step == step)
    elsewhere = rankings.c.by_hand | (by_person & (tasks.c.step == EXTRA))
    query = (
        sa.select(
            sa.func.count().filter(rankings.c.superseded_by.is_(None)).label("rankings"),
            sa.func.count().label("rows"),
        )
        .select_from(
            rankings.join(tasks, tasks.c.id == rankings.c.task_id).join(
                users, users.c.id == rankings.c.user_id
            )
        )
        .where(counted)
    )
    with store.read() as tx:
        by_people = tx.execute(sa.select(queues.c.by).where(queues.c.step == step)).scalar()
        counts = elsewhere | here if by_people == "people" else elsewhere
        row = tx.execute(query.where(counts)).one()
    return {"rankings": int(row.rankings), "rows": int(row.rows)}


def write_progress(run_dir: Path, store: Store, step: str) -> tuple[int, int]:
    """(have, need), and the same in RUN/rank-progress.json for `prefline status`, whole or not at
    all."""
    have, need = progress(store, step)
    path = run_dir / PROGRESS_FILE
    steps = _told(run_dir)
    steps[step] = {"have": have, "need": need, "labels": labels(store, step)}
    # a name of its own: the app and the rank step may both be at it
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(steps), encoding="utf-8")
    os.replace(temporary, path)
    return have, need


def _told(run_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run_dir / PROGRESS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def tell_progress(run_dir: Path, store: Store) -> None:
    """`write_progress` of every rank step that was begun."""
    for step in _told(run_dir):
        write_progress(run_dir, store, step)


class Teller:
    """Tells the progress soon after something was saved, but not more often than people look.

    Counting takes longer the more rankings there are, and many may be saved in a second.
    """

    def __init__(self, run_dir: Path, store: Store, seconds: float = 1.0) -> None:
        self._run_dir, self._store = run_dir, store
        self._seconds = seconds
        self._lock = threading.Lock()
        self._waiting: threading.Timer | None = None

    def soon(self) -> None:
        with self._lock:
            if self._waiting is None:
                self._waiting = threading.Timer(self._seconds, self._now)
                self._waiting.daemon = True
                self._waiting.start()

    def _now(self) -> None:
        with self._lock:
            self._waiting = None
        try:
            tell_progress(self._run_dir, self._store)
        except (OSError, Unavailable) as error:
            # the ranking is stored; what is told is told again with the next one
            print(f"warning: progress could not be written ({error})", file=sys.stderr)  # noqa: T201


def my_progress(store: Store, user_id: int, now: float | None = None) -> tuple[int, int, bool]:
    """(done, left, busy) for one person: prompts they finished and prompts they may still get.

    busy: nothing may be left for them now, but leases of others may end without a ranking.
    """
    now = time.time() if now is None else now
    unfinished = open_tasks().where(tasks.c.filled < queues.c.overlap)
    # the queue may be long and the leases are few: counted from the leases
    taken = (
        unfinished.join(assignments, assignments.c.task_id == tasks.c.id)
        .where(assignments.c.state == "leased", assignments.c.expires > now)
        .where(~mine(user_id).exists())
        .group_by(tasks.c.id, queues.c.overlap, tasks.c.filled)
        .having(sa.func.count() >= queues.c.overlap - tasks.c.filled)
        .with_only_columns(tasks.c.id)
    )
    # what this person skipped, or ranked too late, still waits for others
    passed_by_me = unfinished.join(assignments, assignments.c.task_id == tasks.c.id).where(
        assignments.c.user_id == user_id, assignments.c.state.in_(("skipped", "late"))
    )

    def count(query: sa.Select[Any]) -> int:
        rows = query.with_only_columns(tasks.c.id).subquery()
        return int(tx.execute(sa.select(sa.func.count()).select_from(rows)).scalar_one())

    with store.read() as tx:
        done = tx.execute(
            sa.select(sa.func.count())
            .select_from(assignments)
            .where(assignments.c.user_id == user_id, assignments.c.state.in_(("ranked", "late")))
        ).scalar_one()
        open_to_me = _waiting(tx, user_id) - count(passed_by_me)
        left = open_to_me - count(taken)
    return int(done), left, open_to_me > 0


def _waiting(tx: Connection, user_id: int) -> int:
    """Unfinished tasks of the queues, less those of which this person has filled a place.

    Queue by queue, so that an index finds them: a person may have done very much, and so may all.
    """
    found = 0
    for queue in open_queues(tx):
        waiting = (
            sa.select(sa.func.count())
            .where(tasks.c.step == queue.step, tasks.c.kind.in_(KINDS), tasks.c.active)
            .where(tasks.c.filled < queue.overlap)
        )
        done = waiting.where(tasks.c.filled > 0, mine(user_id, "ranked", "unrankable").exists())
        found += tx.execute(waiting).scalar_one() - tx.execute(done).scalar_one()
    return found
