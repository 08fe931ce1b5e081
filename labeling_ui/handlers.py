"""What the ranking page asks for and what it is told, without drawing: tests call it as the
browser would.

Nothing that the browser sends is believed: each call looks up the user and the assignment again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from labeling_ui import administration, assignments, board, changes, display, progress, submitting
from labeling_ui.assignments import Assignment
from labeling_ui.changes import Recent
from labeling_ui.display import Shown
from labeling_ui.forms import Refused
from labeling_ui.schema import guidelines, rankings
from labeling_ui.store import Store

_STALE_PAGE = "The page is out of date. Reload it."


@dataclass(frozen=True)
class View:
    """All that the page shows of one task."""

    board: dict[str, Any]
    """For the browser's code: states, numbers and the person's own words; no model text."""
    turns: list[Shown]
    responses: list[Shown]
    guidelines: str | None
    """Markdown; None where the browser has this version already."""


@dataclass(frozen=True)
class Handlers:
    """`on_saved` is called after each saved ranking or skip."""

    store: Store
    user_id: Callable[[str], int]
    on_saved: Callable[[], None]

    def show(self, name: str, asked: Any = None, said: str = "", refused: bool = False) -> View:
        """The person's current prompt, and what is to be said of what they did."""
        asked = asked if isinstance(asked, dict) else {}
        user_id = self.user_id(name)
        work = assignments.claim(self.store, user_id)
        done, left, busy = progress.my_progress(self.store, user_id)
        guide, text = self._guidelines(user_id, asked.get("guidelines"))
        turns = display.turns(work.messages) if work else []
        value = board.board_value(work, [turn.role for turn in turns]) | {
            "who": name,
            # the same again must still be seen to be an answer
            "answers": _text(asked.get("ask")),
            "said": said,
            "refused": refused,
            "done": done,
            "left": max(0, left),
            "busy": busy,
            "guidelines": guide,
            # only a lead is shown the way to their page
            "lead": self._is_lead(user_id),
        }
        return View(value, turns, _responses(work), text)

    def act(self, name: str, asked: Any) -> View:
        """Submit, skip, reopen one of the last answers, leave it, or look for work."""
        asked = asked if isinstance(asked, dict) else {}
        user_id = self.user_id(name)
        try:
            said = self._act(user_id, asked)
        except Refused as error:
            return self.show(name, asked, error.message, refused=True)
        return self.show(name, asked, said)

    def _act(self, user_id: int, asked: dict[str, Any]) -> str:
        token, what = _text(asked.get("token")), asked.get("do")
        if what == "submit":
            saved = submitting.submit(
                self.store,
                user_id,
                token,
                asked,
                submission=_text(asked.get("submission")),
                active_seconds=asked.get("active"),
            )
        elif what == "skip":
            saved = submitting.skip(self.store, user_id, token, _text(asked.get("reason")))
        elif what == "reopen":
            if token:
                assignments.save_draft(self.store, user_id, token, asked, _revision(asked))
            changes.reopen(self.store, user_id, _text(asked.get("target")))
            return ""
        elif what == "leave":
            changes.leave(self.store, user_id, token)
            return "Left as it was."
        elif what == "look":
            return ""
        else:
            raise Refused(_STALE_PAGE)
        self.on_saved()
        return saved.message

    def draft(self, name: str, asked: Any) -> dict[str, Any]:
        """Keep an unfinished form; how that went, for the page.

        `outcome`: saved, behind (another tab has newer), gone (finished in another tab) or refused.
        """
        if not isinstance(asked, dict):
            raise Refused(_STALE_PAGE)
        token, revision = _text(asked.get("token")), _revision(asked)
        answer = {"token": token, "revision": revision, "newest": revision, "said": ""}
        user_id = self.user_id(name)
        try:
            saved = assignments.save_draft(self.store, user_id, token, asked, revision)
        except Refused as error:
            return answer | {"outcome": "refused", "said": error.message}
        if saved:
            return answer | {"outcome": "saved"}
        work = assignments.claim(self.store, user_id)
        if work is None or work.token != token:
            return answer | {"outcome": "gone"}
        return answer | {"outcome": "behind", "newest": work.revision}

    def recent(self, name: str) -> list[Recent]:
        """This person's last answers that they may still change."""
        return changes.recent(self.store, self.user_id(name))

    def _is_lead(self, user_id: int) -> bool:
        with self.store.read() as tx:
            return administration.is_lead(tx, user_id)

    def _guidelines(self, user_id: int, known: object) -> tuple[dict[str, Any], str | None]:
        """The version in force and whether this person has worked by it; and its text."""
        last = (
            sa.select(rankings.c.guidelines)
            .where(rankings.c.user_id == user_id, rankings.c.status != "skipped")
            .order_by(rankings.c.created.desc())
            .limit(1)
        )
        with self.store.read() as tx:
            newest = sa.select(guidelines).order_by(guidelines.c.version.desc()).limit(1)
            found = tx.execute(newest).first()
            if found is None:
                return {"version": 0, "state": "none"}, None if known == 0 else ""
            before = tx.execute(last).first()
        state = "first" if before is None else "known" if before[0] == found.version else "changed"
        text = None if known == found.version else display.rendered(found.text)
        return {"version": found.version, "state": state}, text


def _responses(work: Assignment | None) -> list[Shown]:
    return [display.shown(text) for text in work.responses] if work else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _revision(asked: dict[str, Any]) -> int:
    value = asked.get("revision")
    return value if type(value) is int and 0 <= value < 2**31 else 0
