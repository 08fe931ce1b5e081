"""Label stores on each database: a test that asks for `new_store` runs on all of them."""

from __future__ import annotations

import itertools
import os
import re
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

from labeling_ui.store import Store
from tests.databases import new_database, postgres_server

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres():
    """URL of a PostgreSQL server that lives as long as the tests."""
    try:
        with postgres_server() as url:
            yield url
    except LookupError as missing:
        pytest.skip(str(missing))


class Stores:
    """Makes and opens stores of one test on one database; all are closed with the test."""

    def __init__(self, tmp_path, server=None):
        self.folder, self.server = tmp_path, server
        self.urls, self.opened = {}, []

    def __call__(self, name="labels"):
        store = Store(self.url(name))
        self.opened.append(store)
        return store

    def url(self, name="labels"):
        """Where the store of that name is; an empty database before it is opened."""
        if self.server is None:
            return str(self.folder / f"{name}.db")
        if name not in self.urls:
            unique = f"test_{os.getpid()}_{next(_numbers)}"
            self.urls[name] = new_database(self.server, unique)
        return self.urls[name]

    def close(self):
        for store in self.opened:
            store.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def new_store(request, tmp_path):
    server = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    stores = Stores(tmp_path, server)
    yield stores
    stores.close()


@pytest.fixture
def old_store():
    """Writes a store of schema 1 where `new_store` will find it; returns its URL."""

    def write(stores):
        text = (Path(__file__).parent / "label_store_1.sql").read_text()
        if stores.server is None:
            with sqlite3.connect(stores.url()) as raw:
                raw.executescript(text)
            return stores.url()
        engine = sa.create_engine(stores.url(), poolclass=sa.NullPool)
        with engine.begin() as tx:
            for statement in _for_postgres(text):
                tx.exec_driver_sql(statement)
        return stores.url()

    return write


def _for_postgres(text):
    """The same store as version 1 made it on PostgreSQL."""
    text = re.sub(r"INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT", "SERIAL PRIMARY KEY", text)
    text = re.sub(r"(events \(\s+id) INTEGER", r"\1 SERIAL", text)
    # SQLite's 1 and 0 in columns of truth values
    yield "UPDATE pg_cast SET castcontext = 'i' WHERE (castsource, casttarget) = (23, 16)"
    for statement in text.split(";\n"):
        if "TRIGGER" not in statement:
            yield statement
    for change in ("UPDATE", "DELETE"):
        yield (
            f"CREATE RULE events_no_{change.lower()} AS ON {change} TO events DO INSTEAD NOTHING"
        )
    for table in ("users", "events"):
        yield f"SELECT setval('{table}_id_seq', (SELECT max(id) FROM {table}))"
