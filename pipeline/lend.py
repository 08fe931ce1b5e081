"""A machine that is not the first: it lends its processes to the run that machine 0 leads.

It plans nothing and takes no lock. Its ranks find their jobs where those of machine 0 do, in the run
directory, which has to be the same folder on all machines.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

from pipeline import launch
from pipeline.crew import SEVERAL, StopFlag
from pipeline.errors import ConfigError, StageError, Stopped
from pipeline.processes import send
from pipeline.worker import STOP_SIGNALS, die_with_parent, rank_pids
from pipeline.workspace import Run

_POLL_SECONDS = 0.1


def lend(run: Run) -> None:
    """Start this machine's ranks, and wait until machine 0 needs them no more.

    Raises:
        ConfigError: the settings know of no other machine.
        Stopped: a signal came, and the ranks have ended.
        StageError: they ended otherwise; machine 0 says why.
    """
    settings = run.settings.launch
    machines, own = launch.num_machines(settings), settings.machine_rank
    if machines == 1:
        raise ConfigError(
            f"launch.machine_rank is {own}, but launch.machines says there is only one"
        )
    folder = run.jobs.absolute() / SEVERAL
    print(  # noqa: T201
        f"machine {own} of {machines}: waiting for {settings.main_address}:{settings.main_port},"
        f" which leads {run.path}",
        file=sys.stderr,
        flush=True,
    )
    stop = StopFlag()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stop.set(number)
        for pid in rank_pids(folder, own).values():
            send(pid, number)

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    child = subprocess.Popen(
        launch.command(settings, True, folder),
        env=launch.environment(settings),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    try:
        while child.poll() is None:
            # before its ranks are up there is nobody who could save anything
            if stop.expired(settings.grace_seconds) or (stop.number and not rank_pids(folder, own)):
                os.killpg(child.pid, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.number is not None:
        raise Stopped(f"machine {own}: stopped; machine 0 says how far the run is")
    if child.returncode:
        raise StageError(
            f"machine {own}: its processes ended with code {child.returncode}",
            "Machine 0 says why.",
        )
