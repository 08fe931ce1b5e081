"""The answers of the lead's page, without drawing.

Gradio runs any handler for whoever sends its name over HTTP, so each of these looks up who asks and
whether they are a lead now: reading here, changing in the transaction that changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from labeling_ui import administration, gold, inspection
from labeling_ui.accounts import list_users
from labeling_ui.administration import check_lead
from labeling_ui.assignments import guidelines_version
from labeling_ui.dashboard import Dashboard, Overview
from labeling_ui.forms import Refused
from labeling_ui.schema import queues
from labeling_ui.store import EXTRA, WRITE, Store

QUEUE_FIELDS = ("overlap", "minimum", "lease_minutes", "gold_rate", "repeat_rate")


@dataclass(frozen=True)
class Handlers:
    """Every method begins with the name of who asks; tests call them as the browser would.

    Args:
        user_id: the id of an active account's name; refuses others.
        on_changed: called after a change of a queue, which may change what the line waits for.

    Raises:
        Refused: by every method, for everybody but an active lead. The messages hold nothing that
            anybody typed, because Gradio shows them as HTML.
    """

    store: Store
    user_id: Callable[[str], int]
    on_changed: Callable[[], None]
    dashboard: Dashboard

    # ---- looking ---------------------------------------------------------------------------

    def overview(self, name: str) -> Overview:
        self._lead(name)
        return self.dashboard.overview()

    def prompts(self, name: str, view: object, search: object) -> list[inspection.Line]:
        self._lead(name)
        return inspection.prompts(self.store, str(view), str(search or "")[:200])

    def prompt(self, name: str, task: object) -> inspection.Prompt:
        self._lead(name)
        return inspection.prompt(self.store, str(task))

    def audit(
        self, name: str, kind: object, person: object, most: object
    ) -> list[tuple[float, str, str, str, str]]:
        self._lead(name)
        # ids begin with 1
        who = _number(person or 0) or None
        shown = min(2000, max(1, _number(most)))
        return inspection.audit(self.store, str(kind or "") or None, who, shown)

    def event_kinds(self, name: str) -> list[str]:
        self._lead(name)
        return inspection.event_kinds(self.store)

    def people(self, name: str) -> list[tuple[str, int]]:
        """(name, id) of everybody who can log in."""
        self._lead(name)
        return [(row.name, row.id) for row in list_users(self.store)]

    def steps(self, name: str) -> list[str]:
        """The queues, open ones first, standing ones last."""
        self._lead(name)
        query = sa.select(queues.c.step).order_by(queues.c.open.desc(), queues.c.step)
        with self.store.read() as tx:
            steps = list(tx.execute(query).scalars())
        return sorted(steps, key=(EXTRA, WRITE).__contains__)

    def guidelines(self, name: str) -> tuple[str, int | None]:
        """The guidelines in force and their version."""
        self._lead(name)
        with self.store.read() as tx:
            version = guidelines_version(tx)
            return administration.guidelines_text(tx), version

    def queue(self, name: str, step: object) -> dict[str, Any]:
        """The settings of a queue."""
        self._lead(name)
        with self.store.read() as tx:
            row = tx.execute(sa.select(queues).where(queues.c.step == str(step))).mappings().first()
        if row is None:
            raise Refused("Choose a queue.")
        return {field: row[field] for field in (*QUEUE_FIELDS, "frozen", "open")}

    # ---- changing --------------------------------------------------------------------------

    def change_queue(self, name: str, step: object, *values: object) -> str:
        wanted = dict(zip(QUEUE_FIELDS, values, strict=True))
        # an empty number field of a browser is None
        changed = administration.change_queue(self.store, self._lead(name), str(step), wanted)
        self.on_changed()
        return f"Saved: {', '.join(changed)}." if changed else "Nothing was different."

    def freeze(self, name: str, step: object, frozen: bool) -> str:
        administration.freeze_queue(self.store, self._lead(name), str(step), frozen)
        self.on_changed()
        return "Frozen: nothing is handed out." if frozen else "Prompts are handed out again."

    def set_guidelines(self, name: str, text: object) -> str:
        version = administration.set_guidelines(self.store, self._lead(name), text)
        return f"Version {version} is in force."

    def pause(self, name: str, person: object, resume: bool) -> str:
        lead = self._lead(name)
        if resume:
            administration.resume_annotator(self.store, lead, _number(person))
            return "They can log in again."
        administration.pause_annotator(self.store, lead, _number(person))
        return "Paused: they are logged out, and their prompts go to others."

    def release(self, name: str, assignment: object) -> str:
        if administration.release_lease(self.store, self._lead(name), str(assignment)):
            return "Released: the next person gets this prompt."
        return "This lease had ended already."

    def make_gold(self, name: str, task: object, ranks: object) -> str:
        """ranks: as the lead typed them, in the order in which the responses are shown."""
        words = str(ranks or "").replace(",", " ").split()
        if not all(word.isascii() and word.isdigit() for word in words):
            raise Refused("Write a rank for each response, such as: 2 1 3")
        numbers = [int(word) for word in words if len(word) < 4]
        gold.make_gold(self.store, self._lead(name), str(task), numbers)
        return "Stored as a known answer."

    def import_gold(self, name: str, text: object) -> str:
        """What was stored and refused. It may hold what was typed: show it as text."""
        return gold.import_gold(self.store, self._lead(name), str(text or "")).summary()

    def retire_gold(self, name: str, task: object, active: bool) -> str:
        gold.retire_gold(self.store, self._lead(name), str(task), active)
        return "Handed out again." if active else "Handed out no more; its answers do not count."

    def _lead(self, name: str) -> int:
        user_id = self.user_id(name)
        with self.store.read() as tx:
            check_lead(tx, user_id)
        return user_id


def _number(value: object) -> int:
    """A whole number from a browser, which may have sent anything."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**31:
        raise Refused("Choose one first.")
    return value
