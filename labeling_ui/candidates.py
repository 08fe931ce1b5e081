"""Prompts with responses that nobody has ranked yet, and prompts that wait for an answer.

A row is a prompt (any layout of pipeline/formats.py, or `messages`) with `responses`: a list of
texts or of objects with a `text` and, where it is known, the `model` that wrote it. In CSV, and
where a column holds one response each, `response_1`, `response_2`, ... do as well.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from labeling_ui.forms import MAX_RESPONSES
from labeling_ui.layouts import parse
from labeling_ui.screening import MAX_PROMPT, MAX_RESPONSE, clean, warnings
from labeling_ui.store import EXTRA, WRITE, gold_id, task_row
from pipeline.formats import Unusable, conversation, prompt_messages
from pipeline.records import SPLITS, Message, canonical_json, content_id

Kind = Literal["rank", "write", "gold"]
QUEUES: dict[Kind, str | None] = {"rank": EXTRA, "write": WRITE, "gold": None}
_NUMBERED = re.compile(r"(?:response|answer|completion|output)_?\d+")


@dataclass
class Candidates:
    """Different responses to one prompt, in the order found, each with the models that wrote it."""

    messages: tuple[Message, ...]
    responses: dict[str, list[str]] = field(default_factory=dict)
    split: str = "train"
    ranks: dict[str, int] = field(default_factory=dict)
    """Of each response, where the order is known."""

    @property
    def prompt_id(self) -> str:
        return content_id("prompt", list(self.messages))

    def add(self, text: str, models: Iterable[str]) -> None:
        known = self.responses.setdefault(text, [])
        known += [model for model in models if model not in known]


def to_rank(row: Any, notes: Counter[str]) -> Candidates:
    """The prompt and responses of a row.

    Raises:
        Unusable: with a reason in a few words.
    """
    if not isinstance(row, dict):
        raise Unusable("the row is not an object")
    given = row.get("responses", row.get("completions"))
    if isinstance(given, str):
        # a list in a cell of a table
        given = _parsed(given)
    if given is None:
        columns = sorted((name for name in row if _NUMBERED.fullmatch(str(name))), key=_number)
        given = [row[name] for name in columns if row[name]] or None
    if not isinstance(given, list):
        raise Unusable("no list of responses (prompts without any: queue them with --write)")
    found = Candidates(_prompt(row), split=_split(row))
    for item in given:
        is_object = isinstance(item, dict)
        text = item.get("text", item.get("content")) if is_object else item
        model = item.get("model") if is_object else None
        text = clean(text, "a response", MAX_RESPONSE)
        notes["equal responses merged"] += text in found.responses
        found.add(text, [model] if isinstance(model, str) and model else [])
    if len(found.responses) < 2:
        raise Unusable("fewer than 2 different responses")
    if len(found.responses) > MAX_RESPONSES:
        raise Unusable(f"more than {MAX_RESPONSES} responses")
    return found


def to_write(row: Any) -> Candidates:
    """The prompt of a row, without responses.

    Raises:
        Unusable: with a reason in a few words.
    """
    return Candidates(_clean(prompt_messages(row)), split=_split(row))


def to_gold(row: Any) -> Candidates:
    """The responses of a row whose order is known: a ranking in any layout of layouts.py.

    Raises:
        Unusable: with a reason in a few words.
    """
    found = parse(row)
    if len(found.responses) > MAX_RESPONSES:
        raise Unusable(f"more than {MAX_RESPONSES} responses")
    if len(set(found.ranks)) == 1:
        raise Unusable("all responses are tied: a known answer needs an order")
    texts = [clean(text, "a response", MAX_RESPONSE) for text in found.responses]
    return Candidates(
        _clean(list(found.messages)),
        responses={text: [] for text in texts},
        ranks=dict(zip(texts, found.ranks, strict=True)),
    )


def merged(
    rows: Iterable[Candidates], seen: Counter[str], notes: Counter[str]
) -> Iterator[Candidates]:
    """Rows of one prompt as one, with all their different responses.

    Only prompts that come more than once are held in memory.

    Args:
        seen: how many rows each prompt has, by prompt id.
    """
    waiting: dict[str, Candidates] = {}
    left = Counter(seen)
    for row in rows:
        key = row.prompt_id
        left[key] -= 1
        if seen[key] > 1:
            whole = waiting.setdefault(key, Candidates(row.messages, split=row.split))
            for text, models in row.responses.items():
                whole.add(text, models)
            # what one source keeps for evaluation, another must not give away
            whole.split = row.split if row.split != "train" else whole.split
            if left[key]:
                continue
            row = waiting.pop(key)
        if len(row.responses) > MAX_RESPONSES:
            notes[f"prompts left out: more than {MAX_RESPONSES} responses in all rows"] += 1
            continue
        yield row


def to_task(
    found: Candidates, kind: Kind, notes: Counter[str], origin: str = "hand"
) -> dict[str, Any]:
    """The row of `tasks`, its responses by place."""
    row = task_row(
        found.messages, list(found.responses), round=1, origin=origin, split=found.split, kind=kind
    )
    texts: list[str] = json.loads(row["responses"])
    noticed = warnings(found.messages, texts)
    notes.update(f"prompts or responses with {what} (kept)" for what, _ in noticed)
    models = [sorted(found.responses[text]) for text in texts]
    row |= {
        "models": canonical_json(models) if any(models) else None,
        "warnings": canonical_json([words for _, words in noticed]) if noticed else None,
        "gold": canonical_json([found.ranks[text] for text in texts]) if kind == "gold" else None,
        "step": QUEUES[kind],
    }
    if kind == "gold":
        # the same responses may also be ranked as work
        row["id"] = gold_id(row["prompt_id"], texts)
    return row


# ---- parts ---------------------------------------------------------------------------------


def _prompt(row: dict[str, Any]) -> tuple[Message, ...]:
    """The conversation that the responses answer."""
    whole = row.get("messages", row.get("prompt"))
    messages = conversation(whole) if isinstance(whole, list) else prompt_messages(row)
    if messages[-1]["role"] != "user":
        raise Unusable("the prompt does not end with a user turn")
    return _clean(messages)


def _clean(messages: list[Message]) -> tuple[Message, ...]:
    texts = [clean(message["content"], "the prompt", MAX_PROMPT) for message in messages]
    if sum(map(len, texts)) > MAX_PROMPT:
        raise Unusable(f"the prompt has more than {MAX_PROMPT:,} characters")
    pairs = zip(messages, texts, strict=True)
    return tuple({"role": message["role"], "content": text} for message, text in pairs)


def _split(row: Any) -> str:
    split = row.get("split") if isinstance(row, dict) else None
    return split if split in SPLITS else "train"


def _parsed(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        raise Unusable("the responses are a text that is no JSON list") from None


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))
