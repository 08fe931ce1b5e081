"""SIGKILL at random moments, resumed each time: does the run end with the same bytes?  `make faults`

    python -m tests.faults [--kills 50] [--kills-two 20] [--seed 0] [--page docs/faults.md]

configs/tiny.yaml runs once without a fault, which is the reference. Then runs of the same settings are killed
and resumed until so many kills have happened. A moment is a random time after a start (the parent, a rank or
the launcher is killed), or a random change of a file in the run directory (the process dies just before its
Nth one, see hook/sitecustomize.py: in the middle of a checkpoint, between an artifact and its manifest, while
labels are written). A run that has ended is compared with the reference: the digest of every artifact, and every
row of metrics.jsonl and samples.jsonl but for its wall-clock fields. Exit 1 when anything differs, when a process
lives on after its parent was killed, or when a resume ends with anything but success or the kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.processes import stat
from tests.metric_rows import timeless_rows

ROOT = Path(__file__).resolve().parents[2]
HOOK = Path(__file__).parent / "hook"
CONFIG = "configs/tiny.yaml"
_GONE_WITHIN = 5.0  # seconds after which nothing of a killed run may be alive


@dataclass(frozen=True)
class Moment:
    """When and what dies: `who` so many seconds after a start, or before its Nth change of a file."""

    who: str
    seconds: float | None = None
    change: int | None = None

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"{self.who} after {self.seconds:.2f} s"
        return f"{self.who} before change {self.change}"


@dataclass
class Tally:
    """kills: a line for each. wrong: what must not be. runs: how many were killed and ended."""

    kills: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    runs: int = 0


# ---- one run -------------------------------------------------------------------------------


class Line:
    """A run that is killed again and again."""

    def __init__(self, run: Path, options: list[str]) -> None:
        self.run = run
        self._options = options
        self._log = run.with_suffix(".log")
        self._changes = run.with_suffix(".changes")

    def attempt(self, moment: Moment) -> str | None:
        """Start or resume it, and kill it at that moment: what was killed; None: it had ended before.

        Raises:
            RuntimeError: it ended in another way, or something lives on.
        """
        known = (self.run / "run.json").is_file()
        words = ["resume", str(self.run)] if known else ["run", CONFIG, f"run.dir={self.run}"]
        plan = {"run": str(self.run), "log": str(self._changes), "at": moment.change or 0}
        kind = "parent" if moment.who == "parent" else "worker"
        environment = {
            "PREFLINE_FAULT": json.dumps({**plan, "kind": kind}),
            "PYTHONPATH": f"{HOOK}{os.pathsep}{ROOT}",
            "HF_HUB_OFFLINE": "1",
        }
        self._changes.unlink(missing_ok=True)
        with self._log.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", *words, *([] if known else self._options)],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        killed = self._kill(process, moment)
        code = process.wait()
        self._check_gone()
        if killed is None and code:
            raise RuntimeError(f"exit {code} without a kill:\n{self.tail()}")
        return killed if code else None

    def _kill(self, process: subprocess.Popen[bytes], moment: Moment) -> str | None:
        if moment.seconds is None:
            process.wait()
            found = self._changes.read_text().splitlines() if self._changes.exists() else []
            return next((line for line in found if not line.isdigit()), None)
        try:
            process.wait(moment.seconds)
            return None
        except subprocess.TimeoutExpired:
            pass
        victim = process.pid if moment.who == "parent" else self._pid(moment.who)
        if victim is None:
            # too early for a worker, or one is leaving: the parent is there
            victim = process.pid
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return None
        # a worker that had done all its work may be missed by nobody
        return f"in {self._at_work()}"

    def _pid(self, who: str) -> int | None:
        """The process of a rank; the launcher is the parent of rank 0."""
        rank = who.removeprefix("rank") if who != "launcher" else "0"
        for file in self.run.glob(f".jobs/*/rank{rank}.pid"):
            pid = int(file.read_text())
            if who != "launcher":
                return pid
            fields = stat(pid)
            return int(fields[1]) if fields else None
        return None

    def _at_work(self) -> str:
        steps = [folder.parent for folder in self.run.glob("[!.]*/*") if folder.is_dir()]
        return max(steps, key=lambda step: step.stat().st_mtime).name if steps else "the start"

    def _check_gone(self) -> None:
        deadline = time.monotonic() + _GONE_WITHIN
        while alive := self._alive():
            if time.monotonic() > deadline:
                for line in alive:
                    os.kill(int(line.split()[0]), signal.SIGKILL)
                raise RuntimeError(f"still alive after {_GONE_WITHIN:g} s: {alive}")
            time.sleep(0.05)

    def _alive(self) -> list[str]:
        """Processes whose command line names the run."""
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = file.read_bytes().decode("utf-8", "replace").split("\0")
            except OSError:
                continue
            if any(word.startswith(str(self.run)) for word in words):
                found.append(f"{file.parent.name} {' '.join(words)}")
        return found

    def changes(self) -> int:
        """How many files the worker changed in an attempt that was not killed."""
        return max(int(line) for line in self._changes.read_text().split())

    def tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])


def contents(run: Path) -> dict[str, Any]:
    """What two runs with the same settings must agree on, by what it is."""
    status = subprocess.run(
        [sys.executable, "-m", "pipeline", "status", str(run), "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = {}
    for step in json.loads(status.stdout)["steps"]:
        name = step["step"]
        found[f"{name}: state"] = step["state"]
        found[f"{name}: digest"] = step["digest"]
        for file in ("metrics.jsonl", "samples.jsonl"):
            path = run / name / step["fingerprint"][:12] / file
            found[f"{name}: {file}"] = timeless_rows(path) if path.exists() else []
    return found


# ---- many ----------------------------------------------------------------------------------


def draw(chance: random.Random, processes: int, seconds: float, changes: int) -> Moment:
    """A random moment within the next third of a run: several hit each run before it ends."""
    if chance.random() < 0.5:
        people = ["parent", "rank0"] + (["rank1", "launcher"] if processes > 1 else [])
        return Moment(chance.choice(people), seconds=chance.uniform(0, seconds / 3))
    if chance.random() < 0.2:
        return Moment("parent", change=chance.randint(1, 60))
    return Moment("worker", change=chance.randint(1, max(1, changes // 3)))


def campaign(folder: Path, processes: int, kills: int, seed: int) -> Tally:
    """So many kills of runs with so many processes."""
    options = ["launch.threads=1", f"launch.processes={processes}"]
    chance = random.Random(f"{seed} {processes}")
    whole = Line(folder / "whole", options)
    started = time.monotonic()
    whole.attempt(Moment("worker"))
    seconds, changes = time.monotonic() - started, whole.changes()
    reference = contents(whole.run)
    print(f"{processes} process(es): {seconds:.0f} s and {changes} changes whole", flush=True)
    tally = Tally()
    line: Line | None = None
    while line or len(tally.kills) < kills:
        line = line or Line(folder / f"run-{tally.runs + 1}", options)
        enough = len(tally.kills) >= kills
        moment = Moment("worker") if enough else draw(chance, processes, seconds, changes)
        try:
            killed = line.attempt(moment)
        except RuntimeError as error:
            tally.wrong.append(f"run {tally.runs + 1}, {moment}: {error}")
            print(f"WRONG: {tally.wrong[-1]}", flush=True)
            tally.runs, line = tally.runs + 1, None
            continue
        if killed is not None:
            tally.kills.append(f"run {tally.runs + 1}: {moment}: {killed}")
            print(f"{len(tally.kills):3} {tally.kills[-1]}", flush=True)
            continue
        found = contents(line.run)
        differing = [key for key, value in reference.items() if found.get(key) != value]
        tally.wrong += [f"run {tally.runs + 1}: {key} differs" for key in differing]
        tally.runs += 1
        print(f"    run {tally.runs} has ended: {'DIFFERS' if differing else 'equal'}", flush=True)
        shutil.rmtree(line.run)
        line = None
    return tally


def summary(processes: int, tally: Tally) -> str:
    what = "one process" if processes == 1 else f"{processes} processes"
    lines = [
        f"{len(tally.kills)} kills in {what}, {tally.runs} runs ended:"
        f" {len(tally.wrong)} things went wrong",
        *(f"- {text}" for text in tally.wrong),
    ]
    return "\n".join(lines)


def page(tallies: dict[int, Tally], seed: int) -> str:
    text = (
        "# Killed and resumed\n\n"
        "`make faults` (tests/faults): configs/tiny.yaml is killed by SIGKILL at random moments and resumed each"
        " time. Of every\nrun that has ended the digests of all artifacts and the rows of metrics.jsonl and"
        f" samples.jsonl (but for wall-clock\nfields) are compared with a run without a kill. Seed {seed}.\n"
    )
    for processes, tally in tallies.items():
        text += f"\n## launch.processes: {processes}\n\n{summary(processes, tally)}\n\n"
        text += "".join(f"{number}. {kill}\n" for number, kill in enumerate(tally.kills, 1))
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="with one process")
    parser.add_argument("--kills-two", type=int, default=20, help="with two processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, help="write what was found there, as Markdown")
    given = parser.parse_args()
    tallies = {}
    for processes, kills in ((1, given.kills), (2, given.kills_two)):
        if kills:
            with tempfile.TemporaryDirectory(prefix="faults-") as folder:
                tallies[processes] = campaign(Path(folder), processes, kills, given.seed)
    for processes, tally in tallies.items():
        print(f"\n{summary(processes, tally)}")
    if given.page:
        given.page.write_text(page(tallies, given.seed), encoding="utf-8")
    return int(any(tally.wrong for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
