"""The label store: one schema for people, simulated annotators and imported rankings.

SQLite by default (`RUN/labels.db`), or PostgreSQL by its URL. Ids are hashes of content, so
queueing or importing the same thing twice changes nothing. Rankings are never overwritten: a
changed mind is a new revision, and the one before it says by which it was superseded.

Transactions that write follow one another, on both databases: see database.py.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import Connection, Engine

from labeling_ui import database, schema
from labeling_ui.database import Unavailable
from labeling_ui.schema import events, meta, users
from pipeline.config import load_settings
from pipeline.errors import ArtifactError, DataError
from pipeline.records import Message, canonical_json, content_id
from pipeline.settings import Settings

STORE_FILE = "labels.db"
SECRETS = ("pseudonyms", "sessions")
EXTRA, WRITE = "extra", "write"
"""Queues that belong to no round: responses brought from elsewhere, and prompts to answer."""


class Store:
    """A label store. `write()` and `read()` are its transactions; nothing else touches it.

    Args:
        url: an SQLAlchemy URL, or the path of an SQLite file (made when it is not there).

    Raises:
        ArtifactError: not a label store, or made by a newer version.
        ConfigError: not a URL that can be used, or its driver is not installed.
    """

    def __init__(self, url: str | Path) -> None:
        is_path = isinstance(url, Path) or "://" not in url
        self.engine: Engine = database.open_engine(
            sa.URL.create("sqlite", database=str(url)) if is_path else str(url)
        )
        self.file = Path(self.engine.url.database or "") if self.is_sqlite else None
        self._writing = threading.RLock()
        try:
            self._prepare()
        except Unavailable as error:
            raise ArtifactError(f"{self.name}: {error.message}") from None
        except sa.exc.DBAPIError as error:
            raise ArtifactError(
                f"{self.name}: cannot be used as a label store ({error.orig})"
            ) from None

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @property
    def name(self) -> str:
        """For messages; never shows a password."""
        return str(self.file) if self.file else self.engine.url.render_as_string(hide_password=True)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction that may write: all of it or nothing.

        Raises:
            Unavailable: the database is locked, full, read-only or gone.
        """
        # threads of one process queue here: fair, where SQLite's own waiting starves some
        # (p99 0.7 s instead of 6 s with 20 threads)
        if not self._writing.acquire(timeout=database.BUSY_SECONDS):
            raise database.unavailable("too many are waiting for it")
        try:
            with database.plain_errors(self.name), self.engine.begin() as tx:
                yield tx
        finally:
            self._writing.release()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent look at the store; never waits for a writer."""
        with (
            database.plain_errors(self.name),
            database.reading(self.engine) as tx,
            tx.begin(),
        ):
            yield tx

    def close(self) -> None:
        self.engine.dispose()

    def secret(self, name: str) -> bytes:
        """A random secret that belongs to this store: one of SECRETS."""
        with self.read() as tx:
            query = sa.select(meta.c.value).where(meta.c.key == f"secret:{name}")
            return bytes.fromhex(tx.execute(query).scalar_one())

    def backup(self, to: Path) -> None:
        """A consistent copy of an SQLite store, also while people work; never over a file.

        Raises:
            DataError: not SQLite, or `to` exists.
        """
        if self.file is None:
            raise DataError(f"{self.name}: not an SQLite store", "Use the database's own backup.")
        if to.exists():
            raise DataError(f"{to}: exists already", "Choose another name.")
        # a name of its own: two processes may be at it
        temporary = to.with_name(f"{to.name}.{os.getpid()}.tmp")
        try:
            with (
                closing(sqlite3.connect(self.file)) as source,
                closing(sqlite3.connect(temporary)) as copy,
            ):
                source.backup(copy)
            os.replace(temporary, to)
        except (sqlite3.Error, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"{to}: the copy could not be written ({error})") from None

    def _prepare(self) -> None:
        # only a new or an old store is written to: opening one must not wait for those who write
        with self.read() as tx:
            found = self._version(tx)
        if found == schema.VERSION:
            return
        if found is not None:
            self._migrate(found)
            return
        with self.write() as tx:
            schema.create(tx)
            # made with the store, so that a backup has the same ones
            secret_rows = [
                {"key": f"secret:{name}", "value": secrets.token_hex(32)} for name in SECRETS
            ]
            insert_new(tx, meta, [{"key": "schema", "value": str(schema.VERSION)}, *secret_rows])

    def _version(self, tx: Connection) -> int | None:
        """Schema version of the database; None where there is nothing yet."""
        if not sa.inspect(tx).has_table("meta"):
            return None
        query = sa.select(meta.c.value).where(meta.c.key == "schema")
        found = int(tx.execute(query).scalar_one_or_none() or 0)
        if found > schema.VERSION:
            raise ArtifactError(
                f"{self.name}: made by a newer version (label store schema {found};"
                f" this one knows {schema.VERSION})",
                "Update prefline, or use the version that made it.",
            )
        return found

    def _migrate(self, version: int) -> None:
        """Bring an older store up to date; an SQLite file is copied beside itself before."""
        with self.write() as tx:
            # another process may have been faster
            if self._version(tx) != version:
                return
            if self.file is not None:
                copy = self.file.with_name(f"{self.file.name}.schema-{version}.backup")
                # while we hold the write lock, what is copied is the old version
                if not copy.exists():
                    self.backup(copy)
            schema.migrate(tx, version)
            log_event(tx, "migrated", None, None, old=version, new=schema.VERSION)


def insert_new(tx: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert the rows that are not there yet."""
    if not rows:
        return
    make = postgresql_insert if tx.dialect.name == "postgresql" else sqlite_insert
    tx.execute(make(table).on_conflict_do_nothing(), list(rows))


def task_id(prompt_id: str, responses: Sequence[str], round: int) -> str:
    """Identity of a task: the same responses to the same prompt in the same round."""
    return content_id("task", prompt_id, sorted(response_ids(prompt_id, responses)), round)


def gold_id(prompt_id: str, responses: Sequence[str]) -> str:
    """Identity of a known answer, wherever it came from; the same responses may also be work.

    Args:
        responses: by place in `tasks.responses`.
    """
    return content_id("gold", prompt_id, list(responses))


def response_ids(prompt_id: str, responses: Sequence[str]) -> list[str]:
    return [content_id("response", prompt_id, text) for text in responses]


def task_row(
    messages: Sequence[Message],
    responses: Sequence[str],
    *,
    round: int,
    origin: str,
    step: str | None = None,
    split: str = "train",
    **more: Any,
) -> dict[str, Any]:
    """A row of `tasks`. Responses stand in the order of their ids, which tells nothing of them.

    Args:
        more: further columns, such as `priority`.
    """
    prompt_id = content_id("prompt", list(messages))
    ordered = sorted(responses, key=lambda text: content_id("response", prompt_id, text))
    task = task_id(prompt_id, responses, round)
    return {
        "id": task,
        "lot": schema.lot(task),
        "step": step,
        "round": round,
        "origin": origin,
        "active": True,
        "split": split,
        "prompt_id": prompt_id,
        "messages": canonical_json(list(messages)),
        "responses": canonical_json(ordered),
        **more,
    }


def ensure_user(tx: Connection, kind: str, name: str) -> int:
    """Id of a simulated or imported annotator, made when it is not there."""
    row = {"kind": kind, "name": name, "created": time.time()}
    insert_new(tx, users, [row])
    query = sa.select(users.c.id).where(users.c.kind == kind, users.c.name == name)
    return int(tx.execute(query).scalar_one())


def log_event(
    tx: Connection, kind: str, user_id: int | None = None, task: str | None = None, **detail: Any
) -> None:
    """Append to the audit log. `detail` must not hold names of people."""
    row = {"at": time.time(), "user_id": user_id, "kind": kind, "task_id": task}
    tx.execute(sa.insert(events), {**row, "detail": json.dumps(detail)})


def open_run_store(run_dir: Path) -> Store:
    """The label store of a run directory: `rank.store` of its config, else `labels.db` in it.

    Raises:
        DataError: not a run directory.
    """
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise DataError(
            f"{run_dir}: not a run directory (it has no config.yaml)",
            "Make one with: prefline run CONFIG",
        )
    return Store(load_settings(Settings, config).rank.store or run_dir / STORE_FILE)
