"""What a label store holds, in numbers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from labeling_ui.schema import queues, rankings, tasks, users
from labeling_ui.store import Store


def stats(store: Store) -> dict[str, Any]:
    """Totals, then by queue, by annotator, and what does not count by reason.

    Names are those of the accounts: this is for the lead, not for publication.
    """
    current = rankings.c.superseded_by.is_(None)
    with store.read() as tx:
        return {
            "prompts": _count(tx, tasks),
            "prompts_in_queue": _count(tx, tasks, tasks.c.active, tasks.c.step.is_not(None)),
            "known_answers": _count(tx, tasks, tasks.c.kind == "gold"),
            "rankings": _count(tx, rankings, current, rankings.c.status == "ranked"),
            "written": _count(tx, rankings, current, rankings.c.status == "written"),
            "ideal_answers": _count(
                tx, rankings, current, rankings.c.ideal.is_not(None),
                rankings.c.status != "written",
            ),
            "skipped": _count(tx, rankings, current, rankings.c.status == "skipped"),
            "late": _count(tx, rankings, current, rankings.c.late),
            "revised": _count(tx, rankings, ~current),
            "queues": _queues(tx),
            "left_out": _left_out(tx),
            "warnings": _count(tx, tasks, tasks.c.warnings.is_not(None)),
            "annotators": _annotators(tx),
        }  # fmt: skip


def _count(tx: Connection, table: sa.FromClause, *where: Any) -> int:
    query = sa.select(sa.func.count()).select_from(table).where(*where)
    return int(tx.execute(query).scalar_one())


def _queues(tx: Connection) -> list[dict[str, Any]]:
    """Each queue: its prompts, how many are full, how many places are filled of those wanted."""
    full = sa.case((tasks.c.filled >= queues.c.overlap, 1), else_=0)
    counted = {
        row.step: row
        for row in tx.execute(
            sa.select(
                tasks.c.step,
                sa.func.count().label("prompts"),
                sa.func.sum(full).label("full"),
                sa.func.sum(tasks.c.filled).label("filled"),
            )
            .join(queues, queues.c.step == tasks.c.step)
            .where(tasks.c.active)
            .group_by(tasks.c.step)
        )
    }
    found = []
    for queue in tx.execute(sa.select(queues).order_by(queues.c.step)):
        row = counted.get(queue.step)
        prompts = row.prompts if row else 0
        state = "frozen" if queue.frozen else "open" if queue.open else "closed"
        found.append(
            {
                "queue": queue.step,
                "by": queue.by,
                "state": state,
                "overlap": queue.overlap,
                "prompts": prompts,
                "prompts_full": int(row.full) if row else 0,
                "places_filled": int(row.filled) if row else 0,
                "places": queue.overlap * prompts,
            }
        )
    return found


def _left_out(tx: Connection) -> dict[str, Any]:
    """Answers that are no ranking that counts; those skipped by the reason given."""
    current = rankings.c.superseded_by.is_(None)
    skipped = tx.execute(
        sa.select(rankings.c.reason, sa.func.count())
        .where(current, rankings.c.status == "skipped")
        .group_by(rankings.c.reason)
        .order_by(rankings.c.reason)
    ).all()
    kinds = tx.execute(
        sa.select(tasks.c.kind, sa.func.count())
        .select_from(rankings.join(tasks, tasks.c.id == rankings.c.task_id))
        .where(current, rankings.c.status == "ranked", tasks.c.kind.in_(("gold", "repeat")))
        .group_by(tasks.c.kind)
        .order_by(tasks.c.kind)
    ).all()
    return {
        "superseded": _count(tx, rankings, ~current),
        "late": _count(tx, rankings, current, rankings.c.late),
        "all_bad": _count(tx, rankings, current, rankings.c.status == "all_bad"),
        "skipped": {str(reason): number for reason, number in skipped},
        **{str(kind): number for kind, number in kinds},
    }


def _annotators(tx: Connection) -> list[dict[str, Any]]:
    rows = tx.execute(
        sa.select(users.c.kind, users.c.name, rankings.c.status, sa.func.count())
        .select_from(rankings.join(users))
        .where(rankings.c.superseded_by.is_(None))
        .group_by(users.c.kind, users.c.name, rankings.c.status)
        .order_by(users.c.kind, users.c.name, rankings.c.status)
    ).all()
    found: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for kind, name, status, number in rows:
        found[kind, name] |= {"kind": kind, "name": name, status: number}
    return list(found.values())
