"""A person's last answers, taken up again: until their prompts are closed or frozen.

What is reopened is handed out by `claim` until it is saved again or left. The ranking that was
saved before stands until then, and stays in the store afterwards.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from labeling_ui.assignments import current, drop_draft, owned
from labeling_ui.forms import Form, Refused
from labeling_ui.schema import assignments, queues, rankings, tasks
from labeling_ui.store import Store, log_event
from pipeline.records import canonical_json

RECENT = 10
"""So many of their last answers a person may take up again."""
_DONE = ("ranked", "late", "unrankable")


@dataclass(frozen=True)
class Recent:
    """One of a person's last answers."""

    token: str
    title: str
    """The beginning of the prompt."""
    state: str
    created: float


def recent(store: Store, user_id: int) -> list[Recent]:
    """This person's last answers that may still be changed, the newest first."""
    with store.read() as tx:
        return [
            Recent(row.token, _title(row.messages), row.state, row.created)
            for row in tx.execute(_changeable(user_id)).all()
        ]


def reopen(store: Store, user_id: int, token: str, now: float | None = None) -> None:
    """Take up one of the last answers again: `claim` hands it out until it is saved or left."""
    now = time.time() if now is None else now
    with store.write() as tx:
        found = owned(tx, user_id, token)
        if token not in {row.token for row in tx.execute(_changeable(user_id)).all()}:
            raise Refused(f"Only your last {RECENT} answers can be changed, while they are open.")
        own = assignments.c.user_id == user_id, assignments.c.reopened > 0
        tx.execute(sa.update(assignments).where(*own).values(reopened=None))
        again = sa.update(assignments).where(assignments.c.id == found.id)
        if found.draft is None:
            order = json.loads(found.display_order)
            said = _said(current(tx, found.id), len(order)).shown(order)
            again = again.values(draft=canonical_json(said.to_json()))
        tx.execute(again.values(reopened=now))
        log_event(tx, "reopen", user_id, found.task_id)


def leave(store: Store, user_id: int, token: str) -> None:
    """Stop changing an answer; what was saved stands and the draft goes."""
    with store.write() as tx:
        found = owned(tx, user_id, token)
        if found.reopened is not None:
            drop_draft(tx, found)


def _said(row: Row[Any] | None, count: int) -> Form:
    """The form that a ranking was made from, by stored place."""
    assert row is not None, "an answer that may be changed was saved"
    value = {name: getattr(row, name) for name in ("all_bad", "comment", "confidence", "ideal")}
    value["ranks"] = json.loads(row.ranks) if row.ranks else [None] * count
    return Form.read(value | {"marks": json.loads(row.marks) if row.marks else None}, count)


def _changeable(user_id: int) -> sa.Select[Any]:
    return (
        sa.select(assignments.c.token, assignments.c.state, tasks.c.messages, rankings.c.created)
        .select_from(
            rankings.join(assignments, assignments.c.id == rankings.c.assignment_id)
            .join(tasks, tasks.c.id == rankings.c.task_id)
            .outerjoin(queues, queues.c.step == tasks.c.step)
        )
        .where(rankings.c.user_id == user_id, rankings.c.superseded_by.is_(None))
        .where(assignments.c.state.in_(_DONE), rankings.c.status != "skipped", tasks.c.active)
        .where(queues.c.step.is_(None) | (queues.c.open & ~queues.c.frozen))
        .order_by(rankings.c.created.desc(), rankings.c.id)
        .limit(RECENT)
    )


def _title(messages: str) -> str:
    text = " ".join(json.loads(messages)[-1]["content"].split())
    return text if len(text) <= 60 else text[:59] + "…"
