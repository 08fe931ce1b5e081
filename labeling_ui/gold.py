"""Prompts whose order is known: made from a task of the store or read from a file, never exported.

They look like all others to those who rank them. How a person orders them says how far their other
answers can be trusted. Answers are always scored by the ranks that stand here now, so a mistake that
is corrected is corrected for everybody.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from labeling_ui.administration import acting
from labeling_ui.candidates import to_gold, to_task
from labeling_ui.forms import MAX_RESPONSES, Refused, dense
from labeling_ui.schema import lot, tasks
from labeling_ui.store import Store, gold_id, insert_new, log_event
from pipeline.formats import Unusable
from pipeline.records import canonical_json


@dataclass
class Imported:
    """What an import of known answers did; stored: new, or with other ranks than before."""

    stored: int = 0
    unchanged: int = 0
    refused: list[str] = field(default_factory=list)
    """line and reason of each row that could not be used."""

    def summary(self) -> str:
        said = f"{self.stored} stored, {self.unchanged} were there already"
        if self.refused:
            said += f", {len(self.refused)} refused"
        return "; ".join([said, *self.refused[:5]])


def make_gold(store: Store, user_id: int, task: str, ranks: Sequence[object]) -> str:
    """Copy a task as a known answer with these ranks (by stored place); id of the copy.

    Choose tasks that are finished: whoever may still rank the original would see it twice.
    """
    with acting(store, user_id) as tx:
        query = sa.select(tasks).where(tasks.c.id == task, tasks.c.kind == "rank")
        found = tx.execute(query).mappings().first()
        if found is None:
            raise Refused("Choose a prompt with responses that people rank.")
        responses = json.loads(found["responses"])
        copy = gold_id(found["prompt_id"], responses)
        gold = canonical_json(_ranks(ranks, len(responses)))
        # repeat_of leads back to the original
        row = {**found, "id": copy, "kind": "gold", "gold": gold, "origin": "lead"}
        row |= {"step": None, "repeat_of": task, "lot": lot(copy), "filled": 0}
        row |= {"active": True, "priority": 0.0, "selection_probability": None}
        put_gold(tx, user_id, row)
        return copy


def import_gold(store: Store, user_id: int, text: str) -> Imported:
    """Known answers from JSONL, a row each: a ranking in any layout of `labeling_ui.layouts`."""
    report = Imported()
    with acting(store, user_id) as tx:
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = to_task(to_gold(_parsed(line)), "gold", Counter())
            except Unusable as error:
                report.refused.append(f"line {number}: {error}")
                continue
            done = put_gold(tx, user_id, row)
            report.stored += done != "unchanged"
            report.unchanged += done == "unchanged"
    if not (report.stored or report.unchanged or report.refused):
        raise Refused("There is no row: write one JSON object on each line.")
    return report


def put_gold(
    tx: Connection, user_id: int | None, row: Mapping[str, Any], dry_run: bool = False
) -> Literal["new", "changed", "unchanged"]:
    """Store a row of `tasks` of the kind gold, and what that did. The same row again changes nothing;
    other ranks for the same responses replace those that were there, and a retired one is used again.

    Args:
        user_id: the lead who wants it; None for the command line.
    """
    task, gold = row["id"], row["gold"]
    before = tx.execute(sa.select(tasks.c.gold, tasks.c.active).where(tasks.c.id == task)).first()
    if before is not None and before.gold == gold and before.active:
        return "unchanged"
    if not dry_run:
        insert_new(tx, tasks, [row])
        tx.execute(sa.update(tasks).where(tasks.c.id == task).values(gold=gold, active=True))
        old = json.loads(before.gold) if before is not None else None
        log_event(tx, "gold", user_id, task, ranks=[old, json.loads(gold)])
    return "new" if before is None else "changed"


def retire_gold(store: Store, user_id: int, task: str, active: bool = False) -> bool:
    """Hand a known answer out no more (or again); answers to a retired one count for nobody."""
    with acting(store, user_id) as tx:
        query = sa.select(tasks.c.active).where(tasks.c.id == task, tasks.c.kind == "gold")
        was = tx.execute(query).scalar()
        if was is None:
            raise Refused("This is no known answer.")
        if bool(was) == active:
            return False
        tx.execute(sa.update(tasks).where(tasks.c.id == task).values(active=active))
        log_event(tx, "gold used again" if active else "gold retired", user_id, task)
        return True


# ---- parts ---------------------------------------------------------------------------------


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise Unusable("this is no JSON") from None


def _ranks(ranks: Sequence[object], count: int) -> list[int]:
    whole = [rank for rank in ranks if type(rank) is int and 1 <= rank <= count]
    if len(ranks) != count or len(whole) != count:
        raise Refused(f"Give each of the {count} responses a rank from 1 to {count}.")
    if len(set(whole)) == 1:
        raise Refused("A known answer needs two responses that differ.")
    if count > MAX_RESPONSES:
        raise Refused(f"The ranking page shows at most {MAX_RESPONSES} responses.")
    return dense(whole)
