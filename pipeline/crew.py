"""Child processes: what they are given, what they hear, and what their end means.

A child lives as long as consecutive steps share its launch, so that torch is imported once.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from pipeline.crashes import memory_hint
from pipeline.errors import (
    EXIT_INTERRUPTED,
    ArtifactError,
    DataError,
    PeopleNeeded,
    StageError,
    Stopped,
    ToolkitError,
)
from pipeline.files import read_json, write_atomic
from pipeline.job import Job
from pipeline.launch import check_profile, command, environment, is_several
from pipeline.processes import send, stat
from pipeline.settings.launch import LaunchSettings
from pipeline.worker import STOP_SIGNALS, die_with_parent, rank_pids

LOG = "rank0.log"
# the folder of the child with several processes, where other machines find its jobs
SEVERAL = "several"
_POLL_SECONDS = 0.01
_WATCH_SECONDS = 0.2
_LAST_WORD_SECONDS = 1.0
_LOG_LINES = 15
_BY_CODE: dict[int, type[ToolkitError]] = {
    kind.exit_code: kind for kind in (StageError, DataError, PeopleNeeded, ArtifactError, Stopped)
}


class Interrupted(ToolkitError):
    """The second Ctrl-C: everything ends now. Exit 130."""

    exit_code = EXIT_INTERRUPTED


# ---- one child -----------------------------------------------------------------------------


class Child:
    """A worker that runs jobs one after the other."""

    def __init__(self, settings: LaunchSettings, several: bool, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._settings = settings
        self._number = 0
        self._log: Path | None = None
        self._tail: deque[str] = deque(maxlen=_LOG_LINES)
        self._lost: list[str] = []
        self._process = subprocess.Popen(
            command(settings, several, folder),
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches the parent alone, which passes it on to the ranks
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self._tee = threading.Thread(target=self._copy_output, daemon=True)
        self._tee.start()

    def run(self, job: Job, stop: StopFlag) -> None:
        """Give the child a job and wait until it is done.

        Raises:
            ToolkitError: as the child reported, or because it was killed.
        """
        name = f"{self._number:03d}"
        self._number += 1
        job.work.mkdir(parents=True, exist_ok=True)
        self._log = job.work / LOG
        text = job.to_json()
        write_atomic(job.work / "job.json", text, durable=False)
        write_atomic(self._folder / f"{name}.json", text, durable=False)
        self._tail.clear()
        done = self._folder / f"{name}.done"
        looked = time.monotonic()
        while not done.exists():
            if time.monotonic() - looked > _WATCH_SECONDS:
                looked = time.monotonic()
                self._lost = self._lost or self._ranks_that_are_gone()
            code = self._process.poll()
            if code is not None:
                # it may have written its last word between the two looks
                if done.exists():
                    return
                raise self._verdict(job, name, code, stop)
            if any(self._folder.glob(f"{name}.error*")):
                # the other ranks tell the same in a moment, or the one that does not is the cause
                time.sleep(_LAST_WORD_SECONDS if len(rank_pids(self._folder, machine=0)) > 1 else 0)
                self._lost = self._lost or self._ranks_that_are_gone(name)
                raise self._verdict(job, name, self._end_soon(), stop)
            if stop.expired(self._settings.grace_seconds):
                self.kill()
            time.sleep(_POLL_SECONDS)

    def forward(self, number: int) -> None:
        """Pass a signal on to the ranks (to the whole group while no rank is up)."""
        pids = rank_pids(self._folder, machine=0)
        for pid in pids.values():
            send(pid, number)
        if not pids and self._process.poll() is None:
            send(-self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the child and everything it started, now."""
        if self._process.poll() is None:
            send(-self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Let an idle child end; kill one that does not."""
        if self._process.poll() is None:
            write_atomic(self._folder / "end", "", durable=False)
            self._end_soon(10.0)
        self._tee.join(timeout=2)

    def _end_soon(self, seconds: float = 5.0) -> int:
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def _ranks_that_are_gone(self, name: str = "") -> list[str]:
        """Which of several ranks has ended or been stopped while the others wait for it, in words.

        name: of a job that some ranks gave up; one that has not is named too.
        """
        ranks = rank_pids(self._folder, machine=0)
        found = []
        for rank, pid in ranks.items() if len(ranks) > 1 else ():
            state = process_state(pid)
            if (self._folder / f"{name}.error{rank}").exists():
                continue
            if state in (None, "Z", "X"):
                found.append(f"rank {rank} has died")
            elif name and state in ("T", "t"):
                found.append(f"rank {rank} stands still (stopped by a signal)")
            elif name:
                found.append(f"rank {rank} did not answer")
        return found

    def _verdict(self, job: Job, name: str, code: int, stop: StopFlag) -> ToolkitError:
        """What the end of the child means to the user."""
        self._tee.join(timeout=2)
        log = f"Log: {job.work / LOG}"
        rows = [read_json(path) for path in sorted(self._folder.glob(f"{name}.error*"))]
        rows = [row for row in rows if isinstance(row, dict)] or self._told()
        # a rank that knows the cause goes before those that only lost their partner
        for row in sorted(rows, key=lambda row: row["lost_partner"]):
            if row["lost_partner"] and self._lost:
                break
            return _BY_CODE.get(row["exit_code"], StageError)(row["message"], row["hint"])
        if stop.number is not None:
            late = f" after {self._settings.grace_seconds} s by force" if stop.killed else ""
            return Stopped(f"{job.step}: stopped{late}; it goes on from its last checkpoint")
        how = (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )
        what = ", ".join(self._lost) or f"the process {how}"
        tail = "\n".join(f"  | {line}" for line in self._tail)
        # one that stood still was killed by us
        killed = any("died" in text for text in self._lost) or (
            code == -signal.SIGKILL and not self._lost
        )
        memory = f" Perhaps for lack of memory: {memory_hint(job.stage)}" if killed else ""
        return StageError(
            f"{job.step}: {what}.{memory}\nThe last lines:\n{tail or '  | (none)'}",
            f"`prefline resume` goes on from the last checkpoint. {log}",
        )

    def _told(self) -> list[dict[str, Any]]:
        """What a worker printed because it could not write it: the disk is full."""
        for number, line in enumerate(self._tail):
            if line.startswith("error: "):
                hint = " ".join(text.strip() for text in list(self._tail)[number + 1 :][:1])
                message = line.removeprefix("error: ")
                row = {"exit_code": StageError.exit_code, "message": message, "hint": hint or None}
                return [{**row, "lost_partner": False}]
        return []

    def _copy_output(self) -> None:
        """Everything the child prints goes to the user's stderr and to the log of the step."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            text = line.decode("utf-8", "replace")
            self._tail.append(text.rstrip())
            sys.stderr.write(text)
            sys.stderr.flush()
            # a child that is not listened to would stand still: on a full disk the log has a gap
            with contextlib.suppress(OSError):
                if self._log is not None:
                    with self._log.open("ab") as file:
                        file.write(line)


def process_state(pid: int) -> str | None:
    """The letter of `man 5 proc` (R, S, D, T, Z ...; ? where there is no /proc); None: it is gone."""
    if not Path("/proc/self").exists():
        return "?"
    fields = stat(pid)
    return fields[0] if fields else None


# ---- all children of one command -----------------------------------------------------------


class StopFlag:
    """Whether and when this process was asked to stop."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.killed = False
        self._since = 0.0

    def set(self, number: int) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()

    def expired(self, grace_seconds: float) -> bool:
        if self.number is None or time.monotonic() - self._since < grace_seconds:
            return False
        self.killed = True
        return True


class Crew:
    """The children of one `prefline run`: at most one plain and one distributed. A context manager.

    Inside it TERM, INT, USR1 and USR2 are passed on; a second INT ends everything.
    """

    def __init__(self, settings: LaunchSettings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._children: dict[bool, Child] = {}
        self._before: dict[int, object] = {}
        self._interrupts = 0
        self.stop = StopFlag()

    def __enter__(self) -> Crew:
        shutil.rmtree(self._folder, ignore_errors=True)
        # only the main thread may; a test that runs in another one gets no signals
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in self._children.values():
            if error is None:
                child.close()
            else:
                child.kill()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, job: Job) -> None:
        """Run a job in the child of its launch profile; starts that child if need be."""
        self.check_stop(job.step)
        # the rank step is about people: one process, whatever training needs
        several = is_several(self._settings) and job.stage not in ("rank", "judge")
        if several not in self._children:
            if several:
                check_profile(self._settings.profile)
            folder = self._folder / (SEVERAL if several else "plain")
            self._children[several] = Child(self._settings, several, folder)
        self._children[several].run(job, self.stop)

    def check_stop(self, step: str) -> None:
        """Refuse to begin anything after a signal."""
        if self.stop.number is not None:
            raise Stopped(f"stopped before {step}; nothing is lost")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise Interrupted("interrupted", "Everything up to the last checkpoint is kept.")
        self.stop.set(number)
        for child in self._children.values():
            child.forward(number)
        print(  # noqa: T201
            "\nstopping at the next safe point; Ctrl-C again stops at once",
            file=sys.stderr,
            flush=True,
        )
