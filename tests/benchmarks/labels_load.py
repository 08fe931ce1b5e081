"""A hundred annotators at one ranking app that is killed again and again: nothing lost or doubled.

    python -m tests.benchmarks.labels_load [--people 100] [--rankings 20] [--think 5] [--kills 3]

Each annotator logs in over HTTP and works as a browser does: asks for a prompt, saves drafts,
reloads now and then, submits, sometimes twice at once, and tries again with the same submission
when the server is gone. The server is killed (SIGKILL) and started again meanwhile. In the end the
store is compared with what was acknowledged. The same load then goes to a bare FastAPI endpoint
that does one BEGIN IMMEDIATE insert (`bare`): what the machine can do without an app.

Clients and server share the machine. Seconds are as a client sees them; requests that were under
way when the server died are not among them. Exit 1 when anything is lost or doubled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httpx
import sqlalchemy as sa

from labeling_ui.accounts import hash_password
from labeling_ui.schema import assignments, queues, rankings, tasks, users
from labeling_ui.store import Store, insert_new, task_row

RESPONSES = 4
OVERLAP = 2
PASSWORD = "correct horse"
_ROOT = Path(__file__).resolve().parents[2]
_GIVE_UP = 600.0  # seconds for which a client asks a server that does not answer


@dataclass
class Log:
    """What the clients know. seconds: of each kind of request, without those that were retried."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    acknowledged: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    """Token of an assignment: who submitted, and the ranks by shown place."""
    problems: Counter[str] = field(default_factory=Counter)
    retries: int = 0


@dataclass(frozen=True)
class Work:
    """What an annotator has on the screen."""

    token: str
    revision: int = 0
    ranks: tuple[int | None, ...] = ()


class Site(Protocol):
    """A server as a client sees it; each call is one request."""

    async def log_in(self) -> None: ...
    async def claim(self) -> Work | None: ...
    async def draft(self, work: Work, ranks: list[int | None], revision: int) -> bool: ...
    async def submit(self, work: Work, ranks: list[int], submission: str) -> str:
        """What the person is told; empty when it was stored now."""


class Gone(Exception):
    """The server was not there, or went away before it had answered."""


async def post(client: httpx.AsyncClient, path: str, **more: Any) -> httpx.Response:
    try:
        answer = await client.post(path, **more)
    except httpx.TransportError as error:
        raise Gone from error
    if answer.status_code in (502, 503):
        raise Gone
    return answer


# ---- the app -------------------------------------------------------------------------------


class Page:
    """The annotators' page over HTTP, by the names of its functions."""

    calls: dict[str, int] | None = None

    def __init__(self, client: httpx.AsyncClient, name: str) -> None:
        self.client, self.name = client, name

    async def log_in(self) -> None:
        form = {"name": self.name, "password": PASSWORD}
        answer = await post(self.client, "/login", data=form)
        assert answer.status_code == 303, f"login: {answer.status_code}"
        if Page.calls is None:
            config = (await self.client.get("/ui/config")).json()
            Page.calls = {
                found["api_name"]: found["id"]
                for found in config["dependencies"]
                if isinstance(found.get("api_name"), str)
            }

    async def claim(self) -> Work | None:
        value = await self._call("on_load")
        if not value["token"]:
            return None
        return Work(value["token"], value["revision"], tuple(value["form"]["ranks"]))

    async def draft(self, work: Work, ranks: list[int | None], revision: int) -> bool:
        asked = {"token": work.token, "ranks": ranks, "revision": revision}
        return bool((await self._call("on_draft", asked))["outcome"] == "saved")

    async def submit(self, work: Work, ranks: list[int], submission: str) -> str:
        asked = {"do": "submit", "token": work.token, "ranks": ranks, "submission": submission}
        said = (await self._call("on_act", {**asked, "active": 1.0, "ask": submission}))["said"]
        return "" if said == "Saved." else str(said)

    async def _call(self, name: str, *given: Any) -> dict[str, Any]:
        """The value among a handler's outputs that speaks of an assignment."""
        assert Page.calls is not None
        body = {"data": list(given), "fn_index": Page.calls[name], "session_hash": self.name}
        answer = await post(self.client, "/ui/gradio_api/run/predict", json=body)
        assert answer.status_code == 200, f"{name}: {answer.status_code} {answer.text[:200]}"
        for value in answer.json()["data"]:
            if isinstance(value, dict) and "token" in value:
                return value
        raise AssertionError(f"{name}: no board in the answer")


# ---- the bare endpoint ---------------------------------------------------------------------


class Bare:
    """The endpoint of `bare_server` over HTTP."""

    def __init__(self, client: httpx.AsyncClient, name: str) -> None:
        self.client, self.name = client, name

    async def log_in(self) -> None:
        pass

    async def claim(self) -> Work | None:
        return Work((await self._call("claim", uuid.uuid4().hex))["id"])

    async def draft(self, work: Work, ranks: list[int | None], revision: int) -> bool:
        await self._call("draft", f"{work.token} {revision}")
        return True

    async def submit(self, work: Work, ranks: list[int], submission: str) -> str:
        await self._call("submit", submission)
        return ""

    async def _call(self, kind: str, id: str) -> dict[str, str]:
        answer = await post(self.client, "/insert", json={"kind": kind, "id": id})
        assert answer.status_code == 200, answer.status_code
        found: dict[str, str] = answer.json()
        return found


def bare_server(file: Path, port: int) -> None:
    import uvicorn
    from fastapi import FastAPI

    app, lock = FastAPI(), threading.Lock()
    database = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE IF NOT EXISTS rows (id TEXT PRIMARY KEY, kind TEXT, body TEXT)")

    @app.post("/insert")
    def insert(row: dict[str, str]) -> dict[str, str]:
        with lock:
            database.execute("BEGIN IMMEDIATE")
            values = (row["id"], row["kind"], "x" * 200)
            database.execute("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)", values)
            database.execute("COMMIT")
        return row

    @app.get("/healthz")
    def health() -> str:
        return "ok"

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


# ---- annotators ----------------------------------------------------------------------------


async def annotate(site: Site, name: str, count: int, think: float, log: Log) -> None:
    """Rank `count` prompts; everything that is not as promised is counted in the log."""
    dice = random.Random(name)

    async def ask(kind: str, call: Callable[[], Awaitable[Any]], wait: bool = True) -> Any:
        """One request, again and again while the server is gone."""
        if wait:
            await asyncio.sleep(dice.expovariate(1 / think) if think else 0)
        begun, first = time.monotonic(), True
        while True:
            start = time.monotonic()
            try:
                found = await call()
            except Gone:
                log.retries += 1
                first = False
                if time.monotonic() - begun > _GIVE_UP:
                    raise
                await asyncio.sleep(0.5)
                continue
            if first:
                log.seconds.setdefault(kind, []).append(time.monotonic() - start)
            return found

    await ask("log in", site.log_in)
    for _ in range(count):
        work: Work | None = await ask("claim", site.claim)
        if work is None:
            log.problems["nothing was handed out"] += 1
            return
        if work.token in log.acknowledged:
            log.problems["handed out again after it was submitted"] += 1
        ranks = [dice.randint(1, RESPONSES) for _ in range(RESPONSES)]
        revision = work.revision
        for placed in range(1, dice.randint(1, 3)):
            revision += 1
            half: list[int | None] = [*ranks[:placed], *[None] * (RESPONSES - placed)]
            saved = await ask("draft", partial(site.draft, work, half, revision))
            # after a retry the first try may have been stored: then the second is no news
            if dice.random() < 0.3 and isinstance(site, Page):
                again = await ask("reload", site.claim)
                if again is None or again.token != work.token:
                    log.problems["another prompt after a reload"] += 1
                elif saved and again.ranks != tuple(half):
                    log.problems["a saved draft was gone after a reload"] += 1
        press = uuid.UUID(int=dice.getrandbits(128)).hex
        presses = 2 if dice.random() < 0.1 else 1
        submit = partial(ask, "submit", partial(site.submit, work, ranks, press), wait=False)
        await asyncio.sleep(dice.expovariate(1 / think) if think else 0)
        for said in await asyncio.gather(*(submit() for _ in range(presses))):
            if said not in ("", "Already saved."):
                log.problems[f"told: {said}"] += 1
        log.acknowledged[work.token] = (name, ranks)


async def all_annotate(
    kind: type[Page] | type[Bare], url: str, people: int, count: int, think: float, log: Log
) -> None:
    async def one(i: int) -> None:
        # a browser keeps its connections; a killed server closes them
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
            await annotate(kind(client, f"ann{i}"), f"ann{i}", count, think, log)

    results = await asyncio.gather(*(one(i) for i in range(people)), return_exceptions=True)
    for error in results:
        if isinstance(error, BaseException):
            log.problems[f"an annotator gave up: {type(error).__name__} {error}"[:200]] += 1


# ---- the server under them -----------------------------------------------------------------


class Server:
    """A server process that can be killed and started again on the same port."""

    def __init__(self, words: Callable[[int], list[str]], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.words, self.log = words, log
        self.kills = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.words(self.port)],
                cwd=_ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stderr=log,
            )
        end = time.monotonic() + _GIVE_UP
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/healthz", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def kill_now_and_then(
    server: Server, log: Log, total: int, kills: int, done: threading.Event
) -> None:
    """Kill and restart when 1/(kills+1), 2/(kills+1), .. of the rankings are in."""
    for i in range(1, kills + 1):
        while len(log.acknowledged) < total * i / (kills + 1):
            if done.wait(0.05):
                return
        server.kill()
        server.kills += 1
        server.start()


def load(
    kind: type[Page] | type[Bare], server: Server, given: argparse.Namespace, kills: int
) -> tuple[Log, float]:
    log, done = Log(), threading.Event()
    total = given.people * given.rankings
    killer = threading.Thread(target=kill_now_and_then, args=(server, log, total, kills, done))
    killer.start()
    start = time.monotonic()
    try:
        asyncio.run(all_annotate(kind, server.url, given.people, given.rankings, given.think, log))
    finally:
        seconds = time.monotonic() - start
        done.set()
        killer.join()
        server.kill()
    return log, seconds


# ---- what is in the store ------------------------------------------------------------------


def make_run(folder: Path, people: int, count: int) -> None:
    """A run directory with accounts, and prompts for all of them and a tenth more."""
    (folder / "config.yaml").write_text("model: {base: ./m}\n")
    prompts = people * count * 11 // (10 * OVERLAP) + people
    rows = [
        task_row([{"role": "user", "content": f"prompt {i} " + "word " * 50}],
                 [f"answer {j} to {i} " + "word " * 100 for j in range(RESPONSES)],
                 round=1, origin="benchmark", step="rank")
        for i in range(prompts)
    ]  # fmt: skip
    queue = {"step": "rank", "by": "people", "overlap": OVERLAP, "lease_minutes": 30, "open": True}
    password = hash_password(PASSWORD)
    with closing(Store(folder / "labels.db")) as store, store.write() as tx:
        insert_new(tx, queues, [queue])
        insert_new(tx, tasks, rows)
        names = [{"kind": "person", "name": f"ann{i}", "created": 1.0} for i in range(people)]
        insert_new(tx, users, [{**name, "password": password} for name in names])


def compare(store: Store, log: Log) -> dict[str, int]:
    """Counts of everything that must be zero."""
    query = (
        sa.select(assignments.c.token, assignments.c.display_order, rankings, users.c.name)
        .select_from(rankings.join(assignments).join(users, users.c.id == rankings.c.user_id))
    )  # fmt: skip
    with store.read() as tx:
        rows = tx.execute(query).all()
        filled = {row.id: row.filled for row in tx.execute(sa.select(tasks.c.id, tasks.c.filled))}
        intact = tx.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    by_token: dict[str, list[Any]] = {}
    for row in rows:
        by_token.setdefault(row.token, []).append(row)
    wrong = 0
    for token, (name, ranks) in log.acknowledged.items():
        for row in by_token.get(token, []):
            order = json.loads(row.display_order)
            places = sorted(set(ranks))
            stored = [0] * len(order)
            for shown, place in enumerate(order):
                stored[place] = places.index(ranks[shown]) + 1
            wrong += (row.name, json.loads(row.ranks)) != (name, stored)
    per_person = Counter((row.task_id, row.user_id) for row in rows)
    per_task = Counter(row.task_id for row in rows if row.status == "ranked" and not row.late)
    return {
        "lost": sum(token not in by_token for token in log.acknowledged),
        "doubled": sum(n - 1 for n in per_person.values()),
        "stored wrongly": wrong,
        "over the overlap": sum(max(0, n - OVERLAP) for n in per_task.values()),
        "counted wrongly": sum(per_task[task] != count for task, count in filled.items()),
        # a client that was told nothing tries again until it is told
        "not acknowledged": len(by_token.keys() - log.acknowledged.keys()),
        "store damaged": int(not intact),
    }


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 100) // 100) - 1)] if ordered else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--people", type=int, default=100)
    parser.add_argument("--rankings", type=int, default=20, help="of each")
    parser.add_argument("--think", type=float, default=5.0, help="mean seconds before a request")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--bare", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        bare_server(Path(given.bare[0]), int(given.bare[1]))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder, given.people, given.rankings)
        words = ["labeling_ui.server", str(folder), "--port"]
        server = Server(lambda port: [*words, str(port)], folder / "server.log")
        log, seconds = load(Page, server, given, given.kills)
        with closing(Store(folder / "labels.db")) as store:
            counts = compare(store, log)
        said = (folder / "server.log").read_text()
        words_bare = ["tests.benchmarks.labels_load", "--bare", str(folder / "bare.db")]
        bare = Server(lambda port: [*words_bare, str(port)], folder / "bare.log")
        peer, _ = load(Bare, bare, given, 0)
    return report(given, log, peer, counts, seconds, server.kills, said)


def report(
    given: argparse.Namespace,
    log: Log,
    peer: Log,
    counts: dict[str, int],
    seconds: float,
    kills: int,
    said: str,
) -> int:
    # here: they import torch, which the load does not need
    from tests.benchmarks import limits
    from tests.benchmarks.common import table

    print(
        f"labels_load: {given.people} annotators, {given.rankings} rankings each, {given.think:g} s of"
        f" thought before a request, {kills} kills, on {limits.machine()}, load"
        f" {os.getloadavg()[0]:.1f}"
    )
    print(
        f"{len(log.acknowledged)} rankings acknowledged in {seconds:.0f} s; {log.retries} requests"
        f" found no server; {said.count('Traceback')} tracebacks in the server's log\n"
    )
    rows = []
    for kind in ("log in", "claim", "draft", "reload", "submit"):
        for side, those in (("app", log), ("bare", peer)):
            taken = those.seconds.get(kind, [])
            if taken and not (side == "bare" and kind == "log in"):
                shares = (
                    f"{1000 * percentile(taken, share):.0f}" for share in (0.5, 0.95, 0.99, 1)
                )
                rows.append((f"{kind}, {side}", str(len(taken)), *shares))
    print(table(("request", "number", "p50 ms", "p95 ms", "p99 ms", "most ms"), rows))
    print()
    wrong = {**counts, **{f"told: {text}": n for text, n in log.problems.items()}}
    print(table(("what must not be", "number"), [(text, str(n)) for text, n in wrong.items()]))
    p95 = {
        f"p95_{kind}{suffix}": round(percentile(those.seconds.get(kind, []), 0.95), 4)
        for kind in ("claim", "submit")
        for those, suffix in ((log, ""), (peer, "_bare"))
    }
    line = {"benchmark": "labels_load", "acknowledged": len(log.acknowledged), "kills": kills}
    bad = any(counts.values()) or bool(log.problems)
    print(json.dumps({**line, "lost": counts["lost"], "doubled": counts["doubled"], **p95}))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
