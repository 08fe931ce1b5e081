"""What a person says about a task, checked: the browser may send anything.

A `Form` is in the order shown to that person. It is kept as a draft while it grows, and becomes a
row of `rankings` when it is submitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.errors import EXIT_BAD_INPUT, ToolkitError

FLAGS = {
    "unsafe": "unsafe",
    "personal_data": "personal data",
    "identity_leak": "says what wrote it",
    "truncated": "cut off",
    "off_topic": "off topic",
}
"""What may be wrong with a response: key and words for people."""
SCORES = range(1, 8)
"""Likert scale of a response (InstructGPT, arXiv 2203.02155, figure 12: 1 to 7)."""
CONFIDENCES = {1: "unsure", 2: "fairly sure", 3: "sure"}
MAX_RESPONSES = 9
"""The ranking page has letters and keys for so many."""
MAX_COMMENT = 2_000
MAX_IDEAL = 20_000


class Refused(ToolkitError):
    """What was asked is not allowed or makes no sense; the message is for the annotator."""

    exit_code = EXIT_BAD_INPUT


@dataclass(frozen=True)
class Mark:
    """What is said of one response beside its rank."""

    score: int | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """ranks and marks have a place for each response shown; both are empty for a prompt to answer."""

    ranks: tuple[int | None, ...]
    marks: tuple[Mark, ...]
    all_bad: bool = False
    comment: str = ""
    confidence: int | None = None
    ideal: str = ""
    """The answer that this person would have given; of a prompt to answer: the answer."""

    @classmethod
    def empty(cls, count: int) -> Form:
        return cls((None,) * count, (Mark(),) * count)

    @classmethod
    def read(cls, value: object, count: int) -> Form:
        """A form of `count` responses from what a browser or an older draft holds.

        A list is taken for ranks alone. What is missing is empty.

        Raises:
            Refused: something has the wrong type, length or range.
        """
        if isinstance(value, Form):
            return value
        if isinstance(value, list | tuple):
            value = {"ranks": value}
        if not isinstance(value, dict):
            raise Refused("The form is broken. Reload the page.")
        marks = value.get("marks")
        confidence = value.get("confidence")
        if confidence is not None and (
            type(confidence) is not int or confidence not in CONFIDENCES
        ):
            raise Refused("The confidence must be one of those offered.")
        return cls(
            ranks=_ranks(value.get("ranks", []), count),
            marks=_marks([{}] * count if marks is None else marks, count),
            all_bad=value.get("all_bad") is True,
            comment=_text(value.get("comment"), "comment", MAX_COMMENT),
            confidence=confidence,
            ideal=_text(value.get("ideal"), "ideal answer", MAX_IDEAL),
        )

    @property
    def complete(self) -> bool:
        return None not in self.ranks

    def stored(self, order: Sequence[int]) -> Form:
        """The same by place in `task.responses`; order[i] is the stored place of shown place i."""
        shown_of = _inverse(order)
        return replace(
            self,
            ranks=tuple(self.ranks[i] for i in shown_of),
            marks=tuple(self.marks[i] for i in shown_of),
        )

    def shown(self, order: Sequence[int]) -> Form:
        """The way back of `stored`."""
        return self.stored(_inverse(order))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def dense(ranks: Sequence[int]) -> list[int]:
    """1, 3, 3, 7 becomes 1, 2, 2, 3: the same order without gaps."""
    place = {rank: i for i, rank in enumerate(sorted(set(ranks)), 1)}
    return [place[rank] for rank in ranks]


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _ranks(ranks: object, count: int) -> tuple[int | None, ...]:
    if not isinstance(ranks, list | tuple) or len(ranks) != count:
        raise Refused(f"Expected {count} ranks. Reload the page.")
    for rank in ranks:
        if rank is not None and (type(rank) is not int or not 1 <= rank <= count):
            raise Refused(f"A rank must be a whole number from 1 to {count}.")
    return tuple(ranks)


def _marks(marks: object, count: int) -> tuple[Mark, ...]:
    if not isinstance(marks, list | tuple) or len(marks) != count:
        raise Refused(f"Expected {count} marks. Reload the page.")
    return tuple(_mark(mark) for mark in marks)


def _mark(mark: object) -> Mark:
    if not isinstance(mark, dict):
        raise Refused("A mark is broken. Reload the page.")
    score, flags = mark.get("score"), mark.get("flags", [])
    if score is not None and (type(score) is not int or score not in SCORES):
        raise Refused(f"A score must be a whole number from {SCORES[0]} to {SCORES[-1]}.")
    if not isinstance(flags, list | tuple) or any(flag not in FLAGS for flag in map(str, flags)):
        raise Refused("A flag is none of those offered.")
    return Mark(score, tuple(flag for flag in FLAGS if flag in flags))


def _text(value: object, what: str, longest: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Refused(f"The {what} must be text.")
    if len(value) > longest:
        raise Refused(f"The {what} has {len(value):,} characters; {longest:,} are the most.")
    # no database keeps a NUL, and a lone half of a pair is no text
    return value.replace("\0", "").encode("utf-8", "replace").decode()
