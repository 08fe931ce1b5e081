"""What people say of their prompts, for good: finished forms and skips, each in one transaction.

A ranking is never changed: a new one supersedes it. Places are filled here.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from labeling_ui.assignments import (
    SKIP_REASONS,
    current,
    drop_draft,
    guidelines_version,
    is_plain,
    owned,
)
from labeling_ui.forms import Form, Refused, dense
from labeling_ui.handout import has_room, is_frozen
from labeling_ui.schema import rankings, tasks
from labeling_ui.store import Store, log_event
from pipeline.records import canonical_json, content_id

# the others fill a place: a prompt that nobody can rank must not keep the line waiting
_OTHERS_MAY_TRY = "cannot_judge"


@dataclass(frozen=True)
class Saved:
    """Outcome of a submission."""

    state: str
    """ranked, late, skipped, unrankable or already (it was in before; nothing changed)."""
    message: str


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


# ---- parts ---------------------------------------------------------------------------------


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
    if not isinstance(submission, str) or not submission or not is_plain(submission):
        return None
    return submission[:64]


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
