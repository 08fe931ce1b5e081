"""Rows of a step's metrics.jsonl, as two runs with the same settings must agree on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_WALL_CLOCK = ("time", "tokens_per_second")


def timeless_rows(path: Path) -> list[dict[str, Any]]:
    """The rows without their wall-clock fields."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in _WALL_CLOCK} for x in lines]
