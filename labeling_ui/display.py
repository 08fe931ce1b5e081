"""Model text on a page, as what it is: text. It is hostile until proven otherwise.

Everything goes through Gradio's sanitised Markdown, in one of two ways. `exact` shows every
character in a code fence that the text cannot leave. `rendered` lets the browser lay out headings,
lists and code, but no HTML, image, link or diagram: an invisible word joiner (U+2060) breaks each
such mark where it begins, so that it is shown instead of obeyed. An image would be fetched from
where the text says; that tells its author who is ranking, and when.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.records import Message

_JOINER = "\u2060"
# control characters, and those that turn the direction of the text around them
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_MARKS = (
    (re.compile(r"<(?=[A-Za-z/!?])"), "<" + _JOINER),
    (re.compile(r"!\["), "!" + _JOINER + "["),
    (re.compile(r"\](?=[(\[:])"), "]" + _JOINER),
    (re.compile(r"(?<=[A-Za-z])://"), _JOINER + "://"),
    (re.compile(r"\bwww\.", re.IGNORECASE), lambda match: match.group()[:3] + _JOINER + "."),
    (re.compile(r"(?<=\w)@(?=\w)"), _JOINER + "@"),
    (re.compile(r"([`~]{3,}[ \t]*)(?=[A-Za-z])"), lambda match: match.group() + _JOINER),
    # character references could spell a mark out
    (re.compile(r"&(?=[A-Za-z#])"), "&amp;"),
)
MAX_TURNS = 8
_ROLES = {"user": "User", "assistant": "Assistant", "system": "System"}


def visible(text: str) -> str:
    """Characters that a reader cannot see, or that reorder others, as their code points."""
    text = text.replace("\r\n", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
    return _INVISIBLE.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", text)


def exact(text: str) -> str:
    """Markdown that shows `text` character by character."""
    shown = visible(text) or "(empty)"
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{shown}\n{fence}"


def rendered(text: str) -> str:
    """Markdown that lays `text` out, without anything that acts or fetches."""
    shown = visible(text) or "(empty)"
    for mark, harmless in _MARKS:
        shown = mark.sub(harmless, shown)
    return shown


@dataclass(frozen=True)
class Shown:
    """A text as Markdown, in both ways; `role` is whose turn it is."""

    exact: str
    rendered: str
    role: str = ""


def shown(text: str, role: str = "") -> Shown:
    return Shown(exact(text), rendered(text), role)


def turns(messages: Sequence[Message], most: int = MAX_TURNS) -> list[Shown]:
    """The turns of a prompt, at most `most`: the first ones share a place where there are more."""
    spare = len(messages) - most
    first = messages[: spare + 1] if spare > 0 else []
    rest = messages[len(first) :]
    begin = [
        Shown(together(first, exact), together(first, rendered), f"{len(first)} earlier turns")
    ]
    each = [shown(message["content"], _ROLES[message["role"]]) for message in rest]
    return (begin if first else []) + each


def together(messages: Sequence[Message], show: Callable[[str], str]) -> str:
    """Several turns as one text; `show` is `exact` or `rendered`."""
    return "\n\n".join(
        f"**{_ROLES[message['role']]}**\n\n{show(message['content'])}" for message in messages
    )
