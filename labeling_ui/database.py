"""The database under the label store: SQLite or PostgreSQL, one writer at a time on both.

A transaction that writes waits for the write lock at its start and holds it to its end: BEGIN
IMMEDIATE on SQLite, an advisory lock on PostgreSQL. So what it reads stays true until it commits,
nothing deadlocks, and no rule of the queue needs a lock of its own. Measured on SQLite: with
SQLAlchemy's default, 714 of 1000 prompts were handed out twice, without an error.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from labeling_ui.forms import Refused
from pipeline.errors import EXIT_FAILED, ConfigError

BUSY_SECONDS = 30.0
"""So long a writer waits for the one before it."""
_POSTGRES_LOCK = 0x70726566  # any number that all our servers on one database share
_READS = "prefline_reads"

_SQLITE_REASONS = {
    sqlite3.SQLITE_BUSY: "another program has kept it locked",
    sqlite3.SQLITE_FULL: "its disk is full",
    sqlite3.SQLITE_IOERR: "its disk refuses to be written",
    sqlite3.SQLITE_READONLY: "its file may only be read",
    sqlite3.SQLITE_CANTOPEN: "its file cannot be opened",
}
_POSTGRES_REASONS = {
    "55P03": "another program has kept it locked",
    "53100": "its disk is full",
    "25006": "it may only be read",
}

_FAULTS = (sa.exc.OperationalError, sa.exc.InternalError, sa.exc.TimeoutError)


class Unavailable(Refused):
    """The database cannot serve now: locked, full, read-only or gone. What was asked may be tried
    again: nothing is ever saved twice."""

    exit_code = EXIT_FAILED


def open_engine(url: str | sa.URL) -> Engine:
    """An engine whose transactions write one after the other; see `reading`.

    Raises:
        ConfigError: not a URL of SQLite or PostgreSQL, or the driver is not installed.
    """
    try:
        made = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise _wrong("what stands there is not a database URL") from None
    backend = made.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise _wrong(f"{backend} is not supported")
    try:
        # a server that was restarted has closed the connections that wait in the pool
        engine = sa.create_engine(made, pool_pre_ping=backend == "postgresql")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"rank.store: a label store on {backend} needs the Python package {error.name}",
            "Install it with: pip install 'prefline[postgres]'",
        ) from None
    except sa.exc.ArgumentError:
        raise _wrong(f"{made.drivername} is not supported") from None
    if backend == "sqlite":
        sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _wrong(problem: str) -> ConfigError:
    # the URL itself is not shown: it may hold a password
    return ConfigError(
        f"rank.store: {problem}",
        "Examples: sqlite:////data/labels.db, postgresql+psycopg://user@host/database",
    )


def reading(engine: Engine) -> Connection:
    """A connection whose transactions see one state of the database and wait for nobody."""
    options: dict[str, Any] = {_READS: True}
    if engine.dialect.name == "postgresql":
        # a reader of SQLite sees one state anyway
        options["isolation_level"] = "REPEATABLE READ"
    return engine.connect().execution_options(**options)


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    # the driver must not begin transactions by itself: `_begin` does
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout = {BUSY_SECONDS * 1000:.0f}",  # before journal_mode, which needs a lock
        "journal_mode = WAL",
        "synchronous = FULL",  # an acknowledged ranking survives a power cut
        "foreign_keys = ON",
        "secure_delete = ON",  # what is forgotten is overwritten
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(tx: Connection) -> None:
    reads = tx.get_execution_options().get(_READS)
    if tx.dialect.name == "sqlite":
        tx.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
    elif not reads:
        tx.exec_driver_sql(
            f"SET LOCAL lock_timeout = {BUSY_SECONDS * 1000:.0f};"
            f" SELECT pg_advisory_xact_lock({_POSTGRES_LOCK})"
        )


@contextmanager
def plain_errors(name: str) -> Iterator[None]:
    """Faults of the machine become `Unavailable`; `name` and details go to stderr, for the lead.

    A people's page must not show where the store is.
    """
    try:
        yield
    except _FAULTS as error:
        cause = getattr(error, "orig", None) or error
        reason = _reason(cause)
        if reason is None:
            raise
        print(f"label store {name}: {cause}", file=sys.stderr)  # noqa: T201
        raise unavailable(reason) from error


def unavailable(reason: str) -> Unavailable:
    return Unavailable(
        f"The label store cannot be used now: {reason}. Try again in a while, or tell the lead;"
        " nothing is saved twice."
    )


def _reason(cause: BaseException) -> str | None:
    """Words for a fault of the machine; None for a mistake of ours."""
    if isinstance(cause, sqlite3.Error):
        # the low byte is the kind of error, the rest its detail
        return _SQLITE_REASONS.get(cause.sqlite_errorcode & 0xFF)
    if isinstance(cause, sa.exc.TimeoutError):
        return "too many are waiting for it"
    state = getattr(cause, "sqlstate", None) or ""
    # no state: there was no answer. 08, 53, 57: connection, resources, an operator's doing
    lost = "it does not answer" if state[:2] in ("", "08", "53", "57") else None
    return _POSTGRES_REASONS.get(state, lost)
