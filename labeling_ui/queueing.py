"""Work for people that no rank step made: responses to rank, prompts to answer, known answers.

It waits in the standing queues `extra` and `write` of the store and is handed out beside that of the
rank steps; `tasks.origin` is `hand`, or `chat` for a comparison saved in the playground. Known answers
(gold) wait in no queue: they come in between, at the rate of the queue. Ids are hashes of content, so
the same source twice queues nothing twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from labeling_ui.candidates import (
    QUEUES,
    Candidates,
    Kind,
    merged,
    to_gold,
    to_rank,
    to_task,
    to_write,
)
from labeling_ui.gold import put_gold
from labeling_ui.oasst import expand
from labeling_ui.reading import rows_of
from labeling_ui.schema import queues, tasks
from labeling_ui.store import EXTRA, Store, insert_new, log_event
from pipeline.formats import Unusable
from pipeline.records import Tally

_BATCH = 500
_LEASE_MINUTES = 30


@dataclass
class Queued:
    """What was queued. new: tasks; notes: what else there is to say, counted; tally: rows."""

    kind: Kind
    tally: Tally = field(default_factory=Tally)
    notes: Counter[str] = field(default_factory=Counter)
    new: int = 0

    def lines(self) -> list[str]:
        """The report for people: what is new, and every reason with its first place."""
        what = {"rank": "prompts to rank", "write": "prompts to answer", "gold": "known answers"}
        lines = [f"{self.new} new {what[self.kind]}, from {self.tally.used} usable rows"]
        lines += [f"  {count} {note}" for note, count in self.notes.most_common() if count]
        lines += [
            f"  {count} rows left out: {reason} (first: {self.tally.first[reason]})"
            for reason, count in self.tally.reasons.most_common()
        ]
        return lines


def queue(
    store: Store,
    sources: Sequence[str],
    kind: Kind,
    max_bad_fraction: float,
    *,
    overlap: int | None = None,
    first_overlap: int = 1,
    lease_minutes: int = _LEASE_MINUTES,
    dry_run: bool = False,
) -> Queued:
    """Queue the rows of `sources` for people.

    Args:
        kind: rank: responses to rank. write: prompts to answer. gold: rankings that are known.
        overlap: different people per prompt; None leaves that of the queue.
        first_overlap: where the queue is new and `overlap` is None.
        dry_run: say what would happen, and store nothing.

    Raises:
        DataError: a source cannot be read, or has too many unusable rows; nothing is queued.
    """
    report = Queued(kind)
    seen: Counter[str] = Counter()
    for source in sources:
        tally = Tally()
        seen.update(row.prompt_id for row in _candidates(source, kind, tally, report.notes))
        tally.check(source, max_bad_fraction)
        report.tally.used += tally.used
        report.tally.reasons.update(tally.reasons)
        report.tally.first = {**tally.first, **report.tally.first}
    # read again: the rows of a large source need not fit into memory
    again: Iterator[Candidates] = (
        row for source in sources for row in _candidates(source, kind, Tally(), Counter())
    )
    if kind != "gold":
        report.notes["rows of one prompt merged"] += sum(n - 1 for n in seen.values())
        again = merged(again, seen, report.notes)
    rows = (to_task(row, kind, report.notes) for row in again)
    step = QUEUES[kind]
    if step is not None and not dry_run:
        _open(store, step, overlap, first_overlap, lease_minutes)
    while batch := list(islice(rows, _BATCH)):
        put = _put_gold if kind == "gold" else _queue_batch
        with store.read() if dry_run else store.write() as tx:
            put(tx, batch, report, dry_run)
    if not dry_run:
        with store.write() as tx:
            log_event(tx, "queue", None, None, step=step or kind, tasks=report.new, origin="hand")
    return report


def queue_row(store: Store, found: Candidates, origin: str, detail: dict[str, Any]) -> bool:
    """Queue one prompt with responses for people; whether it was not there yet.

    origin: where it comes from. detail: for the audit log.
    """
    report = Queued("rank")
    row = to_task(found, "rank", report.notes, origin)
    _open(store, EXTRA, None, 1, _LEASE_MINUTES)
    with store.write() as tx:
        _queue_batch(tx, [row], report, dry_run=False)
        if report.new:
            log_event(tx, "queue", None, row["id"], step=EXTRA, tasks=1, origin=origin, **detail)
    return bool(report.new)


# ---- parts ---------------------------------------------------------------------------------


def _candidates(source: str, kind: Kind, tally: Tally, notes: Counter[str]) -> Iterator[Candidates]:
    rows = rows_of(source, "prompts")
    for where, row in expand(rows, tally, notes) if kind == "gold" else rows:
        try:
            if kind == "write":
                found = to_write(row)
            elif kind == "gold":
                found = to_gold(row)
            else:
                found = to_rank(row, notes)
        except Unusable as error:
            tally.drop(str(error), where)
            continue
        tally.use()
        yield found


def _open(store: Store, step: str, overlap: int | None, first: int, lease_minutes: int) -> None:
    row = {"step": step, "by": "people", "lease_minutes": lease_minutes, "open": True}
    change = {"open": True} | ({} if overlap is None else {"overlap": overlap})
    with store.write() as tx:
        insert_new(tx, queues, [{**row, "overlap": overlap or first}])
        tx.execute(sa.update(queues).where(queues.c.step == step).values(**change))


def _put_gold(tx: Connection, batch: list[dict[str, Any]], report: Queued, dry_run: bool) -> None:
    rows = {row["id"]: row for row in batch}
    report.notes["equal known answers merged"] += len(batch) - len(rows)
    for row in rows.values():
        done = put_gold(tx, None, row, dry_run)
        report.new += done == "new"
        report.notes["there already"] += done == "unchanged"
        report.notes["there already with other ranks: replaced"] += done == "changed"


def _queue_batch(
    tx: Connection, batch: list[dict[str, Any]], report: Queued, dry_run: bool
) -> None:
    step = QUEUES[report.kind]
    ids = [row["id"] for row in batch]
    query = sa.select(tasks.c.id, tasks.c.step).where(tasks.c.id.in_(ids))
    there = {row.id: row for row in tx.execute(query)}
    new, woken = {}, []
    for row in batch:
        old = there.get(row["id"])
        if old is None:
            new[row["id"]] = row
        elif old.step == step:
            report.notes["there already"] += 1
        elif old.step is None:
            # ranked elsewhere and imported; now people rank it here
            woken.append(row["id"])
        else:
            report.notes[f"left where they are: in the queue of {old.step}"] += 1
    report.new += len(new) + len(woken)
    if dry_run:
        return
    insert_new(tx, tasks, list(new.values()))
    columns = {"step": step, "active": True}
    tx.execute(sa.update(tasks).where(tasks.c.id.in_(woken)).values(**columns))
