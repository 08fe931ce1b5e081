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
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from labeling_ui.assignments import claim
from labeling_ui.changes import recent
from labeling_ui.export_files import Options, export_folder
from labeling_ui.progress import my_progress, progress
from labeling_ui.store import Store
from labeling_ui.submitting import submit
from pipeline.records import content_id

SMALL = 1_000
LARGE = 1_000_000
MUST = 3.0
PEOPLE = 20
RESPONSES = 4
NOW = 2_000_000_000.0
_REPEATS = 150
ACTS = ("claim", "submit", "recent", "my_progress", "progress")
T = TypeVar("T")
_SENTENCE = "the fox and a river that knew every way home but one said nothing at all"


# ---- stores --------------------------------------------------------------------------------


def build(path: Path, rankings: int, lonely: bool = False) -> None:
    """A store with so many rankings, two a prompt, made by the database itself for speed.

    Args:
        lonely: the first person has ranked all prompts, nobody else any: each waits for one more.
    """
    Store(path).close()
    votes = 1 if lonely else 2
    ranked = rankings // votes
    numbers = {"ranked": ranked, "all": ranked + max(1_000, ranked // 10), "votes": votes}
    numbers |= {"people": 1 if lonely else PEOPLE}
    with closing(sqlite3.connect(path)) as raw:
        raw.create_function("prompt_id", 1, _prompt_id, deterministic=True)
        raw.execute("PRAGMA synchronous = OFF")
        raw.execute("PRAGMA cache_size = -1000000")
        people = [("person", f"p{i}", "annotator", True, 0, 0.0) for i in range(PEOPLE)]
        columns = "kind, name, role, active, session, created"
        raw.executemany(f"INSERT INTO users ({columns}) VALUES (?, ?, ?, ?, ?, ?)", people)
        queues = [("rank", "people", 2, 30, False), ("rank-2", "people", 2, 30, True)]
        columns = "step, by, overlap, lease_minutes, open"
        raw.executemany(f"INSERT INTO queues ({columns}) VALUES (?, ?, ?, ?, ?)", queues)
        for statement in (_TASKS, _ASSIGNMENTS, _RANKINGS):
            raw.execute(statement, numbers)
        raw.commit()
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _prompt_id(text: str) -> str:
    return content_id("prompt", [{"content": text, "role": "user"}])


# ids as hashes are: without an order, and each its own
_ID = "printf('%08x%08x', (i * 2654435761) % 4294967296, i)"
_TEXT = "substr(sentence, 1 + (i * {k}) % 60, 100) || ' {k} ' || i"
_NUMBERS = f"""
    WITH RECURSIVE numbers(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM numbers WHERE i + 1 < :all),
    words(sentence) AS (SELECT '{_SENTENCE} {_SENTENCE} {_SENTENCE}'),
    said(i, vote) AS (
        SELECT i, vote FROM numbers, (SELECT 0 AS vote UNION ALL SELECT 1)
        WHERE i < :ranked AND vote < :votes
    )
"""
_TEXTS = ", ".join(_TEXT.format(k=k) for k in range(1, RESPONSES + 1))
_TASKS = f"""
    INSERT INTO tasks (id, kind, step, round, origin, active, split, prompt_id, messages, responses,
        priority, lot, filled)
    {_NUMBERS}
    SELECT {_ID}, 'rank', CASE WHEN i < :ranked AND :votes = 2 AND i % 2 THEN 'rank' ELSE 'rank-2' END,
        1, 'benchmark', 1, 'train', prompt_id({_TEXT.format(k=9)}),
        json_array(json_object('content', {_TEXT.format(k=9)}, 'role', 'user')), json_array({_TEXTS}),
        0.0, (i * 2654435761) % 4294967296 / 16, CASE WHEN i < :ranked THEN :votes ELSE 0 END
    FROM numbers, words
"""
_ASSIGNMENTS = f"""
    INSERT INTO assignments (id, task_id, user_id, token, display_order, state, leased, expires,
        draft_revision)
    {_NUMBERS}
    SELECT {_ID} || vote, {_ID}, 1 + (i + vote * 7) % :people, 'token' || {_ID} || vote,
        '[2,0,1,3]', 'ranked', i, i + 1800.0, 0
    FROM said
"""
_RANKINGS = f"""
    INSERT INTO rankings (id, assignment_id, task_id, user_id, revision, status, ranks, late, source,
        by_hand, created, all_bad, active_seconds)
    {_NUMBERS}
    SELECT {_ID} || vote, {_ID} || vote, {_ID}, 1 + (i + vote * 7) % :people, 1, 'ranked',
        CASE (i + vote) % 3 WHEN 0 THEN '[1,2,3,4]' WHEN 1 THEN '[2,1,2,3]' ELSE '[4,3,1,2]' END,
        0, 'app', 0, i, 0, 20 + i % 60
    FROM said
"""


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
    # of this thread alone: what it takes, however busy the machine and its disk are
    start = time.thread_time()
    result = act()
    seconds.append(time.thread_time() - start)
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
        start, worked = time.monotonic(), time.process_time()
        counts = export_folder(store, Path(folder) / "export", Options(0.15))
        seconds, worked = time.monotonic() - start, time.process_time() - worked
        size = sum(file.stat().st_size for file in (Path(folder) / "export").iterdir())
    grown = _peak_bytes() - before
    line = {"rankings": counts.rankings, "grown": grown, "seconds": seconds, "worked": worked}
    line["bytes"] = size
    print(json.dumps(line))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare_exports(paths: dict[str, Path]) -> list[tuple[str, ...]]:
    rows = []
    for path in paths.values():
        words = [sys.executable, "-m", "tests.benchmarks.labels_million", "--export", str(path)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        line = json.loads(done.stdout.splitlines()[-1])
        each = 1e6 * line["worked"] / max(1, line["rankings"])
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
    # here: they import torch, which would be most of an export's memory
    from tests.benchmarks import limits
    from tests.benchmarks.common import table

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
            head = (
                "rankings",
                "MB written",
                "seconds",
                "CPU us a ranking",
                "peak memory grows by MB",
            )
            print(table(head, compare_exports(paths)))


if __name__ == "__main__":
    main()
