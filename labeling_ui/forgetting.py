"""A person taken out of the label store for good."""

from __future__ import annotations

import sqlalchemy as sa

from labeling_ui.exporting import pseudonyms
from labeling_ui.schema import assignments, count_filled, login_failures, rankings, tasks, users
from labeling_ui.store import Store, log_event
from pipeline.errors import DataError


def shown_as(store: Store, name: str) -> set[str]:
    """The names under which files show the people whom `forget` would remove."""
    shown = pseudonyms(store)
    with store.read() as tx:
        people = tx.execute(sa.select(users).where(users.c.kind != "simulated")).all()
    names = {(row.name, shown(row.kind, row.name)) for row in people}
    return {pseudonym for own, pseudonym in names if name in (own, pseudonym)}


def forget(store: Store, name: str) -> int:
    """Remove a person for good, by name or pseudonym; the number of rankings that went with them."""
    shown = pseudonyms(store)
    with store.write() as tx:
        people = tx.execute(sa.select(users).where(users.c.kind != "simulated")).all()
        fits = [row for row in people if name in (row.name, shown(row.kind, row.name))]
        if not fits:
            raise DataError(f"there is no annotator {name!r}", "See: prefline labels RUN stats")
        gone = 0
        for row in fits:
            mine = rankings.c.user_id == row.id
            touched = list(
                tx.execute(
                    sa.select(assignments.c.task_id).where(assignments.c.user_id == row.id)
                ).scalars()
            )
            gone += tx.execute(sa.delete(rankings).where(mine)).rowcount
            tx.execute(sa.delete(assignments).where(assignments.c.user_id == row.id))
            # repeats were made for this person alone
            tx.execute(sa.delete(tasks).where(tasks.c.for_user == row.id))
            # a database takes only so many values in one question
            for start in range(0, len(touched), 500):
                count_filled(tx, tasks.c.id.in_(touched[start : start + 500]))
            tx.execute(sa.delete(users).where(users.c.id == row.id))
            tx.execute(
                sa.delete(login_failures).where(
                    login_failures.c.key.startswith(f"{row.name}|", autoescape=True)
                    | (login_failures.c.key == f"name:{row.name}")
                )
            )
            log_event(tx, "forgotten", row.id, None, rankings=gone)
    if store.is_sqlite:
        # the log beside the file still holds the old pages until it is written back
        with store.engine.connect() as connection:
            connection.connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return gone
