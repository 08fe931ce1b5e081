"""What a step costs: seconds, tokens, FLOPs, peak memory."""

from __future__ import annotations

import re
import resource
import time
from pathlib import Path
from typing import Any


class Meter:
    """Measures one step, from its construction to `cost`."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        _reset_peak()

    def cost(self, counted: dict[str, Any]) -> dict[str, float]:
        """The cost of the step so far; `counted` is what the stage counted itself."""
        seconds = time.perf_counter() - self._started
        cost = {key: float(value) for key, value in counted.items() if value is not None}
        cost["seconds"] = round(seconds, 3)
        cost["peak_memory_bytes"] = float(_peak_bytes())
        if cost.get("tokens"):
            cost["tokens_per_second"] = round(cost["tokens"] / max(seconds, 1e-9), 1)
        return cost


def _reset_peak() -> None:
    # Linux only: consecutive steps share a process, and each should be charged its own peak
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
