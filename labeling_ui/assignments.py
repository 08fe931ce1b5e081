"""Who works on what: leases and drafts, each in one transaction.

A draft and its order are kept for the person who comes back. What a person sees is only ever a
shuffled order: the way from a shown place back to a response is here and in submitting.py alone.
"""

from __future__ import annotations

import json
import random
import secrets
import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from labeling_ui.forms import Form, Refused
from labeling_ui.handout import (
    active_user,
    has_room,
    next_task,
)
from labeling_ui.schema import assignments, guidelines, queues, rankings, tasks
from labeling_ui.store import Store, log_event
from pipeline.records import Message, canonical_json, content_id

SKIP_REASONS = {
    "cannot_judge": "I cannot judge this one (topic or language)",
    "unclear": "The prompt makes no sense",
    "harmful": "The text is harmful or private",
    "broken": "All responses are broken",
}
_MAX_LEASE_SECONDS = 4 * 3600.0
_CLOCK_SLACK_SECONDS = 300.0


@dataclass(frozen=True)
class Assignment:
    """One prompt on one person's screen. `responses` and `form` are in the order shown."""

    token: str
    task_id: str
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    """Empty for a prompt that waits for an answer."""
    form: Form
    revision: int
    """Of the draft; the next one must have a higher number."""
    is_edit: bool = False
    """It was submitted before and is being changed."""


def claim(store: Store, user_id: int, now: float | None = None) -> Assignment | None:
    """The prompt that this person works on: the one they have, else the next of the queue.

    Returns None when there is nothing for them.
    """
    now = time.time() if now is None else now
    with store.write() as tx:
        _check_active(tx, user_id)
        found = next_task(tx, user_id, now)
        if found is None and _end_leases_from_the_future(tx, now):
            found = next_task(tx, user_id, now)
        return None if found is None else claim_task(tx, user_id, *found, now)


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
    elif found.state == "leased" and found.expires <= now:
        tx.execute(sa.update(assignments).where(*where).values(leased=now, expires=expires))
        log_event(tx, "claim again", user_id, task)
    return _as_assignment(found, shown)


def save_draft(
    store: Store,
    user_id: int,
    token: str,
    form: object,
    revision: int,
    now: float | None = None,
) -> bool:
    """Keep an unfinished form; False when a newer one (of another tab) is there already."""
    now = time.time() if now is None else now
    with store.write() as tx:
        found = owned(tx, user_id, token)
        if found.state != "leased" and found.reopened is None:
            return False
        draft = Form.read(form, len(json.loads(found.display_order)))
        if type(revision) is not int or not found.draft_revision < revision < 2**31:
            return False
        # work prolongs the lease, an open page alone does not
        minutes = tx.execute(
            sa.select(queues.c.lease_minutes)
            .join(tasks, tasks.c.step == queues.c.step)
            .where(tasks.c.id == found.task_id)
        ).scalar_one_or_none()
        until = min(now + 60.0 * (minutes or 30), found.leased + _MAX_LEASE_SECONDS)
        values: dict[str, Any] = {"draft": canonical_json(draft.to_json())}
        values["draft_revision"] = revision
        # an ended lease must not come back when another has its place
        if found.expires > now or has_room(tx, found.task_id, now):
            values["expires"] = max(found.expires, until)
        tx.execute(sa.update(assignments).where(assignments.c.id == found.id).values(**values))
        return True


def guidelines_version(tx: Connection) -> int | None:
    """The guidelines in force; None while nobody has written any."""
    version = tx.execute(sa.select(sa.func.max(guidelines.c.version))).scalar()
    return None if version is None else int(version)


def _end_leases_from_the_future(tx: Connection, now: float) -> int:
    """End leases that began while the clock was ahead, and would last until it is there again; how many."""
    ahead = assignments.c.leased > now + _CLOCK_SLACK_SECONDS
    here = sa.update(assignments).where(assignments.c.state == "leased", ahead)
    return tx.execute(here.values(leased=now, expires=now)).rowcount


# ---- parts ---------------------------------------------------------------------------------


def _check_active(tx: Connection, user_id: int) -> None:
    if active_user(tx, user_id) is None:
        raise Refused("This account is not active. Log in again, or ask the lead.")


def owned(tx: Connection, user_id: int, token: str) -> Row[Any]:
    _check_active(tx, user_id)
    # what no token holds is not asked for: PostgreSQL takes no NUL
    asked = str(token) if is_plain(str(token)) else ""
    found = tx.execute(sa.select(assignments).where(assignments.c.token == asked)).first()
    if found is None or found.user_id != user_id:
        raise Refused("This prompt is not yours. Reload the page.")
    return found


def current(tx: Connection, assignment: str) -> Row[Any] | None:
    query = sa.select(rankings).where(
        rankings.c.assignment_id == assignment, rankings.c.superseded_by.is_(None)
    )
    return tx.execute(query).first()


def is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def drop_draft(tx: Connection, found: Row[Any], state: str | None = None) -> None:
    values: dict[str, Any] = {"draft": None, "reopened": None}
    if state is not None:
        values["state"] = state
    tx.execute(sa.update(assignments).where(assignments.c.id == found.id).values(**values))


def _as_assignment(found: Row[Any], shown: Row[Any]) -> Assignment:
    responses = json.loads(shown.responses)
    order = json.loads(found.display_order)
    return Assignment(
        token=found.token,
        task_id=shown.id,
        messages=tuple(json.loads(shown.messages)),
        responses=tuple(responses[place] for place in order),
        form=Form.read(json.loads(found.draft), len(order))
        if found.draft
        else Form.empty(len(order)),
        revision=found.draft_revision,
        is_edit=found.state != "leased",
    )
