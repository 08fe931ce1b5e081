"""What a label store holds, counted by the database: coverage, pace, time, leases, and what was left
out and why."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from labeling_ui.assignments import SKIP_REASONS
from labeling_ui.schema import assignments, queues, rankings, tasks, users

_HOURS, _DAYS = 48, 60
PERCENTILES = (10, 25, 50, 75, 90)


@dataclass(frozen=True)
class Queue:
    """A queue and how far it is. Prompts without active tasks are not counted."""

    step: str
    by: str
    open: bool
    frozen: bool
    overlap: int
    minimum: int | None
    lease_minutes: int
    gold_rate: float
    repeat_rate: float
    tasks: int
    finished: int
    """Tasks whose places are all filled."""
    filled: int
    wanted: int
    """filled of wanted = overlap x tasks; a place beyond the overlap is not counted."""
    begun: int
    """Tasks that somebody has finished or works on, but not all who should."""


@dataclass(frozen=True)
class Pace:
    """Labels (first answers, skips too) per bucket of time, without gaps, the oldest first."""

    bucket_seconds: int
    starts: tuple[float, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Times:
    """Seconds per task. active: with the page in front; wall: from hand-out to the first answer."""

    active: tuple[float, ...]
    """10th, 25th, 50th, 75th and 90th percentile; empty when nothing is known."""
    wall: tuple[float, ...]
    active_count: int
    histogram: tuple[int, ...]
    """Answers by active time; the last bin holds all that is longer."""
    bin_seconds: float


@dataclass(frozen=True)
class Lease:
    assignment: str
    task: str
    name: str
    since: float
    expires: float


@dataclass(frozen=True)
class Person:
    """Anybody who may rank: a person, or a simulated or imported annotator."""

    id: int
    name: str
    kind: str
    role: str
    active: bool
    last_label: float | None
    all_bad: int
    """Prompts without one good response, in their opinion."""


@dataclass(frozen=True)
class Counts:
    queues: tuple[Queue, ...]
    pace: Pace
    times: Times
    people: tuple[Person, ...]
    leases: tuple[Lease, ...]
    counted: int
    """Rankings that a reward model may learn from."""
    left_out: dict[str, int]
    """All other stored answers, each under one reason."""
    gold_items: int


def count(tx: Connection, now: float) -> Counts:
    """All of it, in the transaction of the caller."""
    counted, left_out = _uses(tx)
    gold = sa.select(sa.func.count()).where(tasks.c.kind == "gold", tasks.c.active)
    return Counts(
        queues=_queues(tx, now),
        pace=_pace(tx, now),
        times=_times(tx),
        people=_people(tx),
        leases=_leases(tx, now),
        counted=counted,
        left_out=left_out,
        gold_items=int(tx.execute(gold).scalar_one()),
    )


def _queues(tx: Connection, now: float) -> tuple[Queue, ...]:
    live = (
        sa.select(assignments.c.task_id)
        .where(assignments.c.state == "leased", assignments.c.expires > now)
        .distinct()
        .subquery()
    )
    full = tasks.c.filled >= queues.c.overlap
    begun = ~full & ((tasks.c.filled > 0) | live.c.task_id.is_not(None))
    query = (
        sa.select(
            queues,
            sa.func.count(tasks.c.id).label("tasks"),
            _total(sa.case((full, 1), else_=0)).label("finished"),
            _total(sa.case((full, queues.c.overlap), else_=tasks.c.filled)).label("filled"),
            _total(sa.case((begun, 1), else_=0)).label("begun"),
        )
        .select_from(
            queues.outerjoin(
                tasks,
                (tasks.c.step == queues.c.step)
                & tasks.c.active
                & tasks.c.kind.in_(("rank", "write")),
            ).outerjoin(live, live.c.task_id == tasks.c.id)
        )
        .group_by(*queues.c)
        .order_by(queues.c.open.desc(), queues.c.step)
    )
    found = []
    for row in tx.execute(query).mappings():
        values = dict(row)
        if values["by"] == "simulated":
            # their answers fill no places of people: counted here
            values |= _simulated(tx, values["step"], values["overlap"])
        found.append(Queue(**values, wanted=values["overlap"] * values["tasks"]))
    return tuple(found)


def _simulated(tx: Connection, step: str, overlap: int) -> dict[str, int]:
    done = (
        sa.select(sa.func.count().label("answers"))
        .select_from(assignments.join(tasks))
        .where(tasks.c.step == step, tasks.c.active, assignments.c.state == "ranked")
        .group_by(tasks.c.id)
    )
    answers = [min(overlap, count) for count in tx.execute(done).scalars()]
    full = sum(count == overlap for count in answers)
    return {"filled": sum(answers), "finished": full, "begun": len(answers) - full}


def _total(of: Any) -> Any:
    return sa.func.coalesce(sa.func.sum(of), 0)


def _uses(tx: Connection) -> tuple[int, dict[str, int]]:
    """(rankings to learn from, all other answers by reason): together, all that is stored."""
    old = rankings.c.superseded_by.is_not(None).label("old")
    group: list[Any] = [rankings.c.status, rankings.c.reason, rankings.c.late, old]
    group += [tasks.c.kind, tasks.c.active]
    query = sa.select(*group, sa.func.count().label("answers"))
    counts: Counter[str] = Counter()
    for row in tx.execute(query.select_from(rankings.join(tasks)).group_by(*group)):
        counts[_use(row)] += row.answers
    counted = counts.pop("", 0)
    return counted, dict(counts.most_common())


def _use(row: Any) -> str:
    """Why nothing is learned from an answer; empty where something is."""
    kinds = {"gold": "known answer (gold)", "repeat": "repeat of an own prompt"}
    if row.old:
        return "changed later (superseded)"
    if row.kind in kinds:
        return kinds[row.kind]
    if not row.active:
        return "the prompt is in use no more (samples changed)"
    if row.status == "skipped":
        return f"skipped: {SKIP_REASONS.get(row.reason, 'another reason')}"
    if row.status == "all_bad":
        return "all responses bad, no order"
    if row.status == "written":
        return "a written answer, no order"
    return "late: others had filled the places" if row.late else ""


def _pace(tx: Connection, now: float) -> Pace:
    query = sa.select(rankings.c.created).where(
        rankings.c.revision == 1,
        rankings.c.created > now - _DAYS * 86400,
        rankings.c.source.in_(("app", "simulated")),
    )
    created = np.array(tx.execute(query).scalars().all(), dtype=float)
    recent = not len(created) or created.min() > now - _HOURS * 3600
    size = 3600 if recent else 86400
    last = math.floor(now / size)
    first = math.floor(created.min() / size) if len(created) else last
    # a clock that was wrong must not make a bucket of the future
    places = np.minimum((created // size).astype(int), last) - first
    labels = np.bincount(places, minlength=last - first + 1)
    starts = tuple(float(bucket * size) for bucket in range(first, last + 1))
    return Pace(size, starts, tuple(int(count) for count in labels))


def _times(tx: Connection) -> Times:
    query = (
        sa.select(rankings.c.active_seconds, rankings.c.created - assignments.c.leased)
        .select_from(rankings.join(assignments, assignments.c.id == rankings.c.assignment_id))
        .where(rankings.c.revision == 1, rankings.c.source == "app")
        .where(rankings.c.status != "skipped")
    )
    rows = tx.execute(query).all()
    active = np.array([row[0] for row in rows if row[0] is not None], dtype=float)
    wall = np.array([row[1] for row in rows], dtype=float)
    # so wide that the slowest tenth shares the last bin
    bin_seconds = max(1.0, float(np.percentile(active, 90)) / 19) if len(active) else 1.0
    bins = np.minimum(active // bin_seconds, 19).astype(int)
    return Times(
        active=tuple(float(v) for v in np.percentile(active, PERCENTILES)) if len(active) else (),
        wall=tuple(float(v) for v in np.percentile(wall, PERCENTILES)) if len(wall) else (),
        active_count=len(active),
        histogram=tuple(int(count) for count in np.bincount(bins, minlength=20)),
        bin_seconds=bin_seconds,
    )


def _leases(tx: Connection, now: float, most: int = 200) -> tuple[Lease, ...]:
    query = (
        sa.select(
            assignments.c.id, tasks.c.id.label("task"), users.c.name,
            assignments.c.leased, assignments.c.expires,
        )
        .select_from(assignments.join(tasks).join(users))
        .where(assignments.c.state == "leased", assignments.c.expires > now)
        .order_by(assignments.c.leased)
        .limit(most)
    )  # fmt: skip
    return tuple(Lease(*row) for row in tx.execute(query).all())


def _people(tx: Connection) -> tuple[Person, ...]:
    current = rankings.c.superseded_by.is_(None)
    bad = sa.case(((rankings.c.status == "all_bad") & current, 1), else_=0)
    query = (
        sa.select(
            users.c.id, users.c.name, users.c.kind, users.c.role, users.c.active,
            sa.func.max(rankings.c.created).label("last_label"),
            _total(bad).label("all_bad"),
        )
        .select_from(users.outerjoin(rankings, rankings.c.user_id == users.c.id))
        .group_by(users.c.id, users.c.name, users.c.kind, users.c.role, users.c.active)
        .order_by(users.c.kind, users.c.name)
    )  # fmt: skip
    return tuple(Person(**row) for row in tx.execute(query).mappings())
