"""The queue of a step of the line: its tasks take the place of those of before, and people are waited for.

The rank step asks for rankings of sampled responses, the judge step for comparisons of models. Only
one of them asks at a time; the standing queues stay open beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from labeling_ui.administration import queue_values
from labeling_ui.progress import write_progress
from labeling_ui.schema import queues, tasks
from labeling_ui.store import EXTRA, WRITE, Store, insert_new, log_event
from pipeline.errors import PeopleNeeded
from pipeline.job import Out


def fill_queue(
    store: Store,
    step: str,
    configured: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    digest: str,
) -> None:
    """Open the queue of `step` with these tasks and no others; doing it again changes nothing.

    Args:
        configured: columns of the queue, as the settings want them. What the lead has set in the
            app since stays.
        rows: tasks.
        digest: of the artifact that they are made from, for the audit log.
    """
    with store.write() as tx:
        values = queue_values(tx, step, configured) | {"open": True}
        insert_new(tx, queues, [{"step": step, **configured, "open": True}])
        # what a step before asked for is not what people should look at now
        others = queues.c.step.not_in((step, EXTRA, WRITE))
        tx.execute(sa.update(queues).where(others).values(open=False))
        tx.execute(sa.update(queues).where(queues.c.step == step).values(**values))
        # tasks of other settings stay in the store, but nobody is asked about them any more
        tx.execute(sa.update(tasks).where(tasks.c.step == step).values(active=False))
        insert_new(tx, tasks, rows)
        wake = sa.update(tasks).where(tasks.c.id == sa.bindparam("task"))
        wake = wake.values(step=step, origin=sa.bindparam("from"), active=True)
        tx.execute(wake, [{"task": row["id"], "from": row["origin"]} for row in rows])
        log_event(tx, "queue", step=step, tasks=len(rows), origin=digest, config=configured)


def wait_for_people(store: Store, out: Out, what: str) -> None:
    """Go on when enough answers are in; `what` they are called.

    Raises:
        PeopleNeeded: with how many there are and how many it takes.
    """
    have, need = write_progress(out.run_dir, store, out.step)
    if have < need:
        raise PeopleNeeded(f"{out.step}: waiting for people: {have} of {need} {what}")
