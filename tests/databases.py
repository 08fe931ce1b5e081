"""Databases for tests of the label store: files of SQLite, and a PostgreSQL server of our own."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa


@contextmanager
def postgres_server() -> Iterator[str]:
    """A new PostgreSQL server that listens on a socket only; the URL of its first database.

    Raises:
        LookupError: its programs or our driver are not installed.
    """
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    initdb = shutil.which("initdb") or (found[-1] if found else None)
    if initdb is None:
        raise LookupError("no PostgreSQL server on this machine (initdb was not found)")
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise LookupError("no psycopg: pip install 'prefline[postgres]'") from None
    # not pytest's folder, which only its owner may enter; and short: a socket has 107 characters
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    run: dict[str, object] = {"cwd": folder}
    if os.geteuid() == 0:
        # the server refuses to run as root
        shutil.chown(folder, "nobody")
        run |= {"user": "nobody", "group": "nogroup", "extra_groups": []}
    data = folder / "data"
    made = subprocess.run(
        [initdb, "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **run,
    )
    assert made.returncode == 0, made.stdout
    log = (folder / "log").open("wb")
    options = ("listen_addresses=", "fsync=off", "max_connections=200")
    server = subprocess.Popen(
        [
            Path(initdb).with_name("postgres"),
            *("-D", data, "-k", folder),
            *(word for option in options for word in ("-c", option)),
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        **run,
    )
    url = f"postgresql+psycopg://postgres@/postgres?host={folder}"
    try:
        _wait(url, server)
        yield url
    finally:
        # at once: nobody needs its data, and connections may still be open
        server.send_signal(signal.SIGQUIT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    end = time.monotonic() + 60
    while True:
        try:
            with engine.connect():
                return
        except sa.exc.OperationalError:
            if server.poll() is not None or time.monotonic() > end:
                raise
            time.sleep(0.1)


def new_database(server: str, name: str) -> str:
    """Make an empty database there; its URL."""
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
    return sa.make_url(server).set(database=name).render_as_string(hide_password=False)
