"""What a label store holds, in numbers: each is defined here and nowhere else.

The lead's page, `prefline labels RUN stats` and the line that waits for people all read these.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from labeling_ui.handout import KINDS
from labeling_ui.pace import Lease, Pace, Times, leases, pace, times
from labeling_ui.schema import assignments, events, queues, rankings, tasks, users
from labeling_ui.store import EXTRA


@dataclass(frozen=True)
class Queue:
    """A queue and how far it is. Of its tasks those count that are in use.

    A place is one person's answer to one task; `overlap` of each task are wanted, and what goes beyond
    is not counted.
    """

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
    begun: int
    """Tasks that somebody has finished or works on, but not all who should."""
    wanted: int
    """Places: overlap x tasks."""
    filled: int
    unrankable: int
    """Filled places without a ranking: people found nothing to rank there."""

    @property
    def rankings(self) -> int:
        return self.filled - self.unrankable

    @property
    def needed(self) -> int:
        """Rankings that it takes for the line to go on."""
        possible = self.wanted - self.unrankable
        # a minimum that the prompts cannot give would keep the line waiting for ever
        return possible if self.minimum is None else min(self.minimum, possible)


@dataclass(frozen=True)
class Person:
    """Anybody who may rank: a person, or a simulated or imported annotator."""

    id: int
    name: str
    kind: str
    role: str
    active: bool
    last_label: float | None
    rankings: int = 0
    """That a reward model may learn from."""
    written: int = 0
    skipped: int = 0
    all_bad: int = 0
    """Prompts without one good response, in their opinion."""

    @property
    def skip_rate(self) -> float:
        return self.skipped / max(1, self.rankings + self.skipped)


@dataclass(frozen=True)
class Counts:
    prompts: int
    """To rank or to answer, in use or not."""
    gold_items: int
    """Known answers in use."""
    warned: int
    """Tasks with a warning of their import."""
    rankings: int
    """That a reward model may learn from."""
    written: int
    """Answers that people wrote to prompts without responses."""
    left_out: dict[str, int]
    """All other stored answers, each under one reason; a reason of skipping behind a colon."""
    queues: tuple[Queue, ...]
    people: tuple[Person, ...]
    pace: Pace
    times: Times
    leases: tuple[Lease, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def count(tx: Connection, now: float) -> Counts:
    """All of it, in the transaction of the caller."""
    uses = _uses(tx)
    total: Counter[str] = sum(uses.values(), Counter())
    is_gold = (tasks.c.kind == "gold") & tasks.c.active
    number = tx.execute(
        sa.select(
            sa.func.count().filter(tasks.c.kind.in_(KINDS)).label("prompts"),
            sa.func.count().filter(is_gold).label("gold"),
            sa.func.count(tasks.c.warnings).label("warned"),
        )
    ).one()
    return Counts(
        prompts=number.prompts,
        gold_items=number.gold,
        warned=number.warned,
        rankings=total.pop("ranked", 0),
        written=total.pop("written", 0),
        left_out=dict(total.most_common()),
        queues=queue_counts(tx, now),
        people=_people(tx, uses),
        pace=pace(tx, now),
        times=times(tx),
        leases=leases(tx, now),
    )


# ---- what becomes of an answer -------------------------------------------------------------


def why_left_out(status: str, task_kind: str, superseded: bool, late: bool) -> str | None:
    """Why nothing is learned from an answer; None where something is: a ranking, or a text."""
    if superseded:
        return "superseded"
    if status in ("skipped", "all_bad"):
        return status
    # known answers and repeats measure annotators, judgements measure models: they teach nothing
    if task_kind in ("gold", "repeat", "judge"):
        return task_kind
    return "late" if late else None


_TEACHES = (rankings.c.status == "ranked") & ~rankings.c.late & (tasks.c.kind == "rank")
"""`why_left_out` of a ranking for the database, but for what was changed later."""


def labels(tx: Connection, step: str) -> dict[str, int]:
    """How many rankings an export of this step would hold by people or by hand, and how many rows
    they have had: with a change of mind there are more of these. Written down with every export, so
    that labels which came afterwards are noticed.
    """
    by_person = (users.c.kind == "person") & tasks.c.active
    here = by_person & (tasks.c.step == step)
    elsewhere = rankings.c.by_hand | (by_person & (tasks.c.step == EXTRA))
    by_people = tx.execute(sa.select(queues.c.by).where(queues.c.step == step)).scalar()
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
        .where(_TEACHES, elsewhere | here if by_people == "people" else elsewhere)
    )
    row = tx.execute(query).one()
    found = {"rankings": int(row.rankings), "rows": int(row.rows)}
    # others may have ranked as much since: the counts alone would look as they did before
    forgotten = sa.select(sa.func.count()).where(events.c.kind == "forgotten")
    if people := tx.execute(forgotten.select_from(events)).scalar_one():
        found["forgotten"] = int(people)
    return found


def _uses(tx: Connection) -> dict[int, Counter[str]]:
    """What became of each person's answers: each answer under one word, by user id."""
    old = rankings.c.superseded_by.is_not(None).label("old")
    group: list[Any] = [rankings.c.user_id, rankings.c.status, rankings.c.reason, rankings.c.late]
    group += [old, tasks.c.kind, tasks.c.active]
    query = sa.select(*group, sa.func.count().label("answers"))
    uses: dict[int, Counter[str]] = {}
    for row in tx.execute(query.select_from(rankings.join(tasks)).group_by(*group)):
        uses.setdefault(row.user_id, Counter())[_use(row)] += row.answers
    return uses


def _use(row: Any) -> str:
    reason = why_left_out(row.status, row.kind, bool(row.old), row.late)
    if reason == "skipped":
        return f"skipped: {row.reason}"
    # samples of other settings came later, and people are asked about those
    return reason or (str(row.status) if row.active else "out of use")


# ---- queues --------------------------------------------------------------------------------


def queue_counts(tx: Connection, now: float, step: str | None = None) -> tuple[Queue, ...]:
    """All queues, open ones first, or the one of `step`, if there is one."""
    query = sa.select(queues).order_by(queues.c.open.desc(), queues.c.step)
    if step is not None:
        query = query.where(queues.c.step == step)
    found = []
    for row in tx.execute(query).mappings():
        values = dict(row) | _places(tx, row["step"], row["overlap"], now)
        if values["by"] == "simulated":
            values |= _simulated(tx, values["step"], values["overlap"])
        found.append(Queue(**values, wanted=values["overlap"] * values["tasks"]))
    return tuple(found)


def _places(tx: Connection, step: str, overlap: int, now: float) -> dict[str, int]:
    """How far the tasks of a queue are; with a million of them only an index is read."""
    used = (tasks.c.step == step) & tasks.c.active & tasks.c.kind.in_(KINDS)
    by_filled = tx.execute(
        sa.select(tasks.c.filled, sa.func.count()).where(used).group_by(tasks.c.filled)
    ).all()
    # what nobody has finished yet is begun where somebody holds a lease, and these are few
    leased = tx.execute(
        sa.select(sa.func.count(sa.distinct(tasks.c.id)))
        .select_from(assignments.join(tasks))
        .where(assignments.c.state == "leased", assignments.c.expires > now)
        .where(used, tasks.c.filled == 0)
    ).scalar_one()
    # a simulated annotator fills no place
    unrankable = (
        sa.select(tasks.c.filled, sa.func.count().label("answers"))
        .select_from(assignments.join(tasks).join(users, users.c.id == assignments.c.user_id))
        .where(assignments.c.state == "unrankable", users.c.kind == "person", used)
        .group_by(tasks.c.id, tasks.c.filled)
    )
    return {
        "tasks": sum(count for _, count in by_filled),
        "finished": sum(count for filled, count in by_filled if filled >= overlap),
        "begun": sum(count for filled, count in by_filled if 0 < filled < overlap) + leased,
        "filled": sum(count * min(overlap, filled) for filled, count in by_filled),
        "unrankable": sum(
            min(overlap, filled) - min(overlap, filled - answers)
            for filled, answers in tx.execute(unrankable)
        ),
    }


def _simulated(tx: Connection, step: str, overlap: int) -> dict[str, int]:
    """Their answers fill no places of people: counted by themselves."""
    done = (
        sa.select(sa.func.count().label("answers"))
        .select_from(assignments.join(tasks))
        .where(tasks.c.step == step, tasks.c.active, assignments.c.state == "ranked")
        .group_by(tasks.c.id)
    )
    answers = [min(overlap, count) for count in tx.execute(done).scalars()]
    full = sum(count == overlap for count in answers)
    return {"filled": sum(answers), "finished": full, "begun": len(answers) - full}


# ---- people --------------------------------------------------------------------------------


def _people(tx: Connection, uses: dict[int, Counter[str]]) -> tuple[Person, ...]:
    query = (
        sa.select(
            users.c.id, users.c.name, users.c.kind, users.c.role, users.c.active,
            sa.func.max(rankings.c.created).label("last_label"),
        )
        .select_from(users.outerjoin(rankings, rankings.c.user_id == users.c.id))
        .group_by(users.c.id, users.c.name, users.c.kind, users.c.role, users.c.active)
        .order_by(users.c.kind, users.c.name)
    )  # fmt: skip
    found = []
    for row in tx.execute(query).mappings():
        own = uses.get(row["id"], Counter())
        skipped = sum(number for use, number in own.items() if use.startswith("skipped"))
        found.append(
            Person(
                **row,
                rankings=own["ranked"],
                written=own["written"],
                skipped=skipped,
                all_bad=own["all_bad"],
            )
        )
    return tuple(found)
