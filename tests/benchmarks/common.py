"""Ours against a peer: interleaved timings, ratios of pairs, memory, a table and one JSON line.

Every benchmark is a module of this folder that calls `compare` once and is run from the repository's
root, e.g. `python -m tests.benchmarks.rollout`. A side is a function that builds everything and
returns the step to be timed, so that a process which measures memory builds one side only.

CPU-seconds of one thread decide, because they hardly depend on what else the machine does; wall
time on all cores is shown beside them.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from math import comb
from pathlib import Path
from typing import NamedTuple

import torch

from tests.benchmarks import limits

Step = Callable[[], object]
Side = Callable[[], Step]

_ONE_SIDE = "PREFLINE_BENCHMARK_SIDE"


class Seconds(NamedTuple):
    """Seconds of each repeat; ours[i] and peer[i] were taken directly after one another."""

    ours: list[float]
    peer: list[float]


class Interval(NamedTuple):
    """Median of paired ratios and an interval that holds the true median in 95 % of such runs."""

    ratio: float
    low: float
    high: float


def interleave(
    ours: Step,
    peer: Step,
    repeats: int,
    threads: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> Seconds:
    """Time both steps `repeats` times in turns; who goes first alternates.

    Neither is warmed up: call each once before.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds = Seconds([], [])
    try:
        for repeat in range(repeats):
            turns = [(ours, seconds.ours), (peer, seconds.peer)]
            for step, taken in turns if repeat % 2 == 0 else reversed(turns):
                # garbage of one side must not be collected on the other's time
                gc.collect()
                start = clock()
                step()
                taken.append(clock() - start)
    finally:
        torch.set_num_threads(before)
    return seconds


def paired_ratio(seconds: Seconds) -> Interval:
    """How many times faster ours is: the median of peer / ours over the pairs.

    low, high: order statistics of the ratios. With n pairs the k-th smallest and k-th largest hold
    the median with probability 1 - 2 P(X < k), X ~ Binomial(n, 1/2), whatever the distribution; k is
    the largest for which that is 95 %, or 1 (below 6 pairs no two of them reach 95 %).
    """
    ratios = sorted(p / o for o, p in zip(seconds.ours, seconds.peer, strict=True))
    n, k = len(ratios), 1
    while sum(comb(n, i) for i in range(k + 1)) / 2**n <= 0.025:
        k += 1
    return Interval(statistics.median(ratios), ratios[k - 1], ratios[n - k])


def compare(
    name: str,
    ours: Side,
    peer: Side,
    *,
    floor_flops: float,
    repeats: int = 7,
    wall_repeats: int = 2,
    precision: str = "fp32",
) -> None:
    """Run a benchmark: print its table and, last, its JSON line.

    floor_flops: what one step needs if nothing is padded or done twice, multiply and add counted
    apart (see limits.py). precision: that of our matmuls, "fp32" or "bf16".
    """
    sides = {"ours": ours, "peer": peer}
    alone = os.environ.get(_ONE_SIDE)
    if alone:
        _measure_memory(sides[alone])
        return
    steps = {label: side() for label, side in sides.items()}
    cores = limits.usable_cores()
    for step in steps.values():
        step()
    peaks = {kind: limits.matmul_peak(kind) for kind in ("fp32", "bf16")}
    cpu = interleave(steps["ours"], steps["peer"], repeats)
    wall = interleave(steps["ours"], steps["peer"], wall_repeats, cores, time.perf_counter)
    memory = {label: _memory_of(label) for label in sides}
    ratio = paired_ratio(cpu)

    print(f"{name}: {', '.join(sides)} on {limits.machine()}")
    print(f"versions: {limits.versions()}")
    print(
        "matmul peak, 1 thread: "
        + ", ".join(f"{kind} {peak / 1e9:.0f} GFLOP/s" for kind, peak in peaks.items())
        + f"; no-padding floor of a step: {floor_flops / 1e9:.1f} GFLOP"
    )
    rows = []
    for label in sides:
        seconds = statistics.median(getattr(cpu, label))
        peak = peaks[precision if label == "ours" else "fp32"]
        rows.append(
            (
                label,
                f"{seconds:.3f}",
                f"{statistics.median(getattr(wall, label)):.3f}",
                f"{floor_flops / seconds / 1e9:.0f}",
                f"{seconds * peak / floor_flops:.2f}",
                f"{memory[label][0]:.0f}",
                f"{memory[label][1]:.0f}",
            )
        )
    print()
    print(
        table(
            (
                "side",
                "CPU s, 1 thread",
                f"wall s, {cores} threads",
                "useful GFLOP/s",
                "x floor at peak",
                "peak RSS MB",
                "of it before the step",
            ),
            rows,
        )
    )
    print()
    apart = paired_ratio(wall)
    print(
        f"peer / ours: {ratio.ratio:.2f} ({ratio.low:.2f} .. {ratio.high:.2f}) in CPU-seconds over"
        f" {repeats} pairs; {apart.ratio:.2f} ({apart.low:.2f} .. {apart.high:.2f}) in wall time over"
        f" {wall_repeats} pairs"
    )
    print(json_line(name, ratio), flush=True)


def json_line(name: str, ratio: Interval) -> str:
    rounded = {key: round(value, 3) for key, value in ratio._asdict().items()}
    return json.dumps({"benchmark": name, **rounded})


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table with aligned columns; the first column to the left, numbers to the right."""
    width = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: tuple[str, ...]) -> str:
        first, *rest = (
            cell.ljust(size) if i == 0 else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(cells, width, strict=True))
        )
        return f"| {' | '.join([first, *rest])} |"

    rule = (
        "|"
        + "|".join("-" * (s + 2) if i == 0 else "-" * (s + 1) + ":" for i, s in enumerate(width))
        + "|"
    )
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


# ---- memory: one side, one process ---------------------------------------------------------


def peak_rss() -> float:
    """The most memory that this process has held, in MB."""
    # not ru_maxrss: after fork and exec it begins at the parent's size
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1024**2 if sys.platform == "darwin" else 1024)


def _measure_memory(side: Side) -> None:
    torch.set_num_threads(1)
    step = side()
    before = peak_rss()
    step()
    print(json.dumps({"peak": peak_rss(), "before": before}))


def _memory_of(label: str) -> tuple[float, float]:
    """Peak RSS of a side in MB, and how much of it there was before the step: models and libraries."""
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "run a benchmark as a module: python -m tests.benchmarks.NAME"
    done = subprocess.run(
        [sys.executable, "-m", spec.name, *sys.argv[1:]],
        env=os.environ | {_ONE_SIDE: label},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["peak"], found["before"]
