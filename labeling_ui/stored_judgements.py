"""The rankings of a store as plain values, for the statistics of agreement.py and quality.py.

What counts: rankings and skips that were not superseded, not late, and of tasks that are in use.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from labeling_ui.judgements import Judgement, Task
from labeling_ui.schema import assignments, rankings, tasks, users

_CHUNK = 500


class Judgements:
    """Reads judgements again and again; what never changes of a task is read once."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}

    def read(self, tx: Connection) -> list[Judgement]:
        """Everything that counts. An annotator is the text of their user id."""
        rows = tx.execute(_COUNTED).all()
        self._read_tasks(tx, {self._id(row) for row in rows} - self._tasks.keys())
        return [self._judgement(row) for row in rows]

    def _judgement(self, row: Any) -> Judgement:
        task = self._tasks[self._id(row)]
        if row.gold is not None:
            task = Task(task.id, task.prompt_id, task.lengths, tuple(json.loads(row.gold)))
        return Judgement(
            task=task,
            annotator=str(row.user_id),
            ranks=tuple(json.loads(row.ranks)) if row.status == "ranked" else None,
            # nobody knows how imported responses were shown
            shown=tuple(json.loads(row.display_order)) if row.annotator != "imported" else None,
            active_seconds=row.active_seconds,
            repeat=row.kind == "repeat",
        )

    @staticmethod
    def _id(row: Any) -> str:
        """The task that was judged: a repeat judges the one that it repeats."""
        return str(row.repeat_of if row.kind == "repeat" else row.task_id)

    def _read_tasks(self, tx: Connection, wanted: set[str]) -> None:
        columns = sa.select(tasks.c.id, tasks.c.prompt_id, tasks.c.responses)
        for some in _chunks(sorted(wanted)):
            for task, prompt, responses in tx.execute(columns.where(tasks.c.id.in_(some))):
                lengths = tuple(len(text) for text in json.loads(responses))
                self._tasks[task] = Task(task, prompt, lengths)


def _chunks(keys: Iterable[str]) -> Iterator[list[str]]:
    """A database takes only so many values in one question."""
    rest = iter(keys)
    while some := list(islice(rest, _CHUNK)):
        yield some


_COUNTED = (
    sa.select(
        rankings.c.task_id,
        rankings.c.user_id,
        rankings.c.status,
        rankings.c.ranks,
        rankings.c.active_seconds,
        assignments.c.display_order,
        tasks.c.kind,
        tasks.c.repeat_of,
        tasks.c.gold,
        users.c.kind.label("annotator"),
    )
    .select_from(
        rankings.join(assignments, assignments.c.id == rankings.c.assignment_id)
        .join(tasks, tasks.c.id == rankings.c.task_id)
        .join(users, users.c.id == rankings.c.user_id)
    )
    .where(rankings.c.superseded_by.is_(None), ~rankings.c.late, tasks.c.active)
    .where(tasks.c.kind.in_(("rank", "gold", "repeat")))
    .where(rankings.c.status.in_(("ranked", "skipped")))
)
