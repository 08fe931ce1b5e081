"""How many rankings the line waits for: counted in the store, told to `prefline status` by a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import sqlalchemy as sa

from labeling_ui.store import Store, assignments, queues, tasks, users

PROGRESS_FILE = "rank-progress.json"


def progress(store: Store, step: str) -> tuple[int, int]:
    """(have, need): rankings by people of the step's tasks, and how many it takes to go on."""
    with store.read() as tx:
        queue = tx.execute(sa.select(queues).where(queues.c.step == step)).one()
        active = (tasks.c.step == step) & tasks.c.active
        count = tx.execute(sa.select(sa.func.count()).select_from(tasks).where(active)).scalar_one()
        states = tx.execute(
            sa.select(assignments.c.task_id, assignments.c.state, sa.func.count())
            .select_from(assignments.join(tasks).join(users))
            .where(active, users.c.kind == "person")
            .where(assignments.c.state.in_(("ranked", "unrankable")))
            .group_by(assignments.c.task_id, assignments.c.state)
        ).all()
    have = sum(number for _, state, number in states if state == "ranked")
    unrankable = sum(number for _, state, number in states if state == "unrankable")
    possible = queue.overlap * count - unrankable
    # a minimum that the prompts cannot give would keep the line waiting for ever
    return have, possible if queue.minimum is None else min(queue.minimum, possible)


def write_progress(run_dir: Path, step: str, have: int, need: int) -> None:
    """Note it in RUN/rank-progress.json, whole or not at all."""
    path = run_dir / PROGRESS_FILE
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        steps = {}
    steps[step] = {"have": have, "need": need}
    # a name of its own: the app and the rank step may both be at it
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(steps), encoding="utf-8")
    os.replace(temporary, path)
