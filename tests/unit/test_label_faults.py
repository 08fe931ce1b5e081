"""A database that is locked, full, read-only, killed or not there: told in words, nothing lost."""

import json
import os
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from labeling_ui import accounts, database, labels, rank
from labeling_ui.assignments import claim, save_draft
from labeling_ui.database import Unavailable
from labeling_ui.schema import events, rankings, users
from labeling_ui.store import Store, log_event
from labeling_ui.submitting import submit
from pipeline.errors import ArtifactError, ConfigError
from tests.label_work import store_with_work
from tests.unit.test_label_races import _FORK, check_sound, look, make
from tests.unit.test_label_rank import files, make_out, pairs, samples, settings

# ---- the database cannot serve -------------------------------------------------------------


def test_a_store_that_another_program_keeps_locked_is_told_and_can_still_be_read(
    new_store, monkeypatch
):
    _, (ann,) = make(new_store, 1, 1)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    store, other = new_store(), new_store()
    work = claim(store, ann)
    with other.write() as tx:
        log_event(tx, "held")
        with pytest.raises(Unavailable, match="another program has kept it locked"):
            submit(store, ann, work.token, [1, 2, 3], submission="s")
        assert look(store, sa.select(rankings)) == []
    assert submit(store, ann, work.token, [1, 2, 3], submission="s").state == "ranked"
    check_sound(store, 1)


def test_threads_that_queue_for_too_long_are_told(new_store, monkeypatch):
    _, (ann,) = make(new_store, 1, 1)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    store, inside, done = new_store(), threading.Event(), threading.Event()

    def hold():
        with store.write():
            inside.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(30)
    try:
        with pytest.raises(Unavailable, match="too many"):
            claim(store, ann)
    finally:
        done.set()
        thread.join()
    assert claim(store, ann) is not None


def test_a_full_disk_is_told_and_the_same_submission_works_once_there_is_room(tmp_path, capsys):
    store = Store(tmp_path / "labels.db")
    (ann,) = store_with_work(store, 1, 3)[1]
    work = claim(store, ann)
    log = Path(f"{store.file}-wal")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 1000, unlimited[1]))
    try:
        with pytest.raises(Unavailable, match="its disk refuses to be written"):
            submit(store, ann, work.token, [1, 2, 3], submission="s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    # the lead reads where, people do not
    assert str(store.file) in capsys.readouterr().err
    assert look(store, sa.select(rankings)) == []
    assert submit(store, ann, work.token, [1, 2, 3], submission="s").state == "ranked"
    with sqlite3.connect(store.file) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    check_sound(store, 1)


def test_a_database_that_may_not_grow_is_called_full(tmp_path):
    store = Store(tmp_path / "labels.db")
    (ann,) = store_with_work(store, 1, 1)[1]
    with store.read() as tx:
        pages = tx.exec_driver_sql("PRAGMA page_count").scalar()
    store.close()

    def limit(connection, _record):
        connection.execute(f"PRAGMA max_page_count = {pages}")

    sa.event.listen(store.engine, "connect", limit)
    with pytest.raises(Unavailable, match="its disk is full"), store.write() as tx:
        log_event(tx, "long", detail="x" * 1_000_000)
    assert claim(store, ann) is not None


@pytest.fixture
def foreign_folder():
    """A folder whose files this process may only read, as somebody who is not root."""
    folder = Path(tempfile.mkdtemp(prefix="labels-"))
    folder.chmod(0o755)
    yield folder
    os.seteuid(os.getuid())
    shutil.rmtree(folder)


@pytest.mark.parametrize("folder_too", [False, True])
def test_a_store_that_may_only_be_read_is_told(foreign_folder, folder_too):
    store = Store(foreign_folder / "labels.db")
    (ann,) = store_with_work(store, 1, 1)[1]
    store.close()
    store.file.chmod(0o444)
    foreign_folder.chmod(0o555 if folder_too else 0o777)
    if os.getuid() == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(
            (Unavailable, ArtifactError), match=r"may only be read|cannot be opened"
        ):
            claim(Store(foreign_folder / "labels.db"), ann)
    finally:
        os.seteuid(os.getuid())
        foreign_folder.chmod(0o755)


def test_a_postgres_server_that_drops_us_is_told_and_found_again(new_store):
    if new_store.server is None:
        pytest.skip("SQLite has no server")
    _, (ann,) = make(new_store, 1, 1)
    store, other = new_store(), new_store()
    kick = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = {}"

    def lose():
        with store.write() as tx:
            pid = tx.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            with other.read() as looking:
                looking.exec_driver_sql(kick.format(pid))
            log_event(tx, "lost")

    with pytest.raises(Unavailable, match="does not answer"):
        lose()
    assert look(store, sa.select(events).where(events.c.kind == "lost")) == []
    assert claim(store, ann) is not None


def test_what_a_database_cannot_hold_is_no_fault_of_it(new_store, monkeypatch):
    monkeypatch.setattr(accounts, "_SCRYPT", (2**4, 8, 1))
    monkeypatch.setattr(accounts, "_NOBODY", [])
    _, (ann,) = make(new_store, 1, 1)
    store = new_store()
    assert accounts.check_login(store, "a\0nn0", "long enough", "10.0.0.1") is None
    assert accounts.seconds_closed(store, "\0" * 100, "10.0.0.1") == 0
    work = claim(store, ann)
    assert not save_draft(store, ann, work.token, [1, None, None], 2**31)
    assert not save_draft(store, ann, work.token, [1, None, None], 2**70)
    assert save_draft(store, ann, work.token, [1, None, None], 2**31 - 1)


def test_a_mistake_of_ours_is_no_fault_of_the_machine(new_store):
    store = new_store()
    with pytest.raises(sa.exc.DBAPIError), store.write() as tx:
        tx.exec_driver_sql("SELECT * FROM no_such_table")


# ---- killed --------------------------------------------------------------------------------


def _submit_for_ever(url, person, pipe):
    store, number = Store(url), 0
    while (work := claim(store, person)) is not None:
        pipe.send(("asked", number, work.token))
        submit(store, person, work.token, [1, 2, 3], submission=str(number))
        pipe.send(("acknowledged", number, work.token))
        number += 1


def test_what_was_acknowledged_before_a_kill_is_there_and_the_retry_doubles_nothing(new_store):
    url, people = make(new_store, prompts=120, people=4)
    for round, person in enumerate(people):
        ours, theirs = _FORK.Pipe()
        process = _FORK.Process(target=_submit_for_ever, args=(url, person, theirs))
        process.start()
        theirs.close()
        heard = []
        # in the midst of its work: after so many messages, wherever it is then
        while len(heard) < 5 + 4 * round:
            heard.append(ours.recv())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while ours.poll():
            try:
                heard.append(ours.recv())
            except EOFError:
                break
        store = new_store()
        kept = {
            row.submission
            for row in look(
                store, sa.select(rankings.c.submission).where(rankings.c.user_id == person)
            )
        }
        acknowledged = {str(number) for word, number, _ in heard if word == "acknowledged"}
        asked = {str(number): token for word, number, token in heard if word == "asked"}
        assert acknowledged <= kept <= set(asked)
        assert len(asked) - len(acknowledged) <= 1
        for number, token in asked.items():
            submit(store, person, token, [1, 2, 3], submission=number)
        again = look(store, sa.select(rankings.c.submission).where(rankings.c.user_id == person))
        assert sorted(row.submission for row in again) == sorted(asked)
        check_sound(store, 1)
        store.close()


# ---- URLs and drivers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["mysql://u:secret@h/d", "nothing://u:secret@h/d", "://secret", "sqlite+no://secret"]
)
def test_a_database_that_we_do_not_know_is_refused_without_showing_the_password(url):
    with pytest.raises(ConfigError, match=r"rank\.store") as refused:
        Store(url)
    assert "secret" not in str(refused.value)


def test_a_driver_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(
        ConfigError, match=r"needs the Python package psycopg(.|\n)*prefline\[postgres\]"
    ):
        Store("postgresql+psycopg://u@h/d")


def test_a_server_that_is_not_there_is_named_without_the_password(capsys):
    pytest.importorskip("psycopg")
    with pytest.raises(ArtifactError, match="does not answer") as refused:
        Store("postgresql+psycopg://u:secret@127.0.0.1:1/d")
    assert "127.0.0.1:1" in str(refused.value)
    assert "secret" not in str(refused.value) + capsys.readouterr().err


# ---- the rest of the toolkit on either database --------------------------------------------


def test_the_rank_step_writes_the_same_files_whatever_the_database(new_store, tmp_path):
    given = samples(tmp_path)
    (tmp_path / "plain").mkdir()
    (tmp_path / "here").mkdir()
    plain, here = make_out(tmp_path / "plain"), make_out(tmp_path / "here")
    rank.run(settings(overlap=2), {"samples": given}, plain)
    url = new_store.url()
    url = url if "://" in url else f"sqlite:///{url}"
    for _ in range(2):
        rank.run(settings(overlap=2, store=url), {"samples": given}, here)
    assert files(here) == files(plain)


def test_the_commands_work_on_either_database(new_store, tmp_path, capsys):
    url = new_store.url()
    url = url if "://" in url else f"sqlite:///{url}"
    config = {"model": {"base": "./m"}, "rank": {"store": url}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in pairs(7)))
    run = [str(tmp_path)]
    assert labels.main([*run, "import", str(tmp_path / "data.jsonl")]) == 0
    assert labels.main([*run, "export", "--to", str(tmp_path / "out.jsonl")]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 7
    capsys.readouterr()
    assert labels.main([*run, "stats"]) == 0
    assert json.loads(capsys.readouterr().out)["rankings"] == 7
    code = labels.main([*run, "backup", "--to", str(tmp_path / "copy.db")])
    said = capsys.readouterr().err
    assert (code, "Use the database's own backup" in said) == (
        (0, False) if new_store.server is None else (2, True)
    )
    store = new_store()
    (name,) = {row.name for row in look(store, sa.select(users.c.name))}
    assert labels.main([*run, "forget", name]) == 0
    assert look(store, sa.select(rankings)) == []
