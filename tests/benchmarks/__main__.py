"""All benchmarks, one child process after the other, and the page that they make.

    python -m tests.benchmarks [NAME ...] [--page docs/benchmarks.md]      (make bench: all of them)

A benchmark that fails, is missing or takes too long stands in the table as such.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks import limits
from tests.benchmarks.common import table

_ROOT = Path(__file__).resolve().parents[2]
_TAIL_LINES = 12
_LIMIT = 600.0  # seconds of one benchmark


@dataclass(frozen=True)
class Benchmark:
    """module, arguments: how it is run. must, aim: peer / ours; None where there is no peer.

    compares: it ends with a line that says how many times faster we are than the peer.
    full: instead of `arguments` with --full.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    must: float | None = None
    aim: float | None = None
    compares: bool = True
    full: tuple[str, ...] | None = None


BENCHMARKS = (
    Benchmark("ppo_same", "ppo", ("same",), 1.7, 2.5),
    Benchmark("ppo_fast", "ppo", ("fast",), 3.0, 4.0),
    Benchmark("ppo_fast_bf16", "ppo", ("fast", "--bf16"), 3.6, 6.0),
    Benchmark("rollout", "rollout", (), 1.7, 2.0),
    Benchmark("reward_k4", "reward_k", ("4",), 2.7, 5.0),
    Benchmark("reward_k9", "reward_k", ("9",), 6.5, 15.0),
    Benchmark("pretrain", "pretrain", (), 0.98, None),
    Benchmark("pretrain_bf16", "pretrain", ("--precision", "bf16"), None, 1.9),
    Benchmark("scale", "scale", compares=False),
    Benchmark(
        "labels_load",
        "labels_load",
        ("--people", "20", "--rankings", "5", "--think", "1", "--kills", "1"),
        compares=False,
        full=(),
    ),
    Benchmark(
        "labels_million",
        "labels_million",
        ("--large", "50000", "--lonely", "5000", "--repeats", "60"),
        compares=False,
        full=(),
    ),
)


@dataclass(frozen=True)
class Result:
    """output: everything it printed. line: its JSON line. problem: why there is none."""

    benchmark: Benchmark
    command: str
    output: str
    line: dict[str, float] | None
    problem: str
    seconds: float


def run(benchmark: Benchmark, limit: float) -> Result:
    """Run one benchmark in a child for at most `limit` seconds; its log goes to our stderr."""
    words = ["-m", f"tests.benchmarks.{benchmark.module}", *benchmark.arguments]
    command = " ".join(["python", *words])
    print(f"\n== {command}", flush=True)
    start = time.monotonic()
    output, problem = "", ""
    try:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=_ROOT,
            env=os.environ | {"PYTHONPATH": str(_ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            timeout=limit,
            check=False,
        )
        output = done.stdout
        if done.returncode:
            problem = f"failed with exit code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        problem = f"took longer than {limit:.0f} s"
    print(output, flush=True)
    line = None if problem else last_line(output)
    if not problem and line is None and benchmark.compares:
        problem = "printed no JSON line"
    return Result(benchmark, command, output, line, problem, time.monotonic() - start)


def last_line(output: str) -> dict[str, float] | None:
    """The JSON line at the end of a benchmark's output, if there is one."""
    try:
        found = json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return None
    return found if isinstance(found, dict) and "ratio" in found else None


def page(results: list[Result], seconds: float) -> str:
    """docs/benchmarks.md."""
    rows = [_row(result) for result in results]
    head = ("benchmark", "peer / ours", "interval", "must", "aim", "verdict")
    parts = [
        "# Benchmarks",
        "Written by `make bench`. A figure is how many times faster we are than the peer: the median of"
        " interleaved pairs of process CPU-seconds on one thread, with a 95 % interval from order"
        " statistics. Both sides have the same weights, the same prompts and responses of the same"
        " prescribed lengths. Wall time on all cores, memory, and the distance from the measured matmul"
        " peak and from the FLOPs that the work needs without padding stand below, with the peers.",
        f"Machine: {limits.machine()}. Versions: {limits.versions()}. Time: {seconds / 60:.0f} minutes.",
        table(head, rows),
    ]
    for result in results:
        body = [line for line in result.output.strip().splitlines() if not last_line(line)]
        if result.problem:
            body = ["```", *body[-_TAIL_LINES:], result.problem, "```"]
        parts += [f"## {result.benchmark.name}", f"`{result.command}`", "\n".join(body)]
    return "\n\n".join(parts) + "\n"


def _row(result: Result) -> tuple[str, ...]:
    benchmark, line = result.benchmark, result.line
    goals = tuple("" if goal is None else f"{goal:g}" for goal in (benchmark.must, benchmark.aim))
    if line is None:
        return (benchmark.name, "", "", *goals, result.problem or "see below")
    reached = benchmark.must is None or line["ratio"] >= benchmark.must
    verdict = "reached" if reached else "MISSED"
    if benchmark.aim is not None and line["ratio"] < benchmark.aim and reached:
        verdict = "below the aim" if benchmark.must is None else "reached, below the aim"
    interval = f"{line['low']:.2f} .. {line['high']:.2f}"
    return (benchmark.name, f"{line['ratio']:.2f}", interval, *goals, verdict)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("names", nargs="*", help="which ones; all if none is named")
    parser.add_argument("--page", type=Path, help="write the results to this file")
    parser.add_argument("--minutes", type=float, default=39, help="for all of them together")
    parser.add_argument(
        "--full", action="store_true", help="the label store at full size: needs --minutes 90"
    )
    given = parser.parse_args(arguments)
    known = [benchmark.name for benchmark in BENCHMARKS]
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    start = time.monotonic()
    chosen = [b for b in BENCHMARKS if not given.names or b.name in given.names]
    end = start + 60 * given.minutes
    limit = 60 * given.minutes if given.full else _LIMIT
    if given.full:
        chosen = [b if b.full is None else replace(b, arguments=b.full) for b in chosen]
    # the first may not take what the last need
    results = [run(one, max(1.0, min(limit, end - time.monotonic()))) for one in chosen]
    text = page(results, time.monotonic() - start)
    if given.page:
        given.page.write_text(text, encoding="utf-8")
    print(text.split("\n## ")[0])
    sys.exit(any(result.problem for result in results))


if __name__ == "__main__":
    main()
