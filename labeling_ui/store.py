"""The label store: one schema for people, simulated annotators and imported rankings.

SQLite by default (`RUN/labels.db`), any SQLAlchemy URL otherwise. Ids are hashes of content, so
queueing or importing the same thing twice changes nothing. Rankings are never overwritten: a
changed mind is a new revision, and the one before it says by which it was superseded.

A transaction that writes takes the write lock at its start (BEGIN IMMEDIATE). Measured: with
SQLAlchemy's default, 714 of 1000 prompts were handed out twice, without an error.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import Connection, Engine

from pipeline.config import load_settings
from pipeline.errors import ArtifactError, DataError
from pipeline.records import Message, canonical_json, content_id
from pipeline.settings import Settings

SCHEMA_VERSION = 1
STORE_FILE = "labels.db"
SECRETS = ("pseudonyms", "sessions")

schema = sa.MetaData()

meta = sa.Table(
    "meta",
    schema,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)
users = sa.Table(
    "users",
    schema,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String, nullable=False),  # person | simulated | imported
    sa.Column("name", sa.String, nullable=False),
    sa.Column("role", sa.String, nullable=False, default="annotator"),  # annotator | lead
    sa.Column("password", sa.String),  # scrypt; only people have one
    sa.Column("active", sa.Boolean, nullable=False, default=True),
    sa.Column("session", sa.Integer, nullable=False, default=0),  # raised to end all logins
    sa.Column("created", sa.Float, nullable=False),
    sa.UniqueConstraint("kind", "name"),
    sqlite_autoincrement=True,  # the id of a forgotten person is never given to another
)
login_failures = sa.Table(
    "login_failures",
    schema,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("last", sa.Float, nullable=False),
)
queues = sa.Table(
    "queues",
    schema,
    sa.Column("step", sa.String, primary_key=True),  # the rank step of one round
    sa.Column("by", sa.String, nullable=False),  # people | simulated
    sa.Column("overlap", sa.Integer, nullable=False),
    sa.Column("minimum", sa.Integer),
    sa.Column("lease_minutes", sa.Integer, nullable=False),
    sa.Column("open", sa.Boolean, nullable=False),  # closed once its rankings are exported
)
tasks = sa.Table(
    "tasks",
    schema,
    sa.Column("id", sa.String, primary_key=True),  # see `task_id`
    sa.Column("step", sa.String),  # the queue it waits in; null for imported groups
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("origin", sa.String, nullable=False),  # samples digest, or `import`
    sa.Column("active", sa.Boolean, nullable=False),  # false: the samples have changed since
    sa.Column("split", sa.String, nullable=False),  # of the prompt: train | validation | test
    sa.Column("prompt_id", sa.String, nullable=False),
    sa.Column("messages", sa.Text, nullable=False),
    sa.Column("responses", sa.Text, nullable=False),  # texts, in the order of their ids
)
assignments = sa.Table(
    "assignments",
    schema,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("task_id", sa.ForeignKey("tasks.id"), nullable=False, index=True),
    sa.Column("user_id", sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("token", sa.String, nullable=False, unique=True),
    sa.Column("display_order", sa.Text, nullable=False),  # shown place -> place in task.responses
    # leased | ranked | late (ranked, but others had filled the prompt) | skipped (by me, others
    # may do it) | unrankable (nobody can: it fills a place)
    sa.Column("state", sa.String, nullable=False),
    sa.Column("leased", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("draft", sa.Text),  # ranks by shown place; null where not placed yet
    sa.Column("draft_revision", sa.Integer, nullable=False, default=0),
    sa.UniqueConstraint("task_id", "user_id"),
)
rankings = sa.Table(
    "rankings",
    schema,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("assignment_id", sa.ForeignKey("assignments.id"), nullable=False),
    sa.Column("task_id", sa.ForeignKey("tasks.id"), nullable=False, index=True),
    sa.Column("user_id", sa.ForeignKey("users.id"), nullable=False, index=True),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("status", sa.String, nullable=False),  # ranked | skipped
    sa.Column("ranks", sa.Text),  # by place in task.responses; 1 is best, equal numbers are ties
    sa.Column("reason", sa.String),  # of a skip
    sa.Column("late", sa.Boolean, nullable=False, default=False),
    sa.Column("source", sa.String, nullable=False),  # app | simulated | import:<layout>
    sa.Column("by_hand", sa.Boolean, nullable=False, default=False),  # `prefline labels import`
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("superseded_by", sa.String),
    sa.UniqueConstraint("assignment_id", "revision"),
)
# no foreign key and no name: an event outlives the person it speaks of
events = sa.Table(
    "events",
    schema,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("user_id", sa.Integer),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("task_id", sa.String),
    sa.Column("detail", sa.Text, nullable=False),
)

_APPEND_ONLY = {
    "sqlite": (
        "CREATE TRIGGER IF NOT EXISTS events_no_update BEFORE UPDATE ON events"
        " BEGIN SELECT RAISE(ABORT, 'events are append-only'); END",
        "CREATE TRIGGER IF NOT EXISTS events_no_delete BEFORE DELETE ON events"
        " BEGIN SELECT RAISE(ABORT, 'events are append-only'); END",
    ),
    "postgresql": (
        "CREATE OR REPLACE RULE events_no_update AS ON UPDATE TO events DO INSTEAD NOTHING",
        "CREATE OR REPLACE RULE events_no_delete AS ON DELETE TO events DO INSTEAD NOTHING",
    ),
}


class Store:
    """A label store. `write()` and `read()` are its transactions; nothing else touches it.

    Args:
        url: an SQLAlchemy URL, or the path of an SQLite file (made when it is not there).

    Raises:
        ArtifactError: not a label store, or made by a newer version.
    """

    def __init__(self, url: str | Path) -> None:
        text = f"sqlite:///{url}" if isinstance(url, Path) or "://" not in url else url
        self.engine: Engine = sa.create_engine(text)
        self.file = Path(self.engine.url.database or "") if self.is_sqlite else None
        self._writing = threading.RLock()
        if self.is_sqlite:
            sa.event.listen(self.engine, "connect", _on_connect)
            sa.event.listen(self.engine, "begin", _on_begin)
        try:
            self._prepare()
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
        """One transaction that may write: all of it or nothing."""
        # threads of one process queue here: fair, where SQLite's own waiting starves some
        # (p99 0.7 s instead of 6 s with 20 threads)
        with self._writing, self.engine.begin() as tx:
            yield tx

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent look at the store; never waits for a writer."""
        with self.engine.connect().execution_options(prefline_reads=True) as tx, tx.begin():
            yield tx

    def close(self) -> None:
        self.engine.dispose()

    def secret(self, name: str) -> bytes:
        """A random secret that belongs to this store: one of SECRETS."""
        with self.read() as tx:
            query = sa.select(meta.c.value).where(meta.c.key == f"secret:{name}")
            return bytes.fromhex(tx.execute(query).scalar_one())

    def _prepare(self) -> None:
        # only a new store is written to: opening one must not wait for those who write
        with self.read() as tx:
            if sa.inspect(tx).has_table("meta"):
                self._check_version(tx)
                return
        with self.write() as tx:
            schema.create_all(tx)
            for statement in _APPEND_ONLY.get(self.engine.dialect.name, ()):
                tx.exec_driver_sql(statement)
            # made with the store, so that a backup has the same ones
            secret_rows = [
                {"key": f"secret:{name}", "value": secrets.token_hex(32)} for name in SECRETS
            ]
            insert_new(tx, meta, [{"key": "schema", "value": str(SCHEMA_VERSION)}, *secret_rows])

    def _check_version(self, tx: Connection) -> None:
        query = sa.select(meta.c.value).where(meta.c.key == "schema")
        found = int(tx.execute(query).scalar_one_or_none() or 0)
        if found > SCHEMA_VERSION:
            raise ArtifactError(
                f"{self.name}: made by a newer version (label store schema {found};"
                f" this one knows {SCHEMA_VERSION})",
                "Update prefline, or use the version that made it.",
            )


def _on_connect(connection: sqlite3.Connection, _record: Any) -> None:
    # the driver must not begin transactions by itself: `_on_begin` does
    connection.isolation_level = None
    for pragma in (
        "busy_timeout = 30000",  # before journal_mode, which needs a lock
        "journal_mode = WAL",
        "synchronous = FULL",  # an acknowledged ranking survives a power cut
        "foreign_keys = ON",
        "secure_delete = ON",  # what is forgotten is overwritten
    ):
        connection.execute(f"PRAGMA {pragma}")


def _on_begin(tx: Connection) -> None:
    reads = tx.get_execution_options().get("prefline_reads")
    tx.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def insert_new(tx: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert the rows that are not there yet."""
    if not rows:
        return
    make = postgresql_insert if tx.dialect.name == "postgresql" else sqlite_insert
    tx.execute(make(table).on_conflict_do_nothing(), list(rows))


def task_id(prompt_id: str, responses: Sequence[str], round: int) -> str:
    """Identity of a task: the same responses to the same prompt in the same round."""
    return content_id("task", prompt_id, sorted(response_ids(prompt_id, responses)), round)


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
) -> dict[str, Any]:
    """A row of `tasks`. Responses stand in the order of their ids, which tells nothing of them."""
    prompt_id = content_id("prompt", list(messages))
    ordered = sorted(responses, key=lambda text: content_id("response", prompt_id, text))
    return {
        "id": task_id(prompt_id, responses, round),
        "step": step,
        "round": round,
        "origin": origin,
        "active": True,
        "split": split,
        "prompt_id": prompt_id,
        "messages": canonical_json(list(messages)),
        "responses": canonical_json(ordered),
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
