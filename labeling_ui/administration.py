"""What a lead decides: guidelines, queues, people and leases.

Each function looks up who asks and logs what was before and after, in the transaction that changes
it. So a lead who has been made an annotator a moment ago changes nothing, and nothing changes
without a line in the audit log.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from labeling_ui.assignments import guidelines_version
from labeling_ui.forms import Refused
from labeling_ui.handout import active_user
from labeling_ui.schema import assignments, events, guidelines, queues, users
from labeling_ui.store import Store, log_event

MAX_GUIDELINES = 20_000
MAX_RATE = 0.5
"""More gold or repeats than work would be no work."""
_WHOLE = {"overlap": (1, 20), "minimum": (1, 10**9), "lease_minutes": (1, 24 * 60)}
_RATES = ("gold_rate", "repeat_rate")


@contextmanager
def acting(store: Store, user_id: int) -> Iterator[Connection]:
    """A transaction that writes, of somebody who is an active lead now.

    Raises:
        Refused: they are not.
    """
    with store.write() as tx:
        check_lead(tx, user_id)
        yield tx


def check_lead(tx: Connection, user_id: int) -> None:
    """Refuse everybody but an active lead."""
    if not is_lead(tx, user_id):
        raise Refused("Only a lead may do this.")


def is_lead(tx: Connection, user_id: int) -> bool:
    """Whether somebody is an active lead now."""
    found = active_user(tx, user_id)
    return found is not None and found.kind == "person" and found.role == "lead"


# ---- guidelines ----------------------------------------------------------------------------


def set_guidelines(store: Store, user_id: int, text: object) -> int:
    """Make `text` the guidelines in force; their version. The same text again changes nothing.

    Every ranking remembers the version that was in force when it was made.
    """
    if not isinstance(text, str) or not text.strip():
        raise Refused("Write the guidelines first.")
    # no database keeps a NUL, and a lone half of a pair is no text
    text = text.replace("\r\n", "\n").replace("\0", "").encode("utf-8", "replace").decode().strip()
    if len(text) > MAX_GUIDELINES:
        raise Refused(
            f"The guidelines have {len(text):,} characters; {MAX_GUIDELINES:,} are the most."
        )
    with acting(store, user_id) as tx:
        old = guidelines_version(tx)
        if old is not None and guidelines_text(tx) == text:
            return old
        new = (old or 0) + 1
        row = {"version": new, "text": text, "user_id": user_id, "created": time.time()}
        tx.execute(sa.insert(guidelines).values(**row))
        log_event(tx, "guidelines", user_id, version=[old, new], characters=len(text))
        return new


def guidelines_text(tx: Connection) -> str:
    """The guidelines in force; empty while there are none."""
    query = sa.select(guidelines.c.text).order_by(guidelines.c.version.desc()).limit(1)
    return str(tx.execute(query).scalar() or "")


# ---- queues --------------------------------------------------------------------------------


def change_queue(store: Store, user_id: int, step: str, wanted: Mapping[str, object]) -> list[str]:
    """Change settings of an open queue: overlap, minimum, lease_minutes, gold_rate, repeat_rate.

    Returns the names of those that were different before; each is logged as [old, new].

    Raises:
        Refused: a value makes no sense, or the queue is closed.
    """
    values = {name: _checked(name, value) for name, value in wanted.items()}
    with acting(store, user_id) as tx:
        queue = _open_queue(tx, step)
        new = {name: value for name, value in values.items() if getattr(queue, name) != value}
        if new:
            tx.execute(sa.update(queues).where(queues.c.step == step).values(**new))
            changes = {name: [getattr(queue, name), value] for name, value in new.items()}
            log_event(tx, "queue settings", user_id, step=step, changes=changes)
        return list(new)


def freeze_queue(store: Store, user_id: int, step: str, frozen: bool) -> bool:
    """Hand nothing out and take no change, or go on; whether it was the other way before."""
    with acting(store, user_id) as tx:
        queue = _open_queue(tx, step)
        if bool(queue.frozen) == frozen:
            return False
        tx.execute(sa.update(queues).where(queues.c.step == step).values(frozen=frozen))
        log_event(tx, "queue frozen" if frozen else "queue unfrozen", user_id, step=step)
        return True


def queue_values(tx: Connection, step: str, configured: Mapping[str, Any]) -> dict[str, Any]:
    """What `prefline resume` writes into a queue: all of a new one, else what the config has changed
    since it was queued last. What the lead has changed in the app stays.

    The config of the last time stands in the `queue` event: log it there as `config`.
    """
    query = sa.select(events.c.detail).where(events.c.kind == "queue").order_by(events.c.id.desc())
    for detail in tx.execute(query).scalars():
        last = json.loads(detail)
        if last.get("step") == step:
            before = last.get("config", {})
            return {
                name: value
                for name, value in configured.items()
                if name not in before or before[name] != value
            }
    return dict(configured)


def _open_queue(tx: Connection, step: str) -> Row[Any]:
    query = sa.select(queues).where(queues.c.step == step).with_for_update()
    found = tx.execute(query).first()
    if found is None:
        raise Refused("There is no such queue.")
    if not found.open:
        raise Refused("This queue is closed: its rankings have been exported.")
    return found


def _checked(name: str, value: object) -> int | float | None:
    if name in _RATES:
        if type(value) not in (int, float) or not 0 <= value <= MAX_RATE:  # type: ignore[operator]
            raise Refused(f"{name} must be a number from 0 to {MAX_RATE}.")
        return float(value)  # type: ignore[arg-type]
    if name not in _WHOLE:
        raise Refused("There is no such setting of a queue.")
    if name == "minimum" and value is None:
        return None
    low, high = _WHOLE[name]
    # a number field of a browser sends 2.0 for 2
    if type(value) is float and math.isfinite(value) and value == int(value):
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise Refused(f"{name} must be a whole number from {low} to {high:,}.")
    return value


# ---- people --------------------------------------------------------------------------------


def pause_annotator(store: Store, user_id: int, person: int) -> None:
    """End a person's logins and leases, and let them in no more until they are resumed.

    What they have ranked stays and counts.
    """
    if person == user_id:
        raise Refused("You cannot pause yourself: nobody might be left to let you in again.")
    with acting(store, user_id) as tx:
        _person(tx, person)
        update = sa.update(users).where(users.c.id == person)
        tx.execute(update.values(active=False, session=users.c.session + 1))
        # their prompts must not wait for a lease that nobody can use
        mine = (assignments.c.user_id == person, assignments.c.state == "leased")
        now = time.time()
        ended = tx.execute(
            sa.update(assignments).where(*mine, assignments.c.expires > now).values(expires=now)
        )
        log_event(tx, "user paused", user_id, user=person, leases=ended.rowcount)


def resume_annotator(store: Store, user_id: int, person: int) -> None:
    """Let a paused person log in again."""
    with acting(store, user_id) as tx:
        _person(tx, person)
        tx.execute(sa.update(users).where(users.c.id == person).values(active=True))
        log_event(tx, "user resumed", user_id, user=person)


def _person(tx: Connection, person: int) -> None:
    query = sa.select(users.c.id).where(users.c.id == person, users.c.kind == "person")
    if tx.execute(query).first() is None:
        raise Refused("Only people with an account can be paused.")


def release_lease(store: Store, user_id: int, assignment: str, now: float | None = None) -> bool:
    """End a lease, so that the prompt is handed to somebody else; False when it had ended.

    The draft is kept: while the place is free its owner gets the prompt back when they come.
    """
    now = time.time() if now is None else now
    with acting(store, user_id) as tx:
        found = tx.execute(sa.select(assignments).where(assignments.c.id == assignment)).first()
        if found is None:
            raise Refused("There is no such lease.")
        if found.state != "leased" or found.expires <= now:
            return False
        tx.execute(sa.update(assignments).where(assignments.c.id == assignment).values(expires=now))
        log_event(tx, "lease released", user_id, found.task_id, user=found.user_id)
        return True
