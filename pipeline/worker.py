"""The child process: it runs the jobs that the parent writes, one after the other.

    python -m pipeline.worker JOBDIR      000.json, 001.json ... until a file `end` appears
    python -m stages.sft JOB.json         one job alone; every work directory keeps its job.json

Several ranks read the same files; only rank 0 publishes and writes `000.done`. What goes wrong on a
rank is written to `000.error0` (its number), so that the parent can say it whatever the launcher in
between does; where even that cannot be written, it is printed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline import artifacts, contract, crashes
from pipeline.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    ConfigError,
    StageError,
    Stopped,
    ToolkitError,
)
from pipeline.files import read_json, write_atomic
from pipeline.job import Inputs, Job, Metrics, Out
from pipeline.ledger import Meter
from pipeline.manifest import Manifest
from pipeline.processes import descends_from
from pipeline.settings import Settings

Run = Callable[[Settings, Inputs, Out], Metrics]
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# in the environment of children: the process that leads the run
OWNER = "PREFLINE_OWNER"
_POLL_SECONDS = 0.02
_TRACEBACK_LINES = 40
_PR_SET_PDEATHSIG = 1
# loaded here and not after a fork, where the loader's lock may be held
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

_signals_seen: list[int] = []


def stop_requested() -> bool:
    """Whether a signal asked this process to stop; a stage then saves and raises `Stopped`."""
    return bool(_signals_seen)


def main() -> None:
    """Entry of the child, and of every stage file; exits with the code of errors.py."""
    install()
    given = Path(sys.argv[1]) if len(sys.argv) == 2 else None
    if given is not None and given.is_dir():
        sys.exit(run_jobs(given))
    if given is not None and given.suffix == ".json" and given.is_file():
        sys.exit(run_file(given))
    spec = sys.modules["__main__"].__spec__
    name = spec.name if spec else "STAGE"
    print(  # noqa: T201 - the usage line of a program
        f"usage: python -m {name} JOB.json\n"
        "       job.json lies in the step's directory of a run, for example"
        " runs/demo/sft/4f9c2ab71d03/job.json",
        file=sys.stderr,
    )
    sys.exit(EXIT_BAD_INPUT)


def install() -> None:
    """Turn stop signals into a flag, and die with the parent."""
    for number in STOP_SIGNALS:
        signal.signal(number, _on_signal)
    die_with_parent()
    # a launcher, or the parent, that ended before that line takes nobody along: this is an orphan
    owner = os.environ.get(OWNER)
    if owner and not descends_from(int(owner)):
        sys.exit(EXIT_INTERRUPTED)


def die_with_parent() -> None:
    """Ask the kernel (Linux) to kill this process when its parent ends, however it ends."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _on_signal(number: int, _frame: FrameType | None) -> None:
    if number == signal.SIGINT and signal.SIGINT in _signals_seen:
        os._exit(EXIT_INTERRUPTED)
    _signals_seen.append(number)


# ---- jobs ----------------------------------------------------------------------------------


def run_jobs(folder: Path) -> int:
    """Work on the jobs in `folder` as they appear, until `end`; the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    machine = int(os.environ.get("GROUP_RANK", "0"))
    while machine and not folder.is_dir():
        # made by the first machine; a shared file system may show it late
        time.sleep(_POLL_SECONDS)
    # the parent signals the ranks themselves: launchers in between handle signals in their own way
    write_atomic(folder / pid_file(machine, rank), str(os.getpid()), durable=False)
    number = 0
    while True:
        file = folder / f"{number:03d}.json"
        if file.exists():
            # the parent tells people what went wrong; it reads the `.error0` file
            code = run_file(file, tell=False)
            if code != EXIT_DONE:
                return code
            number += 1
        elif stop_requested():
            # perhaps this rank alone was asked: the parent must not take it for dead
            return _report(file, Stopped("stopped between two steps; nothing is lost"), rank, False)
        elif (folder / "end").exists() or not folder.is_dir():
            return EXIT_DONE
        else:
            time.sleep(_POLL_SECONDS)


def pid_file(machine: int, rank: int | str) -> str:
    """Where a rank writes its process id. On other machines it means other processes."""
    return f"machine{machine}-rank{rank}.pid" if machine else f"rank{rank}.pid"


def rank_pids(folder: Path, machine: int) -> dict[int, int]:
    """The process id of each rank of a machine that has begun, by rank."""
    found = {}
    for path in sorted(folder.glob(pid_file(machine, "*"))):
        pid = read_json(path)
        if isinstance(pid, int):
            found[int(path.stem.rpartition("rank")[2])] = pid
    return found


def run_file(file: Path, tell: bool = True) -> int:
    """Run the job in `file`, and note how it went beside it; `tell` says it on stderr as well."""
    rank = int(os.environ.get("RANK", "0"))
    job = Job.from_json(file.read_text(encoding="utf-8"))
    try:
        run_job(job, rank, int(os.environ.get("WORLD_SIZE", "1")))
    except ToolkitError as error:
        return _report(file, error, rank, tell)
    except Exception as error:  # noqa: BLE001 - the last place where anything can be told
        log = job.work / f"rank{rank}.log"
        _keep_traceback(error, log)
        known = crashes.explain(error, job.step, job.stage, log)
        return _report(file, known, rank, tell, crashes.is_lost_partner(error))
    if rank == 0:
        sys.stdout.flush()
        sys.stderr.flush()
        write_atomic(file.with_suffix(".done"), "", durable=False)
    gc.collect()
    return EXIT_DONE


def run_job(job: Job, rank: int, world_size: int) -> None:
    """Call the stage's `run`; rank 0 then publishes what it made."""
    out = Out(job, rank, world_size)
    if rank == 0:
        artifacts.prepare(job.work)
    out.checkpoints.mkdir(parents=True, exist_ok=True)
    settings = Settings.model_validate(job.settings)
    run: Run = importlib.import_module(_module(job.module)).run
    # the clock starts here: imports are the line's overhead, not the stage's work
    meter, started = Meter(settings.cost, world_size), _now()
    if stop_requested():
        raise Stopped(f"{job.step}: stopped before it began")
    if rank == 0 and settings.run.tracker != "none":
        # by name, as the stages: the core knows nothing of trackers
        out.tracker = importlib.import_module("stages.tracking").open_tracker(job, out)
    try:
        metrics = run(settings, job.inputs, out)
    finally:
        if out.tracker:
            out.tracker.finish()
    if rank != 0:
        return
    contract.check_contract(job.step, out.contract)
    cost = meter.cost(out.cost)
    draft = Manifest.model_validate(
        {
            **job.manifest,
            "digest": "",
            "derived": {
                **job.manifest.get("derived", {}),
                **plain(out.derived, f"{job.step}: derived"),
            },
            "contract": plain(out.contract, f"{job.step}: contract"),
            "metrics": plain(metrics, f"{job.step}: metric"),
            "cost": cost,
            "world_size": world_size,
            "resumed_from": out.resumed_from,
            "started": started,
            "finished": _now(),
            "seconds": cost["seconds"],
        }
    )
    out.keep_rows()
    artifacts.publish(job.work, draft)
    out.say(f"done in {cost['seconds']:.1f} s")


def _module(name: str) -> str:
    """`name`, if it is what this program was started as, or if it was started as the worker."""
    spec = sys.modules["__main__"].__spec__
    if spec and spec.name.startswith(("stages.", "labeling_ui.")) and spec.name != name:
        raise ConfigError(f"this job is for {name}, not for {spec.name}", f"python -m {name} ...")
    return name


def plain(value: Any, what: str) -> Any:
    """`value` as JSON holds it; a number that is not finite is an error of the stage."""
    if isinstance(value, dict):
        return {str(key): plain(item, f"{what} {key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, what) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if not isinstance(value, float) and hasattr(value, "item"):
        return plain(value.item(), what)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise StageError(f"{what} is {value}; nothing was published")
        return value
    return str(value)


# ---- how it went ---------------------------------------------------------------------------


def _report(
    file: Path, error: ToolkitError, rank: int, tell: bool, lost_partner: bool = False
) -> int:
    """Note what went wrong, for the parent. lost_partner: only because of another rank."""
    row = {"exit_code": error.exit_code, "message": error.message, "hint": error.hint}
    try:
        place = file.with_suffix(f".error{rank}")
        write_atomic(place, json.dumps({**row, "lost_partner": lost_partner}), durable=False)
    except OSError:
        tell = True
    if tell:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
    return error.exit_code


def _keep_traceback(error: Exception, log: Path) -> None:
    lines = "".join(traceback.format_exception(error)).splitlines()
    # a full disk must not hide what is told
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8", errors="replace") as file:
        file.write("\n".join(lines[-_TRACEBACK_LINES:]) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    # stages ask `pipeline.worker.stop_requested()`: the flag must be that of the imported module,
    # of which `__main__` is a second copy
    importlib.import_module("pipeline.worker").main()
