"""Single prompts, flags and events as a lead looks them up. Everything is text as it was stored:
whoever draws it must treat it as hostile."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from labeling_ui.forms import Refused
from labeling_ui.schema import events, rankings, tasks, users
from labeling_ui.store import Store
from pipeline.records import Message, canonical_json

MOST = 200
VIEWS = {
    "disagreement": "most disagreement",
    "flagged": "flagged by somebody",
    "commented": "with comments",
    "unrankable": "skipped or all bad",
    "warned": "with warnings of the import",
    "gold": "known answers (gold)",
    "all": "all, the latest first",
}
_CURRENT = rankings.c.superseded_by.is_(None)


@dataclass(frozen=True)
class Said:
    """One person's last word on a prompt; ranks, scores and flags by stored place."""

    name: str
    status: str
    late: bool
    ranks: tuple[int, ...]
    scores: tuple[int | None, ...]
    flags: tuple[tuple[str, ...], ...]
    comment: str
    confidence: int | None
    ideal: str
    active_seconds: float | None
    created: float
    revision: int


@dataclass(frozen=True)
class Prompt:
    id: str
    kind: str
    active: bool
    step: str | None
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    gold: tuple[int, ...] | None
    warnings: str
    said: tuple[Said, ...]


@dataclass(frozen=True)
class Line:
    """A prompt in a list."""

    id: str
    kind: str
    active: bool
    title: str
    rankings: int
    disagreement: float | None
    """Share of the strict pairs on which two people differ; None where nobody can."""
    flags: tuple[tuple[str, int], ...]
    """Each flag that was raised on a response, and how often."""
    comments: int


def prompts(store: Store, view: str, search: str = "", most: int = MOST) -> list[Line]:
    """Prompts of one of VIEWS whose text or id holds `search`."""
    if view not in VIEWS:
        raise Refused("Choose one of the lists.")
    query = sa.select(tasks.c.id).where(tasks.c.kind != "repeat")
    query = query.where(tasks.c.kind == "gold") if view == "gold" else query.where(_in(view))
    if search.strip():
        # as it stands in the stored JSON
        text = canonical_json(search.strip())[1:-1]
        fits = tasks.c.messages.contains(text, autoescape=True)
        fits |= tasks.c.responses.contains(text, autoescape=True)
        fits |= tasks.c.id.startswith(search.strip(), autoescape=True)
        query = query.where(fits)
    last = (
        sa.select(sa.func.max(rankings.c.created))
        .where(rankings.c.task_id == tasks.c.id)
        .scalar_subquery()
    )
    # who disagrees is known only after reading: from more prompts than are shown
    query = query.order_by(sa.func.coalesce(last, 0).desc(), tasks.c.id)
    with store.read() as tx:
        ids = list(tx.execute(query.limit(10 * most if view == "disagreement" else most)).scalars())
        lines = _lines(tx, ids)
    if view == "disagreement":
        lines = [line for line in lines if line.disagreement]
        lines.sort(key=lambda line: -(line.disagreement or 0))
    return lines[:most]


def prompt(store: Store, task: str) -> Prompt:
    """A prompt, its responses and all that was said of it."""
    with store.read() as tx:
        row = tx.execute(sa.select(tasks).where(tasks.c.id == task)).first()
        if row is None:
            raise Refused("There is no such prompt.")
        responses = tuple(json.loads(row.responses))
        query = (
            sa.select(rankings, users.c.name)
            .select_from(rankings.join(users))
            .where(rankings.c.task_id == task, _CURRENT)
            .order_by(rankings.c.created)
        )
        said = tuple(_said(found, len(responses)) for found in tx.execute(query).all())
    return Prompt(
        id=row.id,
        kind=row.kind,
        active=row.active,
        step=row.step,
        messages=tuple(json.loads(row.messages)),
        responses=responses,
        gold=tuple(json.loads(row.gold)) if row.gold else None,
        warnings=row.warnings or "",
        said=said,
    )


def audit(
    store: Store, kind: str | None = None, user_id: int | None = None, most: int = MOST
) -> list[tuple[float, str, str, str, str]]:
    """(time, who, kind, task, detail) of the last events, the newest first."""
    query = (
        sa.select(
            events.c.at, users.c.name, events.c.user_id,
            events.c.kind, events.c.task_id, events.c.detail,
        )
        .select_from(events.outerjoin(users, users.c.id == events.c.user_id))
        .order_by(events.c.id.desc())
        .limit(most)
    )  # fmt: skip
    if kind:
        query = query.where(events.c.kind == kind)
    if user_id is not None:
        query = query.where(events.c.user_id == user_id)
    with store.read() as tx:
        rows = tx.execute(query).all()
    return [(row.at, _who(row), row.kind, row.task_id or "", row.detail) for row in rows]


def event_kinds(store: Store) -> list[str]:
    with store.read() as tx:
        return list(
            tx.execute(sa.select(events.c.kind).distinct().order_by(events.c.kind)).scalars()
        )


# ---- parts ---------------------------------------------------------------------------------


def _who(row: Any) -> str:
    if row.name is not None:
        return str(row.name)
    return "the line" if row.user_id is None else f"user {row.user_id} (forgotten)"


def _in(view: str) -> sa.ColumnElement[bool]:
    """Tasks about which somebody said such a thing."""
    if view == "all":
        return sa.true()
    if view == "warned":
        return tasks.c.warnings.is_not(None)
    said = {
        "disagreement": rankings.c.status == "ranked",
        # written with keys only where there is a flag
        "flagged": rankings.c.marks.contains('"flags":["'),
        "commented": rankings.c.comment.is_not(None),
        "unrankable": rankings.c.status.in_(("skipped", "all_bad")),
    }[view]
    return sa.exists().where(rankings.c.task_id == tasks.c.id, _CURRENT, said)


def _lines(tx: Connection, ids: list[str]) -> list[Line]:
    found: dict[str, list[Any]] = {task: [] for task in ids}
    shown: dict[str, Any] = {}
    columns = sa.select(tasks.c.id, tasks.c.kind, tasks.c.active, tasks.c.messages)
    said = sa.select(
        rankings.c.task_id, rankings.c.status, rankings.c.ranks, rankings.c.marks,
        rankings.c.comment, rankings.c.late,
    )  # fmt: skip
    for start in range(0, len(ids), 500):
        some = ids[start : start + 500]
        shown |= {task.id: task for task in tx.execute(columns.where(tasks.c.id.in_(some)))}
        for row in tx.execute(said.where(_CURRENT, rankings.c.task_id.in_(some))):
            found[row.task_id].append(row)
    return [_line(shown[task], found[task]) for task in ids]


def _line(task: Any, said: list[Any]) -> Line:
    flags: Counter[str] = Counter()
    for row in said:
        for mark in json.loads(row.marks) if row.marks else []:
            flags.update(mark["flags"])
    orders = [json.loads(row.ranks) for row in said if row.ranks]
    return Line(
        id=task.id,
        kind=task.kind,
        active=task.active,
        title=" ".join(json.loads(task.messages)[-1]["content"].split())[:160],
        rankings=len(orders),
        disagreement=_disagreement(orders),
        flags=tuple(flags.most_common()),
        comments=sum(row.comment is not None for row in said),
    )


def _disagreement(orders: list[list[int]]) -> float | None:
    differ = both = 0
    for one, other in combinations(orders, 2):
        for i, j in combinations(range(len(one)), 2):
            product = (one[i] - one[j]) * (other[i] - other[j])
            both += product != 0
            differ += product < 0
    return differ / both if both else None


def _said(row: Any, count: int) -> Said:
    marks = json.loads(row.marks) if row.marks else [{"score": None, "flags": []}] * count
    return Said(
        name=row.name,
        status=f"skipped ({row.reason})" if row.status == "skipped" else row.status,
        late=row.late,
        ranks=tuple(json.loads(row.ranks)) if row.ranks else (),
        scores=tuple(mark["score"] for mark in marks),
        flags=tuple(tuple(mark["flags"]) for mark in marks),
        comment=row.comment or "",
        confidence=row.confidence,
        ideal=row.ideal or "",
        active_seconds=row.active_seconds,
        created=row.created,
        revision=row.revision,
    )
