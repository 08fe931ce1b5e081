"""How fast people work, how long a prompt takes them, and what they work on now."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from labeling_ui.schema import assignments, rankings, tasks, users

_HOURS, _DAYS = 48, 60
PERCENTILES = (10, 25, 50, 75, 90)


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


def pace(tx: Connection, now: float) -> Pace:
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


def times(tx: Connection) -> Times:
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


def human_minutes(tx: Connection, step: str) -> float:
    """Minutes that people have spent on a step's queue with the page in front, changes and skips
    included."""
    query = (
        sa.select(sa.func.sum(rankings.c.active_seconds))
        .select_from(rankings.join(tasks, tasks.c.id == rankings.c.task_id))
        .where(tasks.c.step == step, rankings.c.source == "app")
    )
    return float(tx.execute(query).scalar() or 0.0) / 60


def leases(tx: Connection, now: float, most: int = 200) -> tuple[Lease, ...]:
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
