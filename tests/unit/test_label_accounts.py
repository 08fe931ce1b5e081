"""Accounts: passwords that cannot be read back, logins that cannot be guessed quickly."""

import io
import sqlite3

import pytest

from labeling_ui import accounts
from labeling_ui.accounts import add_user, check_login, disable_user, list_users, seconds_closed
from labeling_ui.store import Store
from pipeline.errors import DataError

NOW = 1_000_000.0


@pytest.fixture
def store(tmp_path, monkeypatch):
    # the real setting takes a quarter of a second on purpose
    monkeypatch.setattr(accounts, "_SCRYPT", (2**4, 8, 1))
    monkeypatch.setattr(accounts, "_NOBODY", [])
    (tmp_path / "config.yaml").write_text("model: {base: ./m}\n")
    return Store(tmp_path / "labels.db")


def login(store, name, password, address="1.2.3.4", now=NOW):
    return check_login(store, name, password, address, now)


def test_only_the_right_password_of_an_active_account_opens_it(store):
    add_user(store, "ann", "correct horse")
    assert login(store, "ann", "correct horse").name == "ann"
    assert login(store, "ann", "correct hors") is None
    assert login(store, "ANN", "correct horse") is None
    assert login(store, "nobody", "correct horse") is None
    disable_user(store, "ann")
    assert login(store, "ann", "correct horse", address="other") is None


def test_the_shipped_hash_is_scrypt_with_32_mib_and_a_salt_of_its_own():
    first, second = accounts.hash_password("secret"), accounts.hash_password("secret")
    assert first.startswith("scrypt$32768$8$")
    assert first != second
    assert accounts.password_fits("secret", first)
    assert not accounts.password_fits("Secret", first)


def test_the_store_holds_no_password(store, tmp_path):
    add_user(store, "ann", "correct horse")
    store.close()
    with sqlite3.connect(tmp_path / "labels.db") as raw:
        assert "correct horse" not in "\n".join(raw.iterdump())


def test_five_failures_close_the_door_for_fifteen_minutes_even_for_the_right_password(store):
    add_user(store, "ann", "correct horse")
    for i in range(5):
        assert seconds_closed(store, "ann", "1.2.3.4", NOW + i) == 0
        login(store, "ann", "wrong", now=NOW + i)
    assert login(store, "ann", "correct horse", now=NOW + 10) is None
    assert seconds_closed(store, "ann", "1.2.3.4", NOW + 10) == pytest.approx(15 * 60 - 6)
    assert login(store, "ann", "correct horse", now=NOW + 10 + 15 * 60) is not None


def test_an_attacker_cannot_lock_a_person_out_from_another_address(store):
    add_user(store, "ann", "correct horse")
    for _ in range(20):
        login(store, "ann", "wrong", address="6.6.6.6")
    assert login(store, "ann", "correct horse") is not None


def test_many_names_from_one_address_and_many_addresses_for_one_name_are_stopped(store):
    for i in range(50):
        login(store, f"name{i}", "wrong", address="6.6.6.6")
        login(store, "ann", "wrong", address=f"7.7.7.{i}")
    assert seconds_closed(store, "somebody", "6.6.6.6", NOW) > 0
    assert seconds_closed(store, "ann", "9.9.9.9", NOW) > 0
    assert seconds_closed(store, "somebody", "9.9.9.9", NOW) == 0


def test_a_new_password_or_a_disabled_account_ends_every_login(store):
    add_user(store, "ann", "correct horse")
    sessions = [list_users(store)[0].session]
    add_user(store, "ann", "battery staple", replace=True)
    sessions.append(list_users(store)[0].session)
    disable_user(store, "ann")
    sessions.append(list_users(store)[0].session)
    assert len(set(sessions)) == 3


@pytest.mark.parametrize("name", ["", "a b", "../x", "<b>", "-x", "x" * 65, "a\nb"])
def test_names_that_could_confuse_are_refused(store, name):
    with pytest.raises(DataError, match="user name"):
        add_user(store, name, "correct horse")


def test_the_command_adds_lists_and_disables(store, tmp_path, capsys, monkeypatch):
    run = str(tmp_path)
    assert accounts.main([run, "add", "ann", "--role", "lead"]) == 0
    password = capsys.readouterr().out.strip()
    assert login(store, "ann", password).role == "lead"

    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin 123\n"))
    assert accounts.main([run, "add", "bob", "--password-stdin"]) == 0
    assert capsys.readouterr().out == ""
    assert login(store, "bob", "from stdin 123").role == "annotator"

    assert accounts.main([run, "disable", "bob"]) == 0
    assert accounts.main([run, "list"]) == 0
    assert capsys.readouterr().out == "ann\tlead\tactive\nbob\tannotator\tdisabled\n"


def test_the_command_says_what_is_wrong_and_exits_2(store, tmp_path, capsys, monkeypatch):
    accounts.main([str(tmp_path), "add", "ann"])
    assert accounts.main([str(tmp_path), "add", "ann"]) == 2
    assert "there is a user 'ann' already" in capsys.readouterr().err
    assert accounts.main([str(tmp_path), "disable", "eve"]) == 2
    assert "there is no user 'eve'" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("short\n"))
    assert accounts.main([str(tmp_path), "add", "eve", "--password-stdin"]) == 2
    assert "shorter than 8" in capsys.readouterr().err
    assert accounts.main([str(tmp_path / "missing"), "list"]) == 2
    assert "not a run directory" in capsys.readouterr().err
