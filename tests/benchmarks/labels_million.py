"""labels_million: what a claim, a submission and an export cost as the label store grows.

    python -m tests.benchmarks.labels_million [--large 1000000] [--only claims|export] [--keep DIR]

Two stores are made by bulk SQL, with 1,000 and with 1,000,000 rankings (overlap 2, half of them in a
queue that is still open, a tenth of its prompts without any). Claims, submissions and the progress
that a person sees are timed in both in turns; the table has the 95th percentile of each and the
ratio, which must be at most 3. The export of each runs in a process of its own, whose peak memory
above what it takes to start is shown: it must not grow with the store.

The last rows are the weak spot that was looked for: one person who has ranked very many prompts
that still wait for a second one.
"""

from __future__ import annotations

import argparse
import json
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from labeling_ui.assignments import claim, submit
from labeling_ui.changes import recent
from labeling_ui.export_files import Options, export_folder
from labeling_ui.progress import my_progress, progress
from labeling_ui.store import Store, task_row
from pipeline.records import canonical_json, content_id
from tests.benchmarks import limits
from tests.benchmarks.common import table

SMALL = 1_000
LARGE = 1_000_000
MUST = 3.0
PEOPLE = 20
RESPONSES = 4
NOW = 2_000_000_000.0
_REPEATS = 150
_CHUNK = 10_000
ACTS = ("claim", "submit", "recent", "my_progress", "progress")
T = TypeVar("T")
_SENTENCE = "the fox and a river that knew every way home but one said nothing at all"
_WORDS = _SENTENCE.split()


# ---- stores --------------------------------------------------------------------------------


def build(path: Path, rankings: int, lonely: bool = False) -> None:
    """A store with so many rankings, two a prompt, made without its own code for speed.

    Args:
        lonely: the first person has ranked all prompts, nobody else any: each waits for one more.
    """
    Store(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA synchronous = OFF")
        raw.execute("PRAGMA foreign_keys = OFF")
        people = [("person", f"p{i}", "annotator", True, 0, 0.0) for i in range(PEOPLE)]
        columns = "kind, name, role, active, session, created"
        raw.executemany(f"INSERT INTO users ({columns}) VALUES (?, ?, ?, ?, ?, ?)", people)
        queues = [("rank", "people", 2, 30, False), ("rank-2", "people", 2, 30, True)]
        columns = "step, by, overlap, lease_minutes, open"
        raw.executemany(f"INSERT INTO queues ({columns}) VALUES (?, ?, ?, ?, ?)", queues)
        per_task = 1 if lonely else 2
        ranked = rankings // per_task
        for start in range(0, ranked, _CHUNK):
            _fill(raw, range(start, min(start + _CHUNK, ranked)), per_task, lonely)
        _fill(raw, range(ranked, ranked + max(1_000, ranked // 10)), 0, lonely)
        raw.commit()
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _fill(raw: sqlite3.Connection, numbers: range, votes: int, lonely: bool) -> None:
    """Tasks with `votes` rankings each."""
    rows = [_task(i, votes) for i in numbers]
    said = [
        (i, vote, str(row["id"]), 1 if lonely else 1 + (i + vote * 7) % PEOPLE)
        for i, row in zip(numbers, rows, strict=True)
        for vote in range(votes)
    ]
    _insert(raw, "tasks", rows)
    _insert(raw, "assignments", [_assignment(i, task, user) for i, _, task, user in said])
    _insert(raw, "rankings", [_ranking(*one) for one in said])


def _insert(raw: sqlite3.Connection, name: str, rows: list[dict[str, object]]) -> None:
    if rows:
        places = ", ".join(f":{key}" for key in rows[0])
        raw.executemany(f"INSERT INTO {name} ({', '.join(rows[0])}) VALUES ({places})", rows)


def _task(i: int, filled: int) -> dict[str, object]:
    responses = [_text(i, k) for k in range(RESPONSES)]
    messages = [{"role": "user", "content": f"prompt {i}: {_text(i, RESPONSES)}"}]
    step = "rank" if i % 2 and filled > 1 else "rank-2"
    row = task_row(messages, responses, round=1, origin="benchmark", step=step)
    return {**row, "kind": "rank", "filled": filled, "priority": 0.0}


def _text(i: int, k: int) -> str:
    return " ".join(_WORDS[(i * (k + 1) + j) % len(_WORDS)] for j in range(20)) + f" {k}"


def _assignment(i: int, task: str, user: int) -> dict[str, object]:
    assignment = content_id("assignment", task, user)
    return {
        "id": assignment,
        "task_id": task,
        "user_id": user,
        "token": f"token{assignment}",
        "display_order": "[2,0,1,3]",
        "state": "ranked",
        "leased": float(i),
        "expires": float(i) + 1800,
        "draft_revision": 0,
    }


def _ranking(i: int, vote: int, task: str, user: int) -> dict[str, object]:
    assignment = content_id("assignment", task, user)
    ranks = [1 + (i * 7 + k * 3 + vote) % RESPONSES for k in range(RESPONSES)]
    return {
        "id": content_id("stored ranking", assignment, 1),
        "assignment_id": assignment,
        "task_id": task,
        "user_id": user,
        "revision": 1,
        "status": "ranked",
        "ranks": canonical_json([sorted(set(ranks)).index(rank) + 1 for rank in ranks]),
        "late": False,
        "source": "app",
        "by_hand": False,
        "all_bad": False,
        "created": float(i),
        "active_seconds": 20.0 + i % 60,
    }


# ---- claims and submissions ----------------------------------------------------------------


def work(store: Store, repeat: int, taken: dict[str, list[float]], user: int | None = None) -> None:
    """One claim, one submission, and what a page asks for beside them."""
    user = 1 + repeat % PEOPLE if user is None else user
    now = NOW + repeat
    given = _timed(taken["claim"], lambda: claim(store, user, now))
    assert given is not None, "the queue is empty"
    form = {"ranks": list(range(1, RESPONSES + 1))}
    _timed(taken["submit"], lambda: submit(store, user, given.token, form, now))
    _timed(taken["recent"], lambda: recent(store, user))
    _timed(taken["my_progress"], lambda: my_progress(store, user, now))
    _timed(taken["progress"], lambda: progress(store, "rank-2"))


def _timed(seconds: list[float], act: Callable[[], T]) -> T:
    start = time.perf_counter()
    result = act()
    seconds.append(time.perf_counter() - start)
    return result


def compare_work(
    paths: dict[str, Path], repeats: int, user: int | None = None
) -> list[tuple[str, ...]]:
    """Rows of the table: p95 of each act in the small and the large store, and their ratio."""
    stores = {name: Store(path) for name, path in paths.items()}
    taken: dict[str, dict[str, list[float]]] = {name: {act: [] for act in ACTS} for name in stores}
    for repeat in range(repeats):
        names = list(stores)
        for name in names if repeat % 2 else reversed(names):
            work(stores[name], repeat, taken[name], user)
    for store in stores.values():
        store.close()
    rows = []
    for act in ACTS:
        small, large = (_p95(taken[name][act]) for name in stores)
        middle = [1000 * statistics.median(taken[name][act]) for name in stores]
        ratio = large / small
        medians = f"{middle[0]:.1f} .. {middle[1]:.1f}"
        rows.append((act, f"{1000 * small:.1f}", f"{1000 * large:.1f}", f"{ratio:.2f}", medians))
    return rows


def _p95(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.95 * len(seconds))]


# ---- the export ----------------------------------------------------------------------------


def export_alone(path: Path) -> None:
    """Export a store in this process; one JSON line with its peak memory and seconds."""
    store = Store(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # what a first, empty export loads belongs to no row
        empty = Store(Path(folder) / "empty.db")
        export_folder(empty, Path(folder) / "nothing", Options(0.15))
        before = _peak_bytes()
        start = time.monotonic()
        counts = export_folder(store, Path(folder) / "export", Options(0.15))
        seconds = time.monotonic() - start
        size = sum(file.stat().st_size for file in (Path(folder) / "export").iterdir())
    grown = _peak_bytes() - before
    line = {"rankings": counts.rankings, "grown": grown, "seconds": seconds, "bytes": size}
    print(json.dumps(line))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare_exports(paths: dict[str, Path]) -> list[tuple[str, ...]]:
    rows = []
    for path in paths.values():
        words = [sys.executable, "-m", "tests.benchmarks.labels_million", "--export", str(path)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        line = json.loads(done.stdout.splitlines()[-1])
        each = 1e6 * line["seconds"] / max(1, line["rankings"])
        rows.append(
            (
                f"{line['rankings']:,}",
                f"{line['bytes'] / 1e6:.1f}",
                f"{line['seconds']:.1f}",
                f"{each:.0f}",
                f"{line['grown'] / 2**20:.0f}",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.labels_million")
    parser.add_argument("--large", type=int, default=LARGE)
    parser.add_argument("--lonely", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=_REPEATS)
    parser.add_argument("--only", choices=("claims", "export"))
    parser.add_argument(
        "--keep", type=Path, help="keep the stores here, and use those that are there"
    )
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.export:
        export_alone(given.export)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        sizes = {"small": SMALL, "large": given.large}
        paths = {name: folder / f"{size}.db" for name, size in sizes.items()}
        alone = {
            name: folder / f"lonely-{min(size, given.lonely)}.db" for name, size in sizes.items()
        }
        for lonely, both in ((False, paths), (True, alone)):
            for name, path in both.items():
                if not path.exists():
                    build(path, min(sizes[name], given.lonely) if lonely else sizes[name], lonely)
        print(f"labels_million on {limits.machine()}; {SMALL:,} and {given.large:,} rankings\n")
        if given.only != "export":
            head = ("act", "small p95 ms", "large p95 ms", "ratio", "medians ms")
            print(table(head, compare_work(paths, given.repeats)), "\n")
            print(f"one person, {given.lonely:,} prompts that wait for another:\n")
            print(table(head, compare_work(alone, given.repeats, user=1)), "\n")
        if given.only != "claims":
            head = ("rankings", "MB written", "seconds", "us a ranking", "peak memory grows by MB")
            print(table(head, compare_exports(paths)))


if __name__ == "__main__":
    main()
