"""From the store to values: what was said about each prompt, without times or names.

One consistent snapshot, read prompt by prompt in the order of their ids, so that a million rankings
need no more memory than one. People appear under a pseudonym (HMAC with a secret of the store);
simulated and imported annotators keep their names, so that the same work gives the same files.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from labeling_ui.counting import why_left_out
from labeling_ui.schema import assignments, rankings, tasks, users
from labeling_ui.store import Store
from pipeline.records import Message, Ranking, content_id, is_heldout, response_id

Wanted = Callable[[Any], bool]
Shown = Callable[[str, str], str]
_ROWS_AT_ONCE = 500


def pseudonyms(store: Store) -> Shown:
    """(kind, name) -> the name that files show."""
    secret = store.secret("pseudonyms")

    @cache
    def shown(kind: str, name: str) -> str:
        if kind != "person":
            return name
        return "p-" + hmac.new(secret, name.encode(), "sha256").hexdigest()[:12]

    return shown


@dataclass(frozen=True)
class Answer:
    """What one annotator said about one task; `ranking` where they gave an order."""

    row: Row[Any]
    """task_id, user_id, kind (of the user), task_kind, step, active, round, by_hand, revision,
    status, and the columns of `rankings` that a person decides."""
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    annotator: str
    split: str
    ranking: Ranking | None

    @cached_property
    def id(self) -> str:
        if self.ranking is not None:
            return self.ranking.id
        return content_id("answer", self.row.task_id, self.annotator, self.row.revision)

    @cached_property
    def left_out(self) -> str | None:
        """Why this is no ranking that counts; None if it is one, or a written answer."""
        row = self.row
        return why_left_out(row.status, row.task_kind, row.superseded_by is not None, row.late)

    @property
    def counts(self) -> bool:
        return self.ranking is not None and self.left_out is None

    def to_row(self) -> dict[str, Any]:
        """All of it; a superset of `Ranking.to_row` where there is a ranking."""
        row = self.row
        marks = json.loads(row.marks) if row.marks else [{}] * len(self.responses)
        models = json.loads(row.models) if row.models else [None] * len(self.responses)
        ranks = self.ranking.ranks if self.ranking else [None] * len(self.responses)
        places = _shown_places(row, len(self.responses))
        prompt_id = row.prompt_id
        responses = [
            {
                "id": response_id(prompt_id, text),
                "text": text,
                "rank": ranks[i],
                "score": marks[i].get("score"),
                "flags": marks[i].get("flags", []),
                "place": places[i],
                "models": models[i] or [],
            }
            for i, text in enumerate(self.responses)
        ]
        seconds = row.active_seconds
        return {
            "id": self.id,
            "prompt_id": prompt_id,
            "messages": list(self.messages),
            "responses": responses,
            "annotator": self.annotator,
            "split": self.split,
            "round": row.round,
            "source": row.source,
            "queue": row.step,
            "status": row.status,
            "left_out": self.left_out,
            "skip_reason": row.reason,
            "all_bad": bool(row.all_bad),
            "comment": row.comment,
            "confidence": row.confidence,
            "ideal": row.ideal,
            "active_seconds": None if seconds is None else round(seconds),
            "guidelines": row.guidelines,
            "revision": row.revision,
        }


@dataclass(frozen=True)
class Asked:
    """One prompt: all tasks that ask about it, and what was said, in the order of ids."""

    prompt_id: str
    tasks: int
    split: str
    """`heldout` as in the rank step: by the prompt's hash, and what is kept for evaluation."""
    answers: tuple[Answer, ...]

    @cached_property
    def rankings(self) -> list[Ranking]:
        """Those that count, each once."""
        return list({a.id: a.ranking for a in self.answers if a.ranking and a.counts}.values())


def asked(tx: Connection, heldout_fraction: float, shown: Shown) -> Iterator[Asked]:
    """Every prompt of the store in the order of ids, also those that nobody answered yet."""
    rows = tx.execute(_QUERY, execution_options={"yield_per": _ROWS_AT_ONCE})
    for prompt_id, group in groupby(rows, key=lambda row: row.prompt_id):
        yield _asked(prompt_id, list(group), heldout_fraction, shown)


def snapshot(store: Store, heldout_fraction: float, wanted: Wanted | None = None) -> list[Ranking]:
    """Every ranking that counts, or those whose row is `wanted`, in the order of their ids.

    It counts: ranked and not skipped, not superseded, not late, no known answer and no repeat.
    """
    found: dict[str, Ranking] = {}
    with store.read() as tx:
        for prompt in asked(tx, heldout_fraction, pseudonyms(store)):
            for answer in prompt.answers:
                if not answer.counts or (wanted is not None and not wanted(answer.row)):
                    continue
                assert answer.ranking is not None
                found[answer.id] = answer.ranking
    return [found[key] for key in sorted(found)]


# ---- parts ---------------------------------------------------------------------------------

# tasks without an answer too: they may say that their prompt is kept for evaluation
_QUERY = (
    sa.select(
        tasks.c.id.label("task_id"),
        tasks.c.kind.label("task_kind"),
        *(tasks.c.step, tasks.c.active, tasks.c.round, tasks.c.split, tasks.c.prompt_id),
        *(tasks.c.messages, tasks.c.responses, tasks.c.models),
        rankings.c.id.label("stored_id"),
        *(rankings.c.user_id, rankings.c.revision, rankings.c.status, rankings.c.ranks),
        *(rankings.c.reason, rankings.c.late, rankings.c.source, rankings.c.by_hand),
        *(rankings.c.superseded_by, rankings.c.all_bad, rankings.c.marks, rankings.c.comment),
        *(rankings.c.confidence, rankings.c.ideal, rankings.c.active_seconds),
        rankings.c.guidelines,
        *(users.c.kind, users.c.name),
        assignments.c.display_order,
    )
    .select_from(
        tasks.outerjoin(rankings, rankings.c.task_id == tasks.c.id)
        .outerjoin(users, users.c.id == rankings.c.user_id)
        .outerjoin(assignments, assignments.c.id == rankings.c.assignment_id)
    )
    .order_by(tasks.c.prompt_id, tasks.c.id)
)


def _asked(prompt_id: str, rows: list[Any], heldout_fraction: float, shown: Shown) -> Asked:
    kept_away = any(row.split != "train" for row in rows)
    split = "heldout" if kept_away or is_heldout(prompt_id, heldout_fraction) else "train"
    said = [row for row in rows if row.stored_id is not None]
    messages = tuple(json.loads(rows[0].messages)) if said else ()
    # of each task once, however many have answered it
    texts = {row.task_id: row.responses for row in said}
    responses = {task: tuple(json.loads(text)) for task, text in texts.items()}
    answers = (
        _answer(row, messages, responses[row.task_id], shown(row.kind, row.name), split)
        for row in said
    )
    return Asked(
        prompt_id,
        len({row.task_id for row in rows}),
        split,
        tuple(sorted(answers, key=lambda answer: (answer.id, answer.row.revision))),
    )


def _answer(
    row: Row[Any],
    messages: tuple[Message, ...],
    responses: tuple[str, ...],
    annotator: str,
    split: str,
) -> Answer:
    ranking = None
    if row.status == "ranked":
        ranks = tuple(json.loads(row.ranks))
        ranking = Ranking(messages, responses, ranks, annotator, split, row.round, row.source)
    return Answer(row, messages, responses, annotator, split, ranking)


def _shown_places(row: Row[Any], count: int) -> list[int | None]:
    """Where each response stood on the screen, from 1; unknown where no person looked."""
    if row.kind != "person" or not row.display_order:
        return [None] * count
    order: list[int] = json.loads(row.display_order)
    return [order.index(i) + 1 for i in range(count)]
