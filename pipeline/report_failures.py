"""Steps of a run that failed: what was said, the figures before it, and the checkpoints that are left."""

from __future__ import annotations

from pathlib import Path

from pipeline.report_data import StepView
from pipeline.report_plots import Row, finite, number
from pipeline.workspace import Run

_ROWS = 6
_COLUMNS = 7
_DULL = {"step", "time", "tokens_per_second", "lr", "alarms", "epochs_done"}


def failures(run: Run, steps: list[StepView]) -> list[Row]:
    """One block for each step whose last start failed, in the order of the line."""
    said = {(row.get("step"), row.get("fingerprint")): row for row in run.events()}
    found = []
    for step in steps:
        if step.state != "failed" or step.work is None:
            continue
        fingerprints = [key for key in said if key[0] == step.name and _is_of(key[1], step.work)]
        event = said[fingerprints[-1]] if fingerprints else {}
        rows = [row for row in step.rows if finite(row.get("step"))]
        # a figure that the message names is the one that people look for
        message = str(event.get("reason", step.state_text))
        names = [key for key in (rows[-1] if rows else {}) if key not in _DULL]
        names = sorted(names, key=lambda name: f" {name} is " not in message)[:_COLUMNS]
        found.append(
            {
                "name": step.name,
                "when": event.get("time"),
                "message": message,
                "hint": event.get("hint"),
                "names": names,
                "rows": [
                    (number(row["step"]), [number(row.get(name)) for name in names])
                    for row in rows[-_ROWS:]
                ],
                "checkpoints": checkpoints(step.work),
            }
        )
    return found


def checkpoints(work: Path) -> list[str]:
    """Names of the completed checkpoints of a step, oldest first; their bytes are verified when they are read."""
    done = [
        *(work / "checkpoints").glob("step-*/MANIFEST.json"),
        *(work / "checkpoints").glob("checkpoint-*/COMMITTED.json"),
    ]
    names = [path.parent.name for path in done]
    return sorted(names, key=lambda name: int(name.rpartition("-")[2]))


def _is_of(fingerprint: object, work: Path) -> bool:
    return isinstance(fingerprint, str) and fingerprint.startswith(work.name)
