"""What a lead looks at, in numbers: what the store holds, and how far it can be trusted.

Counts are made anew each time. The statistics take seconds with many rankings; they are kept for a
while and say when they were made. Whenever they are made, both come from one read transaction.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from labeling_ui.agreement import (
    Agreement,
    PositionBias,
    agreement,
    length_preference,
    position_bias,
)
from labeling_ui.counting import Counts, count
from labeling_ui.judgements import Estimate, Judgement
from labeling_ui.quality import AnnotatorQuality, quality
from labeling_ui.store import Store
from labeling_ui.stored_judgements import Judgements

KEPT_SECONDS = 15.0
"""Statistics are not made again before this time, or ten times what making them took."""


@dataclass(frozen=True)
class Statistics:
    at: float
    agreement: Agreement
    position: PositionBias
    longer_wins: Estimate | None
    people: dict[int, AnnotatorQuality]
    """By user id; nobody who has neither ranked nor skipped anything that counts."""


@dataclass(frozen=True)
class Overview:
    at: float
    counts: Counts
    statistics: Statistics

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not a number is null."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        return plain


class Dashboard:
    """Overviews of one store, for several readers at once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._judgements = Judgements()
        self._computing = threading.Lock()
        self._last: Statistics | None = None
        self._until = 0.0

    def overview(self, now: float | None = None) -> Overview:
        """The state of the store; its statistics may be some seconds old."""
        now = time.time() if now is None else now
        # one at a time: a second reader takes what the first has computed
        with self._computing:
            start = time.monotonic()
            with self.store.read() as tx:
                counts = count(tx, now)
                is_kept = self._last is not None and start < self._until
                judgements = [] if is_kept else self._judgements.read(tx)
            if self._last is None or not is_kept:
                self._last = statistics(judgements, now)
                end = time.monotonic()
                self._until = end + max(KEPT_SECONDS, 10 * (end - start))
            return Overview(now, counts, self._last)


def statistics(judgements: list[Judgement], now: float) -> Statistics:
    # gold items are chosen to be clear: agreement on them says little of the work
    work = [found for found in judgements if found.task.gold is None]
    return Statistics(
        at=now,
        agreement=agreement(work),
        position=position_bias(work),
        longer_wins=length_preference(work),
        people={int(found.annotator): found for found in quality(judgements)},
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
