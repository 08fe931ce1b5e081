"""The label store keeps what it is given, refuses what it does not understand, and audits."""

import sqlite3
import threading

import pytest
import sqlalchemy as sa

from labeling_ui import schema
from labeling_ui.assignments import claim
from labeling_ui.exporting import snapshot
from labeling_ui.schema import VERSION, events, tasks
from labeling_ui.store import (
    Store,
    ensure_user,
    insert_new,
    log_event,
    open_run_store,
    task_id,
    task_row,
)
from pipeline.errors import ArtifactError, DataError

ASK = ({"role": "user", "content": "Say something."},)


def test_a_written_store_is_durable_shared_and_checked(tmp_path):
    store = Store(tmp_path / "labels.db")
    with store.read() as tx:
        pragma = {
            name: tx.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragma == {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL
        "foreign_keys": 1,
        "busy_timeout": 30000,
    }


def test_a_store_made_by_a_newer_version_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "labels.db"
    Store(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (str(VERSION + 1),))
    with pytest.raises(ArtifactError, match=rf"newer version .*schema {VERSION + 1}"):
        Store(path)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    path = tmp_path / "labels.db"
    path.write_text("not a database, but long enough to look like one" * 100)
    with pytest.raises(ArtifactError, match="cannot be used as a label store"):
        Store(path)
    assert path.read_text().startswith("not a database")


def test_a_failed_transaction_leaves_nothing_behind(new_store):
    store = new_store()

    def fail_half_way():
        with store.write() as tx:
            insert_new(tx, tasks, [task_row(ASK, ["a", "b"], round=1, origin="x")])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    with store.read() as tx:
        assert tx.execute(sa.select(tasks)).all() == []


def test_events_can_only_be_appended(new_store):
    store = new_store()
    with store.write() as tx:
        log_event(tx, "test")
    for change in (sa.update(events).values(kind="other"), sa.delete(events)):
        with pytest.raises(sa.exc.IntegrityError, match="append-only"), store.write() as tx:
            tx.execute(change)
    with store.read() as tx:
        assert tx.execute(sa.select(events.c.kind)).scalars().all() == ["test"]


def test_the_identity_of_a_task_does_not_depend_on_the_order_of_its_responses():
    first = task_row(ASK, ["a", "b", "c"], round=1, origin="x")
    second = task_row(ASK, ["c", "a", "b"], round=1, origin="x")
    assert first == second
    assert first["id"] != task_id(first["prompt_id"], ["a", "b"], 1)
    assert first["id"] != task_id(first["prompt_id"], ["a", "b", "c"], 2)


def test_queueing_the_same_twice_changes_nothing(new_store):
    store = new_store()
    row = task_row(ASK, ["a", "b"], round=1, origin="x")
    for _ in range(2):
        with store.write() as tx:
            insert_new(tx, tasks, [row, {**row, "origin": "y"}])
    with store.read() as tx:
        assert tx.execute(sa.select(tasks.c.origin)).scalars().all() == ["x"]


def test_two_kinds_of_annotators_may_have_the_same_name(new_store):
    store = new_store()
    with store.write() as tx:
        ids = [ensure_user(tx, kind, "sim-1") for kind in ("simulated", "imported", "simulated")]
    assert ids[0] == ids[2] != ids[1]


def test_a_secret_survives_a_restart_and_differs_between_stores(new_store):
    first, other = new_store("a"), new_store("b")
    secret = first.secret("pseudonyms")
    first.close()
    assert new_store("a").secret("pseudonyms") == secret
    assert other.secret("pseudonyms") != secret != first.secret("sessions")


def test_threads_that_write_at_once_all_succeed(new_store):
    store = new_store()

    def write() -> None:
        for _ in range(20):
            with store.write() as tx:
                log_event(tx, "thread")

    threads = [threading.Thread(target=write) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.read() as tx:
        assert tx.execute(sa.select(sa.func.count()).select_from(events)).scalar_one() == 100


def test_a_folder_that_is_no_run_is_refused_without_making_a_store(tmp_path):
    with pytest.raises(DataError, match="not a run directory"):
        open_run_store(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- stores of older versions --------------------------------------------------------------


def test_an_older_store_is_copied_brought_up_to_date_and_loses_nothing(new_store, old_store):
    old_store(new_store)
    store, fresh = new_store(), new_store("fresh")
    for made in (store, fresh):
        with made.read() as tx:
            there = sa.inspect(tx)
            names = there.get_table_names()
            columns = {t: {c["name"] for c in there.get_columns(t)} for t in names}
            indexes = {t: {i["name"] for i in there.get_indexes(t)} for t in names}
        if made is store:
            migrated = columns, indexes
    assert migrated == (columns, indexes)
    with store.read() as tx:
        filled = dict(tx.execute(sa.select(tasks.c.id, tasks.c.filled)).all())
        kinds = set(tx.execute(sa.select(tasks.c.kind)).scalars())
        lots = set(tx.execute(sa.select(tasks.c.lot)).scalars())
    # a simulated annotator fills no place of a person
    assert filled == {"00000aa1": 1, "00000bb2": 0, "00000cc3": 0}
    assert kinds == {"rank"}
    assert lots == {0xAA, 0xBB, 0xCC}
    work = claim(store, 1)
    assert (work.token, work.form.ranks) == ("t2", (None, 1, 2))
    assert len(snapshot(store, 0.0)) == 2
    with pytest.raises(sa.exc.IntegrityError, match="append-only"), store.write() as tx:
        tx.execute(sa.delete(events))
    if store.file is None:
        return
    backup = store.file.with_name("labels.db.schema-1.backup")
    with sqlite3.connect(backup) as raw:
        assert raw.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == ("1",)
        assert raw.execute("SELECT count(*) FROM rankings").fetchone() == (2,)


def test_a_migration_that_fails_leaves_the_old_store(new_store, old_store, monkeypatch):
    def fails(*_):
        raise RuntimeError("half way")

    url = old_store(new_store)
    monkeypatch.setattr(schema, "count_filled", fails)
    with pytest.raises(RuntimeError, match="half way"):
        new_store()
    with sa.create_engine(url if "://" in url else f"sqlite:///{url}").connect() as raw:
        version = raw.exec_driver_sql("SELECT value FROM meta WHERE key = 'schema'").scalar()
        columns = {column["name"] for column in sa.inspect(raw).get_columns("tasks")}
    assert version == "1"
    assert "filled" not in columns
    monkeypatch.undo()
    assert claim(new_store(), 1).token == "t2"
