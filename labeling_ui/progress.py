"""How many rankings the line waits for, told to `prefline status` by a file; and how many prompts wait
for one person."""

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

from labeling_ui.counting import labels, queue_counts
from labeling_ui.database import Unavailable
from labeling_ui.handout import KINDS, mine, open_queues, open_tasks
from labeling_ui.schema import assignments, queues, tasks
from labeling_ui.store import Store

PROGRESS_FILE = "rank-progress.json"
_REST = 20


def progress(store: Store, step: str) -> tuple[int, int]:
    """(have, need): rankings of the step's tasks, and how many it takes to go on."""
    with store.read() as tx:
        found = queue_counts(tx, time.time(), step)
    # without a queue there are imported rankings alone
    return (found[0].rankings, found[0].needed) if found else (0, 0)


def write_progress(run_dir: Path, store: Store, step: str) -> tuple[int, int]:
    """(have, need), and the same in RUN/rank-progress.json for `prefline status`, whole or not at
    all."""
    have, need = progress(store, step)
    with store.read() as tx:
        counted = labels(tx, step)
    path = run_dir / PROGRESS_FILE
    steps = _told(run_dir)
    steps[step] = {"have": have, "need": need, "labels": counted}
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

    Counting takes longer the more rankings there are, and many may be saved in a second: it may take a
    twentieth of the time.
    """

    def __init__(self, run_dir: Path, store: Store, seconds: float = 1.0) -> None:
        self._run_dir, self._store = run_dir, store
        self._seconds = seconds
        self._took = 0.0
        self._lock = threading.Lock()
        self._waiting: threading.Timer | None = None

    def soon(self) -> None:
        with self._lock:
            if self._waiting is None:
                wait = max(self._seconds, _REST * self._took)
                self._waiting = threading.Timer(wait, self._now)
                self._waiting.daemon = True
                self._waiting.start()

    def _now(self) -> None:
        with self._lock:
            self._waiting = None
        began = time.monotonic()
        try:
            tell_progress(self._run_dir, self._store)
        except (OSError, Unavailable) as error:
            # the ranking is stored; what is told is told again with the next one
            print(f"warning: progress could not be written ({error})", file=sys.stderr)  # noqa: T201
        self._took = time.monotonic() - began


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
