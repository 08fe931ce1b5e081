"""Rankings made elsewhere, into the store.

Layouts, told apart row by row:
- groups: a prompt and `responses` with ranks (our own rankings.jsonl, with all that it holds)
- message trees of Open Assistant, nested or one message a row (see oasst.py)
- TRL preference: `prompt`, `chosen`, `rejected` as texts or messages; or without `prompt`
- hh-rlhf: `chosen` and `rejected` as "\\n\\nHuman: ... \\n\\nAssistant: ..."
- ShareGPT pairs: `conversations`, `chosen`, `rejected`; `chosen_messages`, `rejected_messages`
- llmbar: `input`, `output_1`, `output_2`, `label`

A row that cannot be used is counted by its reason. Unpaired labels (kto) are refused: a ranking
needs two responses to one prompt.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from labeling_ui.exporting import pseudonyms
from labeling_ui.forms import Form, Refused
from labeling_ui.layouts import Found, parse
from labeling_ui.oasst import expand
from labeling_ui.reading import rows_of
from labeling_ui.schema import assignments, rankings, tasks, users
from labeling_ui.store import Store, ensure_user, insert_new, log_event, task_row
from pipeline.formats import Unusable
from pipeline.records import Tally, canonical_json, content_id

NOBODY = "imported"
"""Annotator of rankings that do not say whose they are."""
_BATCH = 500


@dataclass
class Report:
    """What an import did. `kept`: (task, user) of every ranking that the sources hold."""

    tally: Tally = field(default_factory=Tally)
    notes: Counter[str] = field(default_factory=Counter)
    kept: set[tuple[str, int]] = field(default_factory=set)
    stored: int = 0
    """Rankings that were not in the store before."""

    def summary(self) -> str:
        parts = [self.tally.summary(), f"{self.stored} new in the store"]
        return "; ".join(
            parts + [f"{count} {note}" for note, count in self.notes.most_common() if count]
        )


def import_rankings(
    store: Store,
    given: Sequence[str],
    max_bad_fraction: float,
    by_hand: bool = False,
    dry_run: bool = False,
) -> Report:
    """Store every usable ranking of `given` (paths, or dataset ids on the hub).

    Importing the same again changes nothing. Nothing is stored when too many rows are unusable.

    Args:
        by_hand: came through `prefline labels import`; every later rank step counts it.
        dry_run: say what would happen, and store nothing.

    Raises:
        DataError: a source cannot be read, has no usable row, or too many unusable ones.
    """
    report = Report()
    for source in given:
        tally = Tally()
        for _ in found_in(source, tally, report.notes):
            pass
        tally.check(source, max_bad_fraction)
        report.tally.used += tally.used
        report.tally.reasons.update(tally.reasons)
        report.tally.first = {**tally.first, **report.tally.first}
    # read again: the rows of a large dataset need not fit into memory, and annotators who work
    # at the same time wait for one batch, not for all of it
    voices = _Voices(store)
    transaction: Callable[[], AbstractContextManager[Connection | None]]
    transaction = nullcontext if dry_run else store.write
    for source in given:
        rows = found_in(source, Tally(), Counter())
        while batch := list(islice(rows, _BATCH)):
            with transaction() as tx:
                _store_batch(tx, voices, batch, report, by_hand)
    if not dry_run:
        with store.write() as tx:
            log_event(tx, "import", None, None, rankings=len(report.kept), stored=report.stored)
    return report


def found_in(source: str, tally: Tally, notes: Counter[str]) -> Iterator[Found]:
    """The usable rankings of a source; the tally counts them and the others."""
    for where, row in expand(rows_of(source), tally, notes):
        try:
            found = parse(row)
        except Unusable as error:
            tally.drop(str(error), where)
            continue
        tally.use()
        yield found


# ---- whose ranking it is -------------------------------------------------------------------


class _Voices:
    """Which imported annotator a ranking belongs to, and what each has ranked already."""

    def __init__(self, store: Store) -> None:
        # our own export, read back: people are known by their pseudonyms, simulated by name
        name_of = pseudonyms(store)
        self.said: dict[tuple[str, int], str] = {}
        current = sa.select(rankings.c.task_id, rankings.c.user_id, rankings.c.ranks).where(
            rankings.c.superseded_by.is_(None), rankings.c.status == "ranked"
        )
        with store.read() as tx:
            others = tx.execute(sa.select(users).where(users.c.kind != "imported")).all()
            self._known = {name_of(row.kind, row.name): int(row.id) for row in others}
            imported = sa.select(users.c.name, users.c.id).where(users.c.kind == "imported")
            self._ids = {name: int(user) for name, user in tx.execute(imported)}
            for task, user, ranks in tx.execute(current):
                self.said[task, user] = ranks

    def of(self, tx: Connection | None, name: str | None, task: str, ranks: str) -> int:
        """User id for this ranking; without a transaction new users get a number below zero.

        Rankings that name nobody are told apart by what they say: a second, different order of
        the same responses must come from another annotator, or be a change of mind that we
        cannot see. Both are kept.
        """
        if name is not None and (task, self._known.get(name, -1)) in self.said:
            return self._known[name]
        number = 1
        while True:
            voice = (name or NOBODY) + (f"-{number}" if number > 1 else "")
            if voice not in self._ids:
                new = -len(self._ids) - 1
                self._ids[voice] = new if tx is None else ensure_user(tx, "imported", voice)
            user = self._ids[voice]
            if self.said.get((task, user), ranks) == ranks:
                return user
            number += 1


# ---- writing -------------------------------------------------------------------------------


def _store_batch(
    tx: Connection | None, voices: _Voices, batch: list[Found], report: Report, by_hand: bool
) -> None:
    """Four statements for the whole batch; ids of content make each idempotent. Without a
    transaction nothing is written."""
    now = time.time()
    task_rows, assignment_rows, ranking_rows = [], [], []
    for found in batch:
        order = sorted(range(len(found.responses)), key=found.response_id)
        responses = [found.responses[i] for i in order]
        ranks = canonical_json([found.ranks[i] for i in order])
        task = task_row(found.messages, responses, round=found.round, origin="import")
        report.notes.update(found.notes)
        user = voices.of(tx, found.annotator, task["id"], ranks)
        if (task["id"], user) in report.kept:
            report.notes["duplicate rankings merged"] += 1
            continue
        report.kept.add((task["id"], user))
        if len(set(found.ranks)) == 1:
            report.notes["rankings with all responses tied"] += 1
        if (task["id"], user) in voices.said and not by_hand:
            continue
        report.stored += (task["id"], user) not in voices.said
        voices.said[task["id"], user] = ranks
        assignment = content_id("assignment", task["id"], user)
        owner = {"task_id": task["id"], "user_id": user}
        task_rows.append(task)
        assignment_rows.append(
            {
                **owner,
                "id": assignment,
                "token": content_id("imported", assignment),
                "display_order": canonical_json(list(range(len(responses)))),
                "state": "ranked",
                "leased": now,
                "expires": now,
            }
        )
        ranking_rows.append(
            {
                **owner,
                "id": content_id("stored ranking", assignment, 1),
                "assignment_id": assignment,
                "revision": 1,
                "status": "ranked",
                "ranks": ranks,
                "source": f"import:{found.layout}",
                "by_hand": by_hand,
                "created": now,
                **_said(found, order, report.notes),
            }
        )
    if tx is None:
        return
    insert_new(tx, tasks, task_rows)
    insert_new(tx, assignments, assignment_rows)
    insert_new(tx, rankings, ranking_rows)
    if by_hand and ranking_rows:
        ids = [row["id"] for row in ranking_rows]
        tx.execute(sa.update(rankings).where(rankings.c.id.in_(ids)).values(by_hand=True))


def _said(found: Found, order: list[int], notes: Counter[str]) -> dict[str, Any]:
    """The other columns of a ranking of our own export; empty ones for any other."""
    count = len(order)
    try:
        form = Form.read({**found.said, "ranks": [None] * count}, count)
    except Refused:
        notes["rankings without their marks and comment, which cannot be read"] += 1
        form = Form.empty(count)
    marks = [form.to_json()["marks"][i] for i in order]
    is_marked = any(mark["score"] is not None or mark["flags"] for mark in marks)
    return {
        "marks": canonical_json(marks) if is_marked else None,
        "all_bad": form.all_bad,
        "comment": form.comment or None,
        "confidence": form.confidence,
        "ideal": form.ideal or None,
    }
