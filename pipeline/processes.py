"""Other processes, by their ids: whether they live, and telling them something."""

from __future__ import annotations

import os
from pathlib import Path


def stat(pid: int) -> list[str] | None:
    """What `man 5 proc` calls the stat of a process, from its state on; None: it is gone, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # the name in brackets may hold anything
    return text.rpartition(")")[2].split() or None


def descends_from(ancestor: int) -> bool:
    """Whether a living process is a parent of this one, or a parent of its parent, and so on.

    Where there is no /proc, that cannot be known, and is believed.
    """
    if not Path("/proc/self").exists():
        return True
    pid = os.getpid()
    while pid > 1 and pid != ancestor:
        fields = stat(pid)
        pid = int(fields[1]) if fields else 0
    return pid == ancestor


def send(pid: int, number: int) -> None:
    """Send a signal to a process, or to a group (minus its id), that may have ended by now."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
