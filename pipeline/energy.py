"""Joules of a step: counters of the processor and of NVIDIA devices, or an estimate that says it is one.

RAPL and NVML count the whole machine, whoever used it.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.settings.cost import CostSettings

JOULES_PER_KWH = 3.6e6
_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts from its construction to `joules`."""

    def __init__(self, settings: CostSettings, powercap: Path = _POWERCAP) -> None:
        self._settings = settings
        self._tracker = _codecarbon() if settings.energy == "codecarbon" else None
        self._rapl = _Rapl(powercap)
        self._nvml = _nvml_joules()
        self._gpu_start = self._nvml() if self._nvml else 0.0

    def joules(self, busy_seconds: float) -> tuple[float, float]:
        """Energy so far, and the share of it that was measured.

        busy_seconds: CPU time of the step, for the estimate. Without a counter of its own a GPU is not
        estimated: what it drew is not known, and the share says so.
        """
        if self._tracker is not None:
            self._tracker.stop()
            # it only logs what goes wrong in it, and then has no result
            found = getattr(self._tracker, "final_emissions_data", None)
            if found is not None:
                # where it finds no counter it takes a typical processor's power
                measured = float(self._rapl.joules() is not None)
                return found.energy_consumed * JOULES_PER_KWH, measured
        gpu = self._nvml() - self._gpu_start if self._nvml else 0.0
        cpu = self._rapl.joules()
        if cpu is not None:
            return cpu + gpu, 1.0
        estimated = busy_seconds * self._settings.watts_per_core
        return estimated + gpu, gpu / (estimated + gpu) if gpu else 0.0


class _Rapl:
    """The packages of the processor and their memory, as the kernel shows them (readable by root only on
    most machines)."""

    def __init__(self, folder: Path) -> None:
        self._zones = [zone for zone in sorted(folder.glob("*rapl:*")) if _counts(zone)]
        self._start = self._read()

    def joules(self) -> float | None:
        """Since construction; None where nothing can be read."""
        now = self._read()
        if not self._start or now.keys() != self._start.keys():
            return None
        total = 0
        for zone, value in now.items():
            delta = value - self._start[zone]
            if delta < 0:  # the counter began anew
                delta += int(_text(zone / "max_energy_range_uj") or 0)
            total += delta
        return total / 1e6

    def _read(self) -> dict[Path, int]:
        found = {zone: _text(zone / "energy_uj") for zone in self._zones}
        return {zone: int(text) for zone, text in found.items() if text}


def _counts(zone: Path) -> bool:
    # core and uncore are parts of a package, psys holds everything once more
    return (_text(zone / "name") or "").startswith(("package", "dram"))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _nvml_joules() -> Callable[[], float] | None:
    """What all NVIDIA devices have used since their driver was loaded; None where none can tell."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) or not count.value:
        return None

    def joules() -> float:
        total = 0.0
        for number in range(count.value):
            device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
            if nvml.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(device)):
                continue
            # Volta and later; older ones answer "not supported"
            if not nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)):
                total += millijoules.value / 1e3
        return total

    return joules if joules() > 0 else None


def _codecarbon() -> Any:
    try:
        # by name: an extra that few have installed, and no part of the core
        codecarbon = importlib.import_module("codecarbon")
    except ImportError:
        raise ConfigError(
            "cost.energy: codecarbon is not installed",
            "pip install 'prefline[energy]', or set cost.energy=auto.",
        ) from None
    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    tracker = codecarbon.OfflineEmissionsTracker(
        country_iso_code="USA",  # only its energy is read; carbon comes from cost.grams_per_kwh
        save_to_file=False,
        log_level="error",
        allow_multiple_runs=True,
    )
    tracker.start()
    return tracker
