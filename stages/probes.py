"""Clocks for the planner: how long a piece of work takes here, on the clock and of CPU time.

A machine that others use too makes everything slower on the clock, and CPU time hardly: the main thread's
CPU time is what the clock would show on a free one, as long as nothing waits for a GPU or a disk.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from stages.generation import generate


@dataclass
class Seconds:
    """wall: on the clock. busy: CPU time of all threads. main: CPU time of the main thread."""

    wall: float = 0.0
    busy: float = 0.0
    main: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.busy + other.busy, self.main + other.main)

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.wall * times, self.busy * times, self.main * times)

    def __sub__(self, other: Seconds) -> Seconds:
        return self + other * -1.0

    def at_least_zero(self) -> Seconds:
        return Seconds(max(0.0, self.wall), max(0.0, self.busy), max(0.0, self.main))


@contextmanager
def clock(device: torch.device) -> Iterator[Seconds]:
    """Measures what happens inside."""
    found = Seconds()
    begun = now(device)
    yield found
    ended = now(device)
    found.wall, found.busy, found.main = (b - a for a, b in zip(begun, ended, strict=True))


def now(device: torch.device) -> tuple[float, float, float]:
    """The clock, and the CPU time of all threads and of this one, once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time(), time.thread_time()


def measure(
    work: Callable[[], object], device: torch.device, budget: float = 0.6, most: int = 20
) -> Seconds:
    """What `work` takes once it is warm: the median of as many as fit into `budget` seconds of CPU time.

    Two at least, the first left out. Work that takes all of the budget at once is its own measure.
    """
    found: list[Seconds] = []
    spent = 0.0
    while len(found) < most + 1:
        with clock(device) as seconds:
            work()
        found.append(seconds)
        spent += max(seconds.main, seconds.wall if device.type == "cuda" else 0.0)
        if spent > budget and (len(found) > 2 or seconds.main > budget):
            break
    kept = found[1:] or found
    return Seconds(
        *(statistics.median(getattr(s, name) for s in kept) for name in ("wall", "busy", "main"))
    )


@dataclass(frozen=True)
class DecodeCost:
    """A response, by its parts: to read a prompt; a step of the batch, and of each row that is alive."""

    prompt: Seconds
    step: Seconds
    row: Seconds

    def batch(self, lengths: Sequence[int]) -> Seconds:
        """Responses of these lengths that are decoded together; rows leave as they end."""
        lengths = sorted(lengths)
        steps = lengths[-1] if lengths else 0
        return self.prompt * len(lengths) + self.step * steps + self.row * sum(lengths)

    def all(self, lengths: Sequence[int], count: float, rows_at_once: int) -> Seconds:
        """`count` responses in batches; their lengths are spread like `lengths`."""
        if count <= 0 or not lengths:
            return Seconds()
        rows = int(min(rows_at_once, max(1.0, count)))
        return self.batch(spread(lengths, rows)) * (count / rows)


def spread(lengths: Sequence[int], count: int) -> list[int]:
    """`count` lengths with the same distribution: its quantiles, in the middle of each part."""
    ordered = sorted(lengths)
    return [ordered[int((i + 0.5) / count * len(ordered))] for i in range(count)]


def decode_cost(
    model: PreTrainedModel, prompts: list[list[int]], lengths: Sequence[int], rows: int, pad_id: int
) -> DecodeCost:
    """Measured on this model, in the middle of a response of typical length.

    prompts: real ones; rows: that are decoded at once.
    """
    rows = max(1, rows)
    middle = sum(lengths) // (2 * len(lengths))
    short = [prompts[i % len(prompts)] for i in range(rows)]
    long = [prompt + prompt[-1:] * middle for prompt in short]
    few = max(1, rows // 4)
    steps = 12

    def seconds(batch: list[list[int]], tokens: int) -> Seconds:
        # no token is the end: how long a response becomes is not the business of random weights
        return measure(
            lambda: generate(
                model, batch, list(range(len(batch))), eos_id=-1, pad_id=pad_id,
                max_response_tokens=tokens, rows_at_once=len(batch),
            ),
            model.device, budget=0.4,
        )  # fmt: skip

    prompt = seconds(short, 1) * (1 / rows)
    many_step = (seconds(long, steps + 1) - seconds(long, 1)) * (1 / steps)
    if few == rows:
        return DecodeCost(prompt, Seconds(), (many_step * (1 / rows)).at_least_zero())
    few_step = (seconds(long[:few], steps + 1) - seconds(long[:few], 1)) * (1 / steps)
    row = ((many_step - few_step) * (1 / (rows - few))).at_least_zero()
    return DecodeCost(prompt, (many_step - row * rows).at_least_zero(), row)


# ---- this process and its machine ----------------------------------------------------------


def cores_busy_elsewhere(
    since: tuple[float, float, float] | None = None,
) -> tuple[float, float, float]:
    """(clock, CPU seconds of the whole machine, of this process); the difference of two tells what
    others used. Zeros where the kernel does not say."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0, 0.0, 0.0
    user, nice, system, _idle, _wait, irq, soft, *_ = (float(word) for word in words)
    total = (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
    now = (time.perf_counter(), total, time.process_time())
    if since is None:
        return now
    return now[0] - since[0], now[1] - since[1], now[2] - since[2]


def resident_bytes() -> int:
    """Memory of this process now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
