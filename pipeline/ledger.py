"""What a step costs: seconds, tokens, FLOPs, memory, energy, carbon, money; and what a run has cost.

A cost is a flat dict of numbers in the manifest, recorded and never hashed:
seconds and busy_seconds (on the clock; of CPU time, all ranks), tokens, flops, utilisation (of the
measured peak), peak_memory_bytes (of rank 0) and device_peak_memory_bytes (of its GPU), energy_joules
with the share of it that was measured, carbon_grams, money, human_minutes. What is not known is left
out. A step that was killed and went on has the seconds since it went on.
"""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.energy import JOULES_PER_KWH, EnergyMeter
from pipeline.settings.cost import CostSettings

# what `total` adds up; of memory it takes the most, of shares the mean by weight
_SUMS = (
    "seconds",
    "busy_seconds",
    "tokens",
    "flops",
    "energy_joules",
    "carbon_grams",
    "money",
    "human_minutes",
)
_MOST = ("peak_memory_bytes", "device_peak_memory_bytes")


class Meter:
    """Measures one step, from its construction to `cost`.

    processes: the ranks that share the step's work equally; this one is rank 0.
    """

    def __init__(self, settings: CostSettings | None = None, processes: int = 1) -> None:
        self._settings = settings or CostSettings()
        self._processes = processes
        self._energy = EnergyMeter(self._settings)
        self._started, self._busy = time.perf_counter(), _cpu_seconds()
        _reset_peak()

    def cost(self, counted: dict[str, Any]) -> dict[str, float]:
        """The cost of the step so far; `counted` is what the stage counted itself."""
        seconds = time.perf_counter() - self._started
        busy = (_cpu_seconds() - self._busy) * self._processes
        cost = {key: float(value) for key, value in counted.items() if value is not None}
        cost["seconds"] = round(seconds, 3)
        cost["busy_seconds"] = round(busy, 3)
        cost["peak_memory_bytes"] = float(_peak_bytes())
        if device := _device_peak_bytes():
            cost["device_peak_memory_bytes"] = float(device)
        if cost.get("tokens"):
            cost["tokens_per_second"] = round(cost["tokens"] / max(seconds, 1e-9), 1)
        if share := utilisation(cost, self._processes):
            cost["utilisation"] = round(share, 4)
        joules, measured = self._energy.joules(busy)
        cost["energy_joules"] = round(joules, 2)
        cost["energy_measured_share"] = round(measured, 3)
        cost |= worth(seconds, joules, self._settings)
        return cost


def worth(seconds: float, joules: float, settings: CostSettings) -> dict[str, float]:
    """Carbon and, where a price is known, money, of so many seconds and joules."""
    found = {"carbon_grams": round(joules / JOULES_PER_KWH * settings.grams_per_kwh, 4)}
    if settings.price_per_hour:
        found["money"] = round(seconds / 3600 * settings.price_per_hour, 6)
    return found


def utilisation(cost: Mapping[str, float], processes: int) -> float | None:
    """Share of what the devices could have computed in that time, by their measured matrix products."""
    flops, peak, seconds = (cost.get(key) for key in ("flops", "peak_flops_per_second", "seconds"))
    if not flops or not peak or not seconds:
        return None
    return flops / (seconds * peak * processes)


def total(costs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The cost of several steps together; only what at least one of them knows."""
    rows = list(costs)
    found = {key: sum(row.get(key, 0.0) for row in rows) for key in _SUMS}
    found |= {key: max((row.get(key, 0.0) for row in rows), default=0.0) for key in _MOST}
    if joules := found["energy_joules"]:
        measured = (
            row.get("energy_joules", 0.0) * row.get("energy_measured_share", 0.0) for row in rows
        )
        found["energy_measured_share"] = sum(measured) / joules
    # each step's own share of its own peak, by the time that it took
    known = [row for row in rows if row.get("utilisation") and row.get("seconds")]
    if known:
        weights = sum(row["seconds"] for row in known)
        found["utilisation"] = sum(row["utilisation"] * row["seconds"] for row in known) / weights
    return {key: value for key, value in found.items() if value}


def line(cost: Mapping[str, float], currency: str = "") -> str:
    """A cost in one line for people."""
    parts = [f"{cost.get('seconds', 0.0):.1f} s"]
    if busy := cost.get("busy_seconds"):
        parts[0] += f" (CPU {busy:.1f} s)"
    if tokens := cost.get("tokens"):
        parts.append(f"{big(tokens)} tokens")
    if flops := cost.get("flops"):
        share = cost.get("utilisation")
        parts.append(big(flops, "FLOP") + (f" ({share:.0%} of the peak)" if share else ""))
    if memory := cost.get("peak_memory_bytes"):
        parts.append(f"{big(memory, 'B')} at most")
    if device := cost.get("device_peak_memory_bytes"):
        parts.append(f"{big(device, 'B')} on the device")
    if joules := cost.get("energy_joules"):
        parts.append(f"{joules / 3600:.2g} Wh ({source(cost)})")
        parts.append(f"{cost.get('carbon_grams', 0.0):.2g} g CO2e")
    if money := cost.get("money"):
        parts.append(f"{money:.2g} {currency}".strip())
    if minutes := cost.get("human_minutes"):
        parts.append(f"{minutes:.0f} minutes of people")
    return ", ".join(parts)


def source(cost: Mapping[str, float]) -> str:
    """How the energy of a cost is known."""
    share = cost.get("energy_measured_share", 0.0)
    return "measured" if share >= 0.999 else f"{share:.0%} measured" if share else "an estimate"


_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def big(value: float, unit: str = "") -> str:
    """1234567 -> `1.23 M`; with a unit, `1.23 MFLOP`."""
    # rounded first: 999,999 is 1 M
    value = float(f"{value:.3g}")
    power, prefix = next(((p, s) for p, s in _PREFIXES if abs(value) >= p), (1, ""))
    return f"{value / power:.3g} {prefix}{unit}".strip()


# ---- this process --------------------------------------------------------------------------


def _cpu_seconds() -> float:
    """CPU time of this process with all its threads, and of the children that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _device_peak_bytes() -> int:
    """Most memory that torch held on this process's GPU since `_reset_peak`; 0 without one."""
    # the core imports no torch; where a stage has, it is asked
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.max_memory_allocated())


def _reset_peak() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
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
