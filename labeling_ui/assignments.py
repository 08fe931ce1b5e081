"""Who works on what, and what they said: leases, drafts and rankings, each in one transaction.

A draft and its order are kept for the person who comes back. What a person sees is only ever a
shuffled order: the way from a shown place back to a response is here and nowhere else.
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

from labeling_ui.forms import Form, Refused, dense
from labeling_ui.handout import (
    active_user,
    has_room,
    is_frozen,
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
# the others fill a place: a prompt that nobody can rank must not keep the line waiting
_OTHERS_MAY_TRY = "cannot_judge"
_MAX_LEASE_SECONDS = 4 * 3600.0


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


@dataclass(frozen=True)
class Saved:
    """Outcome of a submission."""

    state: str
    """ranked, late, skipped, unrankable or already (it was in before; nothing changed)."""
    message: str


def claim(store: Store, user_id: int, now: float | None = None) -> Assignment | None:
    """The prompt that this person works on: the one they have, else the next of the queue.

    Returns None when there is nothing for them.
    """
    now = time.time() if now is None else now
    with store.write() as tx:
        _check_active(tx, user_id)
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


def submit(
    store: Store,
    user_id: int,
    token: str,
    form: object,
    now: float | None = None,
    submission: str | None = None,
    active_seconds: float | None = None,
) -> Saved:
    """Save a finished form (ranks by shown place). The same submission twice is saved once.

    Args:
        submission: an id that the browser made for this press of the button.
        active_seconds: with the page in front and the hands moving, as the browser says.

    Raises:
        Refused: not this person's prompt, or not a rank for every response.
    """
    now = time.time() if now is None else now
    with store.write() as tx:
        return submit_in(
            tx, user_id, token, form, now, submission=submission, active_seconds=active_seconds
        )


def submit_in(
    tx: Connection,
    user_id: int,
    token: str,
    form: object,
    now: float,
    source: str = "app",
    revise: bool = False,
    submission: str | None = None,
    active_seconds: float | None = None,
) -> Saved:
    """`submit` in a transaction of the caller. `revise` lets a new order supersede the last one,
    as reopening it does."""
    found = owned(tx, user_id, token)
    order: list[int] = json.loads(found.display_order)
    said = Form.read(form, len(order))
    status = _status(said)
    content = _content(said.stored(order), status)
    before = current(tx, found.id)
    if before is not None:
        if _replayed(tx, found.id, submission):
            # nothing else: the answer may have been taken up again since
            return Saved("already", "Already saved.")
        if _same(before, content):
            drop_draft(tx, found)
            return Saved("already", "Already saved.")
        if not revise and found.reopened is None:
            return Saved("already", "Already saved before; this order was not stored.")
        if is_frozen(tx, found.task_id):
            raise Refused("The lead has closed these prompts: what was saved before stands.")
    state, message = _state(tx, found, before, status, now)
    content |= {"source": source, "late": state == "late", "submission": _id(submission)}
    content |= {"active_seconds": _seconds(active_seconds, found, now)}
    content |= {"guidelines": guidelines_version(tx)}
    _append(tx, found, before, now, **content)
    drop_draft(tx, found, state)
    if before is None and state in ("ranked", "unrankable") and source == "app":
        _fill(tx, found.task_id)
    log_event(tx, "submit" if before is None else "change", user_id, found.task_id, state=state)
    return Saved(state, message)


def skip(store: Store, user_id: int, token: str, reason: str, now: float | None = None) -> Saved:
    """Pass a prompt by, for one of SKIP_REASONS."""
    now = time.time() if now is None else now
    if reason not in SKIP_REASONS:
        raise Refused("Choose a reason to skip this prompt.")
    with store.write() as tx:
        found = owned(tx, user_id, token)
        before = current(tx, found.id)
        if before is not None:
            drop_draft(tx, found)
            return Saved("already", "Already saved.")
        state = "skipped" if reason == _OTHERS_MAY_TRY else "unrankable"
        _append(tx, found, None, now, status="skipped", reason=reason, source="app")
        drop_draft(tx, found, state)
        if state == "unrankable":
            _fill(tx, found.task_id)
        log_event(tx, "skip", user_id, found.task_id, reason=reason)
        return Saved(state, "Skipped.")


def guidelines_version(tx: Connection) -> int | None:
    """The guidelines in force; None while nobody has written any."""
    version = tx.execute(sa.select(sa.func.max(guidelines.c.version))).scalar()
    return None if version is None else int(version)


# ---- parts ---------------------------------------------------------------------------------


def _check_active(tx: Connection, user_id: int) -> None:
    if active_user(tx, user_id) is None:
        raise Refused("This account is not active. Log in again, or ask the lead.")


def owned(tx: Connection, user_id: int, token: str) -> Row[Any]:
    _check_active(tx, user_id)
    # what no token holds is not asked for: PostgreSQL takes no NUL
    asked = str(token) if _is_plain(str(token)) else ""
    found = tx.execute(sa.select(assignments).where(assignments.c.token == asked)).first()
    if found is None or found.user_id != user_id:
        raise Refused("This prompt is not yours. Reload the page.")
    return found


def current(tx: Connection, assignment: str) -> Row[Any] | None:
    query = sa.select(rankings).where(
        rankings.c.assignment_id == assignment, rankings.c.superseded_by.is_(None)
    )
    return tx.execute(query).first()


def _status(said: Form) -> str:
    """What a form amounts to.

    Raises:
        Refused: it is not finished.
    """
    if not said.ranks:
        if not said.ideal.strip():
            raise Refused("Write an answer first.")
        return "written"
    if said.complete:
        return "ranked"
    if said.all_bad:
        return "all_bad"
    raise Refused("Place every response first.")


def _content(stored: Form, status: str) -> dict[str, Any]:
    """The columns of a ranking that a person decides."""
    ranks = [rank for rank in stored.ranks if rank is not None]
    return {
        "status": status,
        "ranks": canonical_json(dense(ranks)) if status == "ranked" else None,
        "marks": canonical_json(stored.to_json()["marks"]) if _marked(stored) else None,
        "all_bad": stored.all_bad,
        "comment": stored.comment or None,
        "confidence": stored.confidence,
        "ideal": stored.ideal or None,
    }


def _marked(form: Form) -> bool:
    return any(mark.score is not None or mark.flags for mark in form.marks)


def _same(before: Row[Any], content: dict[str, Any]) -> bool:
    return all(getattr(before, name) == value for name, value in content.items())


def _replayed(tx: Connection, assignment: str, submission: str | None) -> bool:
    if not _id(submission):
        return False
    query = sa.select(rankings.c.id).where(
        rankings.c.assignment_id == assignment, rankings.c.submission == _id(submission)
    )
    return tx.execute(query).first() is not None


def _id(submission: object) -> str | None:
    if not isinstance(submission, str) or not submission or not _is_plain(submission):
        return None
    return submission[:64]


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _seconds(said: object, found: Row[Any], now: float) -> float | None:
    """What the browser says, but never more than has passed."""
    if not isinstance(said, int | float) or not said >= 0:
        return None
    return min(float(said), max(0.0, now - float(found.leased)))


def _state(
    tx: Connection, found: Row[Any], before: Row[Any] | None, status: str, now: float
) -> tuple[str, str]:
    """(state, words for the person) of an assignment whose form was accepted."""
    state = "unrankable" if status == "all_bad" else "ranked"
    if before is not None:
        return ("late" if found.state == "late" else state), "Changed."
    if is_frozen(tx, found.task_id):
        return "late", "Saved, but late: the lead has closed these prompts."
    if found.expires <= now and not has_room(tx, found.task_id, now):
        return "late", "Saved, but late: others had already finished this prompt."
    return state, "Saved."


def _fill(tx: Connection, task: str) -> None:
    tx.execute(sa.update(tasks).where(tasks.c.id == task).values(filled=tasks.c.filled + 1))


def drop_draft(tx: Connection, found: Row[Any], state: str | None = None) -> None:
    values: dict[str, Any] = {"draft": None, "reopened": None}
    if state is not None:
        values["state"] = state
    tx.execute(sa.update(assignments).where(assignments.c.id == found.id).values(**values))


def _append(
    tx: Connection, found: Row[Any], before: Row[Any] | None, now: float, **values: Any
) -> None:
    revision = before.revision + 1 if before is not None else 1
    ranking = content_id("stored ranking", found.id, revision)
    row = {"id": ranking, "assignment_id": found.id, "revision": revision, "created": now}
    owner = {"task_id": found.task_id, "user_id": found.user_id}
    tx.execute(sa.insert(rankings), {**row, **owner, **values})
    if before is not None:
        tx.execute(
            sa.update(rankings).where(rankings.c.id == before.id).values(superseded_by=ranking)
        )


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
