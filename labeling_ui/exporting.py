"""From the store to files: a consistent snapshot, sorted by id, without times or names.

People appear under a pseudonym (HMAC with a secret of the store); simulated and imported annotators
keep their names, so that the same work gives the same files.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from labeling_ui.schema import rankings, tasks, users
from labeling_ui.store import Store
from pipeline.records import Ranking, is_heldout, write_jsonl

FORMATS = ("rankings", "pairs", "parquet")
Wanted = Callable[[Any], bool]


def pseudonyms(store: Store) -> Callable[[str, str], str]:
    """(kind, name) -> the name that files show."""
    secret = store.secret("pseudonyms")

    def shown(kind: str, name: str) -> str:
        if kind != "person":
            return name
        return "p-" + hmac.new(secret, name.encode(), "sha256").hexdigest()[:12]

    return shown


def snapshot(store: Store, heldout_fraction: float, wanted: Wanted | None = None) -> list[Ranking]:
    """Every valid ranking, or those whose row is `wanted`, in the order of their ids.

    Valid: ranked and not skipped, not superseded, not late. A row has `task_id`, `user_id`,
    `kind`, `step`, `active`, `round`, `by_hand`.
    """
    shown = pseudonyms(store)
    query = (
        sa.select(
            rankings.c.ranks,
            rankings.c.source,
            rankings.c.by_hand,
            rankings.c.task_id,
            rankings.c.user_id,
            users.c.kind,
            users.c.name,
            tasks.c.step,
            tasks.c.active,
            tasks.c.round,
            tasks.c.prompt_id,
            tasks.c.messages,
            tasks.c.responses,
        )
        .join(tasks, tasks.c.id == rankings.c.task_id)
        .join(users, users.c.id == rankings.c.user_id)
        .where(
            rankings.c.status == "ranked",
            rankings.c.superseded_by.is_(None),
            ~rankings.c.late,
            # known answers and repeats measure annotators, they teach nothing
            tasks.c.kind == "rank",
        )
    )
    found: dict[str, Ranking] = {}
    with store.read() as tx:
        for row in tx.execute(query):
            if wanted is not None and not wanted(row):
                continue
            ranking = Ranking(
                messages=tuple(json.loads(row.messages)),
                responses=tuple(json.loads(row.responses)),
                ranks=tuple(json.loads(row.ranks)),
                annotator=shown(row.kind, row.name),
                split="heldout" if is_heldout(row.prompt_id, heldout_fraction) else "train",
                round=row.round,
                source=row.source,
            )
            found[ranking.id] = ranking
    return [found[key] for key in sorted(found)]


def pair_rows(rankings: Iterable[Ranking]) -> Iterator[dict[str, Any]]:
    """Every strict pair in TRL's conversational preference format.

    `ranking_id` says which pairs belong together: they are strongly correlated, and training
    should keep them in one batch. Ties give no pair.
    """
    for ranking in rankings:
        for chosen, rejected in ranking.strict_pairs:
            yield {
                "prompt": list(ranking.messages),
                "chosen": [{"role": "assistant", "content": ranking.responses[chosen]}],
                "rejected": [{"role": "assistant", "content": ranking.responses[rejected]}],
                "ranking_id": ranking.id,
                "prompt_id": ranking.prompt_id,
                "annotator": ranking.annotator,
                "split": ranking.split,
            }


def write_export(rankings: list[Ranking], path: Path, format: str) -> int:
    """Write rankings in one of FORMATS, whole or not at all; the number of rows."""
    temporary = path.with_name(path.name + ".tmp")
    if format == "rankings":
        count = write_jsonl(temporary, (ranking.to_row() for ranking in rankings))
    elif format == "pairs":
        count = write_jsonl(temporary, pair_rows(rankings))
    else:
        count = _write_parquet(list(pair_rows(rankings)), temporary)
    os.replace(temporary, path)
    return count


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    turns = pyarrow.list_(
        pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    )
    words = ("ranking_id", "prompt_id", "annotator", "split")
    # a written schema: without rows there is nothing to infer it from
    columns = [(name, turns) for name in ("prompt", "chosen", "rejected")]
    schema = pyarrow.schema(columns + [(name, pyarrow.string()) for name in words])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    return len(rows)
