"""Waiting for people: the line stands still, shows how far they are, and goes on by itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import monotonic, sleep
from typing import TypeVar

from pipeline.errors import PeopleNeeded
from pipeline.runner import say
from pipeline.states import inspect
from pipeline.workspace import Run

_LOOK_SECONDS = 1.0
# a ranking app on another machine writes no progress here: ask the store itself now and then
_ASK_SECONDS = 300.0
Result = TypeVar("Result")


def until_ranked(run: Run, work: Callable[[], Result], how: str) -> Result:
    """`work()`, again and again until it needs no more people.

    Ctrl-C ends the waiting, and nothing else: the rankings are in the store.

    Args:
        how: what to tell people who do not know how to begin.

    Raises:
        PeopleNeeded: after Ctrl-C.
    """
    said = False
    while True:
        try:
            return work()
        except PeopleNeeded as error:
            if not said:
                say(f"{error.message}\n       {how}")
                say("This command goes on by itself when there are enough; Ctrl-C leaves.")
                said = True
            try:
                _watch(run)
            except KeyboardInterrupt:
                raise error from None


def _watch(run: Run) -> None:
    """Return when enough rankings seem to be in, or when it is time to ask the store."""
    step = next((s.step.name for s in inspect(run) if s.word == "waiting"), None)
    shown: tuple[int, int] | None = None
    end = monotonic() + _ASK_SECONDS
    while monotonic() < end:
        found = run.rank_progress(step) if step else None
        if found and found != shown:
            _show(step or "", *found)
            if found[0] >= found[1]:
                say("")
                return
            shown = found
        sleep(_LOOK_SECONDS)


def _show(step: str, have: int, need: int) -> None:
    line = f"{step}: {have} of {need} rankings ({have / max(need, 1):.0%})"
    if sys.stderr.isatty():
        # one line that changes
        print(f"\r{line}  ", end="", file=sys.stderr, flush=True)  # noqa: T201
    else:
        say(line)
