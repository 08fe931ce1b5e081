"""Rankings in and out of a run, by hand.

    python -m labeling_ui.labels RUN import PATH [PATH ...] [--max-bad-fraction 0.1]
    python -m labeling_ui.labels RUN export --to FILE [--format rankings|pairs|parquet]
    python -m labeling_ui.labels RUN stats
    python -m labeling_ui.labels RUN backup --to FILE
    python -m labeling_ui.labels RUN forget ANNOTATOR

Imported rankings count in every later rank step. `forget` removes a person's rankings, drafts and
account for good; artifacts that were published before are immutable and are named.
"""

# ruff: noqa: T201 - a command: its results go to stdout
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from labeling_ui.exporting import FORMATS, pseudonyms, snapshot, write_export
from labeling_ui.importing import import_rankings
from labeling_ui.progress import tell_progress
from labeling_ui.schema import (
    assignments,
    count_filled,
    login_failures,
    rankings,
    tasks,
    users,
)
from labeling_ui.store import Store, log_event, open_run_store
from pipeline.config import load_settings
from pipeline.errors import EXIT_DONE, DataError, ToolkitError
from pipeline.settings import Settings


def stats(store: Store) -> dict[str, Any]:
    """What the store holds, in numbers."""
    with store.read() as tx:

        def count(table: sa.FromClause, *where: Any) -> int:
            return int(
                tx.execute(sa.select(sa.func.count()).select_from(table).where(*where)).scalar_one()
            )

        current = rankings.c.superseded_by.is_(None)
        per_annotator = tx.execute(
            sa.select(users.c.kind, users.c.name, rankings.c.status, sa.func.count())
            .select_from(rankings.join(users))
            .where(current)
            .group_by(users.c.kind, users.c.name, rankings.c.status)
            .order_by(users.c.kind, users.c.name, rankings.c.status)
        ).all()
        return {
            "prompts": count(tasks),
            "prompts_in_queue": count(tasks, tasks.c.active, tasks.c.step.is_not(None)),
            "rankings": count(rankings, current, rankings.c.status == "ranked"),
            "skipped": count(rankings, current, rankings.c.status == "skipped"),
            "late": count(rankings, current, rankings.c.late),
            "revised": count(rankings, ~current),
            "annotators": [
                {"kind": kind, "name": name, status: number}
                for kind, name, status, number in per_annotator
            ],
        }


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
            count_filled(tx, tasks.c.id.in_(touched))
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prefline labels", description="Rankings in and out.")
    parser.add_argument("run", type=Path, help="run directory")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import", help="rankings made elsewhere, into the store")
    command.add_argument("sources", nargs="+", metavar="PATH")
    command.add_argument("--max-bad-fraction", type=float, help="default: rank.max_bad_fraction")
    command = commands.add_parser("export", help="every valid ranking, to one file")
    command.add_argument("--to", type=Path, required=True, metavar="FILE")
    command.add_argument("--format", choices=FORMATS, default="rankings")
    commands.add_parser("stats", help="what the store holds, as JSON")
    command = commands.add_parser("backup", help="a consistent copy of the store")
    command.add_argument("--to", type=Path, required=True, metavar="FILE")
    command = commands.add_parser("forget", help="remove an annotator and all their rankings")
    command.add_argument("annotator")
    try:
        _run(parser.parse_args(arguments))
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def _run(given: argparse.Namespace) -> None:
    store = open_run_store(given.run)
    rank = load_settings(Settings, given.run / "config.yaml").rank
    if given.command == "import":
        bad = given.max_bad_fraction
        limit = rank.max_bad_fraction if bad is None else bad
        print(import_rankings(store, given.sources, limit, by_hand=True).summary())
        tell_progress(given.run, store)
    elif given.command == "export":
        if not given.to.parent.is_dir():
            raise DataError(f"{given.to.parent}: no such folder")
        rows = snapshot(store, rank.heldout_fraction)
        count = write_export(rows, given.to, given.format)
        print(f"{len(rows)} rankings, {count} rows: {given.to}")
    elif given.command == "stats":
        print(json.dumps(stats(store), indent=1, ensure_ascii=False))
    elif given.command == "backup":
        store.backup(given.to)
        print(f"{store.name}: copied to {given.to}")
    else:
        gone = forget(store, given.annotator)
        tell_progress(given.run, store)
        print(f"{gone} rankings and the account are gone from {store.name}.")
        print(
            "Published artifacts are immutable: those under"
            f" {given.run}/rank*/ may still hold them under a pseudonym. Delete these folders and"
            " run again to be rid of them.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
