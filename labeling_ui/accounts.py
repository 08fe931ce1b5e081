"""Accounts of the ranking app: who may rank (`annotator`) and who may also look after it (`lead`).

    python -m labeling_ui.accounts RUN add NAME [--role lead] [--password-stdin] [--replace]
    python -m labeling_ui.accounts RUN list
    python -m labeling_ui.accounts RUN disable NAME

`add` makes a password and prints it once, unless one comes on stdin. Passwords are kept as scrypt
hashes. Five failed logins for one name from one address close that door for 15 minutes; a wider
limit holds against somebody who tries many names or many addresses.
"""

# ruff: noqa: T201 - a command: its results go to stdout
from __future__ import annotations

import argparse
import hashlib
import hmac
import re
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from labeling_ui.schema import login_failures, users
from labeling_ui.store import Store, insert_new, log_event, open_run_store
from pipeline.errors import EXIT_DONE, DataError, ToolkitError

ROLES = ("annotator", "lead")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")
_MIN_PASSWORD = 8
# OWASP's scrypt setting for 32 MiB: N=2^15, r=8, p=3
_SCRYPT = (2**15, 8, 3)
_SCRYPT_MEMORY = 64 * 2**20

_CLOSED_SECONDS = 15 * 60.0
_FAILURES_PAIR = 5
_FAILURES_WIDE = 50


def hash_password(password: str) -> str:
    n, r, p = _SCRYPT
    salt = secrets.token_bytes(16)
    return f"scrypt${n}${r}${p}${salt.hex()}${_scrypt(password, salt, n, r, p).hex()}"


def password_fits(password: str, stored: str) -> bool:
    _, n, r, p, salt, digest = stored.split("$")
    made = _scrypt(password, bytes.fromhex(salt), int(n), int(r), int(p))
    return hmac.compare_digest(made, bytes.fromhex(digest))


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    raw = password.encode("utf-8", "surrogatepass")
    return hashlib.scrypt(raw, salt=salt, n=n, r=r, p=p, maxmem=_SCRYPT_MEMORY)


def add_user(
    store: Store, name: str, password: str, role: str = "annotator", replace: bool = False
) -> int:
    """Make a person's account, or with `replace` give an old one a new password and role."""
    if not _NAME.match(name):
        raise DataError(
            f"{name!r} cannot be a user name", "Use letters, digits and . _ @ - (at most 64)."
        )
    if role not in ROLES:
        raise DataError(f"{role!r} is not a role; roles are {', '.join(ROLES)}")
    if len(password) < _MIN_PASSWORD:
        raise DataError(f"the password is shorter than {_MIN_PASSWORD} characters")
    values = {"role": role, "password": hash_password(password), "active": True}
    with store.write() as tx:
        found = find_user(tx, name)
        if found is None:
            row = {"kind": "person", "name": name, "created": time.time(), **values}
            user_id = int(
                tx.execute(sa.insert(users).values(**row).returning(users.c.id)).scalar_one()
            )
            log_event(tx, "user added", user_id, role=role)
            return user_id
        if not replace:
            raise DataError(
                f"there is a user {name!r} already", "Add --replace for a new password and role."
            )
        # a new password ends every login made with the old one
        update = sa.update(users).where(users.c.id == found.id)
        tx.execute(update.values(**values, session=users.c.session + 1))
        log_event(tx, "user replaced", found.id, role=role)
        return int(found.id)


def disable_user(store: Store, name: str) -> None:
    """Close an account and end its logins; its rankings stay."""
    with store.write() as tx:
        found = find_user(tx, name)
        if found is None:
            raise DataError(f"there is no user {name!r}", "See: prefline users RUN list")
        update = sa.update(users).where(users.c.id == found.id)
        tx.execute(update.values(active=False, session=users.c.session + 1))
        log_event(tx, "user disabled", found.id)


def list_users(store: Store) -> list[Row[Any]]:
    with store.read() as tx:
        query = sa.select(users).where(users.c.kind == "person").order_by(users.c.name)
        return list(tx.execute(query).all())


def find_user(tx: Connection, name: str) -> Row[Any] | None:
    asked = name.replace("\0", "")
    query = sa.select(users).where(users.c.kind == "person", users.c.name == asked)
    return tx.execute(query).first()


# ---- logging in ----------------------------------------------------------------------------


def check_login(
    store: Store, name: str, password: str, address: str, now: float | None = None
) -> Row[Any] | None:
    """The user, or None when name and password do not fit or too many tries have failed.

    Slow on purpose (scrypt): call it from a thread, never on an event loop.
    """
    now = time.time() if now is None else now
    if seconds_closed(store, name, address, now) > 0:
        return None
    with store.read() as tx:
        found = find_user(tx, name)
    # an unknown name costs the same time as a known one
    stored = found.password if found is not None and found.password else _nobody()
    fits = password_fits(password[:1024], stored)
    if fits and found is not None and found.active:
        with store.write() as tx:
            keys = [key for key, _ in _doors(name, address)[:1]]
            tx.execute(sa.delete(login_failures).where(login_failures.c.key.in_(keys)))
            log_event(tx, "login", found.id)
        return found
    _count_failure(store, name, address, now)
    return None


def seconds_closed(store: Store, name: str, address: str, now: float | None = None) -> float:
    """How long logins stay closed for this name and address; 0 when they are open."""
    now = time.time() if now is None else now
    closed = 0.0
    with store.read() as tx:
        for key, limit in _doors(name, address):
            row = tx.execute(sa.select(login_failures).where(login_failures.c.key == key)).first()
            if row is not None and row.failures >= limit:
                closed = max(closed, row.last + _CLOSED_SECONDS - now)
    return closed


def _doors(name: str, address: str) -> list[tuple[str, int]]:
    # a name is what somebody typed: of any length, and PostgreSQL takes no NUL
    name = name[:64].replace("\0", "")
    return [
        (f"{name}|{address}", _FAILURES_PAIR),
        (f"name:{name}", _FAILURES_WIDE),
        (f"address:{address}", _FAILURES_WIDE),
    ]


def _count_failure(store: Store, name: str, address: str, now: float) -> None:
    with store.write() as tx:
        old = login_failures.c.last < now - _CLOSED_SECONDS
        tx.execute(sa.delete(login_failures).where(old))
        for key, _ in _doors(name, address):
            insert_new(tx, login_failures, [{"key": key, "failures": 0, "last": now}])
            update = sa.update(login_failures).where(login_failures.c.key == key)
            tx.execute(update.values(failures=login_failures.c.failures + 1, last=now))
        log_event(tx, "login failed", address=address)


_NOBODY: list[str] = []


def _nobody() -> str:
    """A hash that no password fits, made once."""
    if not _NOBODY:
        _NOBODY.append(hash_password(secrets.token_hex(16)))
    return _NOBODY[0]


# ---- command -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="prefline users", description="Accounts of the ranking app."
    )
    parser.add_argument("run", type=Path, help="run directory")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="make an account; prints its password once")
    add.add_argument("name")
    add.add_argument("--role", choices=ROLES, default="annotator")
    add.add_argument("--password-stdin", action="store_true", help="read the password from stdin")
    add.add_argument("--replace", action="store_true", help="new password for an existing account")
    commands.add_parser("list", help="names, roles and whether they are active")
    disable = commands.add_parser("disable", help="close an account; its rankings stay")
    disable.add_argument("name")
    given = parser.parse_args(arguments)
    try:
        _run(given)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def _run(given: argparse.Namespace) -> None:
    store = open_run_store(given.run)
    if given.command == "add":
        password = (
            sys.stdin.readline().rstrip("\r\n")
            if given.password_stdin
            else secrets.token_urlsafe(9)
        )
        add_user(store, given.name, password, given.role, given.replace)
        print(f"{given.name}: {given.role}", file=sys.stderr)
        if not given.password_stdin:
            print("Password (shown only now):", file=sys.stderr)
            print(password)
    elif given.command == "disable":
        disable_user(store, given.name)
        print(f"{given.name}: disabled", file=sys.stderr)
    else:
        for row in list_users(store):
            print(f"{row.name}\t{row.role}\t{'active' if row.active else 'disabled'}")


if __name__ == "__main__":
    sys.exit(main())
