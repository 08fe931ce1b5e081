"""The rows of metrics.jsonl in a tracker as well (`run.tracker`), by Accelerate's class for it.

One run of the tracker a step, in a project of the name of the run. Only rank 0 has a tracker.

A tracker may be slow, lose its network or break: it works in a thread of its own, so that training waits
for nothing, and its first failure is told once and ends it. metrics.jsonl remains the record.

No row is sent twice: `tracked.json` in the step's work directory says up to which step rows have gone out,
and a resumed step does those of its rows again that come after its checkpoint. The note is written before a
row is sent, so that a kill between the two loses that row in the tracker.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from pipeline.files import read_json, write_atomic
from pipeline.job import Job, Metrics, Out

NOTE = "tracked.json"
# what a tracker may take for the rest of its rows when a step ends
_PATIENCE_SECONDS = 60.0
Row = tuple[int, Metrics]


def open_tracker(job: Job, out: Out) -> Thread:
    """The tracker of a step. Nothing is started before its first row: Accelerate is up by then."""
    run = job.settings["run"]
    return Thread(run["tracker"], run["name"], job.manifest.get("settings", {}), out)


class Thread:
    """A tracker in a thread. `log` and `finish` never raise and, but for the patience, never wait."""

    def __init__(self, kind: str, project: str, settings: dict[str, Any], out: Out) -> None:
        self._kind, self._project, self._settings, self._out = kind, project, settings, out
        note = read_json(out.work / NOTE)
        known = isinstance(note, dict) and note.get("tracker") == kind
        self._note: dict[str, Any] = (
            note if known else {"tracker": kind, "id": uuid.uuid4().hex[:12], "step": None}
        )
        sent = self._note["step"]
        self._begin = -math.inf if sent is None else sent
        self._is_new = not known
        self._rows: queue.Queue[Row | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def log(self, step: int, metrics: Metrics) -> None:
        """Send a row, unless an earlier process has."""
        if step <= self._begin:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._rows.put((step, metrics))

    def finish(self) -> None:
        """Wait for what is on its way, within reason."""
        if self._thread is None:
            return
        self._rows.put(None)
        self._thread.join(_PATIENCE_SECONDS)
        if self._thread.is_alive():
            self._out.say(
                f"warning: {self._kind} did not take its last rows within {_PATIENCE_SECONDS:.0f} s;"
                " metrics.jsonl has them"
            )

    def _work(self) -> None:
        try:
            tracker = self._start()
            while (row := self._rows.get()) is not None:
                self._send(tracker, *row)
            with _aside():
                tracker.finish()
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the run
            first = (str(error).strip().splitlines() or [""])[0]
            self._out.say(
                f"warning: {self._kind} gets no more rows ({type(error).__name__}: {first});"
                " training goes on, metrics.jsonl has them"
            )

    def _send(self, tracker: GeneralTracker, step: int, metrics: Metrics) -> None:
        numbers = {
            key: value
            for key, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._note["step"] = step
        write_atomic(self._out.work / NOTE, json.dumps(self._note), durable=False)
        tracker.log(numbers, step=step)

    def _start(self) -> GeneralTracker:
        place = self._out.run_dir / self._kind
        # Accelerate's trackers ask it which rank this is; the stage has brought it up before its first row
        PartialState()
        with _aside():
            tracker: GeneralTracker = _TRACKERS[self._kind](self, place)
            tracker.start()
            if self._kind == "mlflow":
                self._note["id"] = tracker.tracker.info.run_id
            if self._is_new:
                tracker.store_init_configuration(_plain(self._settings))
        return tracker

    # ---- each by its own words -------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"{self._out.step}-{self._out.work.name}"

    def tensorboard(self, place: Path) -> GeneralTracker:
        return LOGGER_TYPE_TO_CLASS["tensorboard"](self._name, str(place))

    def trackio(self, _place: Path) -> GeneralTracker:
        name = f"{self._name}-{self._note['id']}"
        return LOGGER_TYPE_TO_CLASS["trackio"](self._project, name=name, resume="allow")

    def wandb(self, place: Path) -> GeneralTracker:
        named = {"name": self._name, "id": self._note["id"], "group": self._out.run_dir.name}
        return LOGGER_TYPE_TO_CLASS["wandb"](
            self._project, dir=str(place.parent), resume="allow", job_type=self._out.stage, **named
        )

    def mlflow(self, place: Path) -> GeneralTracker:
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{place}.db")
        named = {"run_id": self._note["id"]} if not self._is_new else {"run_name": self._name}
        return LOGGER_TYPE_TO_CLASS["mlflow"](experiment_name=self._project, **named)


_TRACKERS = {
    "tensorboard": Thread.tensorboard,
    "trackio": Thread.trackio,
    "wandb": Thread.wandb,
    "mlflow": Thread.mlflow,
}


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Within: no terminal to read from, where wandb would ask for an account and wait; and what a tracker
    prints is no result of the command."""
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing, contextlib.redirect_stdout(sys.stderr):
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: no lists, no nesting."""
    return {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in settings.items()
    }
