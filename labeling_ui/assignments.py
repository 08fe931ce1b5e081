"""Handing out prompts and taking rankings back, each in one transaction.

A prompt is in the queue while fewer than `overlap` places are filled. A place is filled by a
ranking, by a person who says that nobody can rank it, or by a live lease. Nobody gets a prompt
twice. Leases end lazily, when somebody asks for work; a draft and its order are kept for the
person who comes back. What a person sees is only ever a shuffled order: the way from a shown place
back to a response is here and nowhere else.
"""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from labeling_ui.store import Store, assignments, log_event, queues, rankings, tasks, users
from pipeline.errors import EXIT_BAD_INPUT, ToolkitError
from pipeline.records import Message, canonical_json, content_id

SKIP_REASONS = {
    "cannot_judge": "I cannot judge this one (topic or language)",
    "unclear": "The prompt makes no sense",
    "harmful": "The text is harmful or private",
    "broken": "All responses are broken",
}
# the others fill a place: a prompt that nobody can rank must not keep the line waiting
_OTHERS_MAY_TRY = "cannot_judge"
_MAX_LEASE_SECONDS = 4 * 3600.0


class Refused(ToolkitError):
    """What was asked is not allowed or makes no sense; the message is for the annotator."""

    exit_code = EXIT_BAD_INPUT


@dataclass(frozen=True)
class Assignment:
    """One prompt on one person's screen. `responses` and `draft` are in the order shown."""

    token: str
    task_id: str
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    draft: tuple[int | None, ...]
    draft_revision: int


@dataclass(frozen=True)
class Saved:
    """Outcome of a submission."""

    state: str
    """ranked, late or already (this ranking was in before; nothing changed)."""
    message: str


def claim(store: Store, user_id: int, now: float | None = None) -> Assignment | None:
    """The prompt that this person works on: the one they have, else the next of the queue.

    Returns None when there is nothing for them.
    """
    now = time.time() if now is None else now
    with store.write() as tx:
        _active_user(tx, user_id)
        row = _leased_before(tx, user_id, now) or _next_task(tx, user_id, now)
        if row is None:
            return None
        return claim_task(tx, user_id, row.id, row.lease_minutes, now)


def claim_task(
    tx: Connection, user_id: int, task: str, lease_minutes: int, now: float
) -> Assignment:
    """Lease this task to this user, or prolong the lease they have on it."""
    where = (assignments.c.task_id == task, assignments.c.user_id == user_id)
    found = tx.execute(sa.select(assignments).where(*where)).first()
    expires = now + 60.0 * lease_minutes
    shown = tx.execute(sa.select(tasks).where(tasks.c.id == task)).one()
    if found is None:
        order = list(range(len(json.loads(shown.responses))))
        # a fresh order for each person, so that no response profits from its place
        random.SystemRandom().shuffle(order)
        row = {
            "id": content_id("assignment", task, user_id),
            "task_id": task,
            "user_id": user_id,
            "token": secrets.token_urlsafe(18),
            "display_order": canonical_json(order),
            "state": "leased",
            "leased": now,
            "expires": expires,
        }
        tx.execute(sa.insert(assignments), row)
        log_event(tx, "claim", user_id, task)
        found = tx.execute(sa.select(assignments).where(*where)).one()
    elif found.expires <= now:
        tx.execute(sa.update(assignments).where(*where).values(leased=now, expires=expires))
        log_event(tx, "claim again", user_id, task)
    return _as_assignment(found, shown)


def save_draft(
    store: Store,
    user_id: int,
    token: str,
    ranks: Sequence[object],
    revision: int,
    now: float | None = None,
) -> bool:
    """Keep an unfinished order; False when a newer one (of another tab) is there already."""
    now = time.time() if now is None else now
    with store.write() as tx:
        found = _mine(tx, user_id, token)
        if found.state != "leased":
            return False
        places = _checked_ranks(ranks, len(json.loads(found.display_order)), complete=False)
        if type(revision) is not int or revision <= found.draft_revision:
            return False
        # work prolongs the lease, an open page alone does not
        minutes = tx.execute(
            sa.select(queues.c.lease_minutes)
            .join(tasks, tasks.c.step == queues.c.step)
            .where(tasks.c.id == found.task_id)
        ).scalar_one_or_none()
        until = min(now + 60.0 * (minutes or 30), found.leased + _MAX_LEASE_SECONDS)
        values = {"draft": canonical_json(places), "draft_revision": revision}
        tx.execute(
            sa.update(assignments)
            .where(assignments.c.id == found.id)
            .values(**values, expires=max(found.expires, until))
        )
        return True


def submit(
    store: Store, user_id: int, token: str, ranks: Sequence[object], now: float | None = None
) -> Saved:
    """Save a finished order (ranks by shown place). The same token twice is saved once.

    Raises:
        Refused: not this person's prompt, or not a rank for every response.
    """
    now = time.time() if now is None else now
    with store.write() as tx:
        return submit_in(tx, user_id, token, ranks, now)


def submit_in(
    tx: Connection,
    user_id: int,
    token: str,
    ranks: Sequence[object],
    now: float,
    source: str = "app",
    revise: bool = False,
) -> Saved:
    """`submit` in a transaction of the caller. `revise` lets a new order supersede the last one."""
    found = _mine(tx, user_id, token)
    order: list[int] = json.loads(found.display_order)
    places = _checked_ranks(ranks, len(order), complete=True)
    stored = _dense([rank for _, rank in sorted(zip(order, places, strict=True))])
    before = _current(tx, found.id)
    if before is not None:
        same = before.status == "ranked" and json.loads(before.ranks) == stored
        if same or not revise:
            message = (
                "Already saved." if same else "Already saved before; this order was not stored."
            )
            return Saved("already", message)
    late = before is None and found.expires <= now and not _has_room(tx, found.task_id, now)
    state = "late" if late else "ranked"
    _append(tx, found, before, now, status="ranked", ranks=stored, late=late, source=source)
    tx.execute(sa.update(assignments).where(assignments.c.id == found.id).values(state=state))
    log_event(tx, "submit", user_id, found.task_id, state=state)
    if late:
        return Saved(state, "Saved, but late: others had already finished this prompt.")
    return Saved(state, "Saved.")


def skip(store: Store, user_id: int, token: str, reason: str, now: float | None = None) -> Saved:
    """Pass a prompt by, for one of SKIP_REASONS."""
    now = time.time() if now is None else now
    if reason not in SKIP_REASONS:
        raise Refused("Choose a reason to skip this prompt.")
    with store.write() as tx:
        found = _mine(tx, user_id, token)
        before = _current(tx, found.id)
        if before is not None:
            return Saved("already", "Already saved.")
        state = "skipped" if reason == _OTHERS_MAY_TRY else "unrankable"
        _append(tx, found, None, now, status="skipped", reason=reason, source="app")
        tx.execute(sa.update(assignments).where(assignments.c.id == found.id).values(state=state))
        log_event(tx, "skip", user_id, found.task_id, reason=reason)
        return Saved(state, "Skipped.")


def my_progress(store: Store, user_id: int, now: float | None = None) -> tuple[int, int, bool]:
    """(done, left, busy) for one person: prompts they finished and prompts they may still get.

    busy: nothing may be left for them now, but leases of others may end without a ranking.
    """
    now = time.time() if now is None else now
    own = sa.select(assignments.c.id).where(
        assignments.c.task_id == tasks.c.id, assignments.c.user_id == user_id
    )
    working = own.where(assignments.c.state == "leased", assignments.c.expires > now)
    free = sa.and_(
        queues.c.overlap > _filled(now), ~own.where(assignments.c.state != "leased").exists()
    )
    unfinished = sa.and_(
        queues.c.overlap > _filled(float("inf")),
        ~own.where(assignments.c.state != "leased").exists(),
    )
    open_tasks = _open_tasks().with_only_columns(sa.func.count())
    with store.read() as tx:
        done = tx.execute(
            sa.select(sa.func.count())
            .select_from(assignments.join(tasks).join(queues, queues.c.step == tasks.c.step))
            .where(queues.c.open, tasks.c.active, assignments.c.user_id == user_id)
            .where(assignments.c.state.in_(("ranked", "late")))
        ).scalar_one()
        left = tx.execute(open_tasks.where(free | working.exists())).scalar_one()
        busy = tx.execute(open_tasks.where(unfinished)).scalar_one() > 0
    return int(done), int(left), busy


# ---- the queue -----------------------------------------------------------------------------


def _open_tasks() -> sa.Select[Any]:
    return (
        sa.select(tasks.c.id, queues.c.lease_minutes)
        .join(queues, queues.c.step == tasks.c.step)
        .where(tasks.c.active, queues.c.open, queues.c.by == "people")
    )


def _leased_before(tx: Connection, user_id: int, now: float) -> Row[Any] | None:
    """What this person has begun: a live lease, or an ended one whose place is still free."""
    query = (
        _open_tasks()
        .add_columns(assignments.c.expires)
        .join(assignments, assignments.c.task_id == tasks.c.id)
        .where(assignments.c.user_id == user_id, assignments.c.state == "leased")
        .order_by(assignments.c.expires.desc())
    )
    rows = tx.execute(query).all()
    return next((row for row in rows if row.expires > now or _has_room(tx, row.id, now)), None)


def _filled(now: float) -> Any:
    """Places of a task that are taken by people."""
    taken = assignments.c.state.in_(("ranked", "unrankable"))
    leased = sa.and_(assignments.c.state == "leased", assignments.c.expires > now)
    return (
        sa.select(sa.func.count())
        .select_from(assignments.join(users))
        .where(assignments.c.task_id == tasks.c.id, users.c.kind == "person", taken | leased)
        .scalar_subquery()
    )


def _has_room(tx: Connection, task: str, now: float) -> bool:
    query = (
        sa.select(queues.c.overlap - _filled(now))
        .select_from(tasks.join(queues, queues.c.step == tasks.c.step))
        .where(tasks.c.id == task)
    )
    room = tx.execute(query).scalar_one_or_none()
    return room is None or room > 0


def _next_task(tx: Connection, user_id: int, now: float) -> Row[Any] | None:
    """Fewest missing first: a prompt with overlap 2 is finished before the next one is begun."""
    missing = queues.c.overlap - _filled(now)
    handed_before = sa.select(assignments.c.id).where(
        assignments.c.task_id == tasks.c.id, assignments.c.user_id == user_id
    )
    query = (
        _open_tasks()
        .where(missing > 0, ~handed_before.exists())
        .order_by(missing, sa.func.random())
        .limit(1)
        # two servers on one Postgres take different rows; SQLite has the write lock instead
        .with_for_update(of=tasks, skip_locked=True)
    )
    while (row := tx.execute(query).first()) is not None:
        # on Postgres the count was made before the row was locked
        if _has_room(tx, row.id, now):
            return row
    return None


def _active_user(tx: Connection, user_id: int) -> Row[Any]:
    row = tx.execute(sa.select(users).where(users.c.id == user_id)).first()
    if row is None or not row.active:
        raise Refused("This account is not active. Log in again, or ask the lead.")
    return row


def _mine(tx: Connection, user_id: int, token: str) -> Row[Any]:
    _active_user(tx, user_id)
    query = sa.select(assignments).where(assignments.c.token == str(token))
    found = tx.execute(query).first()
    if found is None or found.user_id != user_id:
        raise Refused("This prompt is not yours. Reload the page.")
    return found


def _current(tx: Connection, assignment: str) -> Row[Any] | None:
    query = sa.select(rankings).where(
        rankings.c.assignment_id == assignment, rankings.c.superseded_by.is_(None)
    )
    return tx.execute(query).first()


def _append(
    tx: Connection, found: Row[Any], before: Row[Any] | None, now: float, **values: Any
) -> None:
    revision = before.revision + 1 if before is not None else 1
    ranking = content_id("stored ranking", found.id, revision)
    if "ranks" in values:
        values["ranks"] = canonical_json(values["ranks"])
    row = {"id": ranking, "assignment_id": found.id, "revision": revision, "created": now}
    owner = {"task_id": found.task_id, "user_id": found.user_id}
    tx.execute(sa.insert(rankings), {**row, **owner, **values})
    if before is not None:
        tx.execute(
            sa.update(rankings).where(rankings.c.id == before.id).values(superseded_by=ranking)
        )


def _checked_ranks(ranks: Sequence[object], count: int, complete: bool) -> list[Any]:
    """The client may send anything: only `count` whole numbers in 1..count pass."""
    if not isinstance(ranks, list | tuple) or len(ranks) != count:
        raise Refused(f"Expected {count} ranks. Reload the page.")
    for rank in ranks:
        if rank is None and not complete:
            continue
        if rank is None:
            raise Refused("Place every response first.")
        if type(rank) is not int or not 1 <= rank <= count:
            raise Refused(f"A rank must be a whole number from 1 to {count}.")
    return list(ranks)


def _dense(ranks: Sequence[int]) -> list[int]:
    """1, 3, 3, 7 becomes 1, 2, 2, 3: the same order without gaps."""
    place = {rank: i for i, rank in enumerate(sorted(set(ranks)), 1)}
    return [place[rank] for rank in ranks]


def _as_assignment(found: Row[Any], shown: Row[Any]) -> Assignment:
    responses = json.loads(shown.responses)
    order = json.loads(found.display_order)
    draft = json.loads(found.draft) if found.draft else [None] * len(order)
    return Assignment(
        token=found.token,
        task_id=shown.id,
        messages=tuple(json.loads(shown.messages)),
        responses=tuple(responses[place] for place in order),
        draft=tuple(draft),
        draft_revision=found.draft_revision,
    )
