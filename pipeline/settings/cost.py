from __future__ import annotations

from typing import Literal

from pipeline.config import Strict, unhashed


class CostSettings(Strict):
    """What time, energy and people are worth, for the ledger and `prefline plan`. Nothing here is hashed."""

    price_per_hour: float = unhashed(0.0, ge=0)
    """What the machines of a run cost together in an hour; 0 leaves money out."""
    currency: str = unhashed("USD", pattern=r"^[A-Za-z$€£¥]{1,5}$")
    """Unit of price_per_hour."""
    grams_per_kwh: float = unhashed(480.0, ge=0)
    """Carbon intensity of the electricity, in g CO2e a kWh (480: the world's mean of 2023, Ember 2024)."""
    watts_per_core: float = unhashed(10.0, gt=0)
    """Power of a busy CPU core, its share of memory and cooling included, where no counter can be read."""
    energy: Literal["auto", "codecarbon"] = unhashed("auto")
    """auto: RAPL and NVML where they can be read, else an estimate that says so. codecarbon: that package
    (pip install prefline[energy])."""
    device_memory_gb: float | None = unhashed(None, gt=0)
    """Memory of one device that `prefline plan` warns about, in GB; null is what this machine has."""
    tokens_per_parameter: float = unhashed(20.0, gt=0)
    """`prefline plan` warns where pretraining is far from this ratio (Chinchilla, arXiv 2203.15556: about 20)."""
