"""The ranking app behind a login of ours.

    python -m labeling_ui.server RUN [--host 127.0.0.1] [--port 7860] [--public-url URL]

FastAPI owns /login, /logout and /healthz; the ranking page is mounted at /ui, the page of the lead at
/lead, both Gradio's. A login is a signed cookie and survives a restart (Gradio's own logins do
not). There is no account to begin with: without one, the server says how to make it and ends with
exit 2.
"""

# ruff: noqa: T201 - a command: it says where it listens
from __future__ import annotations

import argparse
import asyncio
import html
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from sqlalchemy.engine import Row

from labeling_ui import accounts, guard
from labeling_ui.dashboard import Dashboard
from labeling_ui.forms import Refused
from labeling_ui.hosting import LOCAL_NAMES, check_port, keep_gradio_quiet, mount, serve
from labeling_ui.progress import Teller
from labeling_ui.schema import users
from labeling_ui.store import Store, log_event, open_run_store
from pipeline.errors import EXIT_DONE, ConfigError, ToolkitError

# whoever opens the ranking page is handed a prompt: a lead comes to look
_HOME = {"annotator": "/ui/", "lead": "/lead/"}


class Logins:
    """Who is behind a request; and the pages to log in and out."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.secret = store.secret("sessions")
        # a queue of its own, one after the other: each takes 32 MB and a core for a quarter of a
        # second, and a hundred people who come at nine must not stop those who already work
        self.door = ThreadPoolExecutor(1, "login")
        self.page = (Path(__file__).parent / "assets" / "login.html").read_text(encoding="utf-8")

    def user_of(self, cookie_header: str) -> Row[Any] | None:
        """Whose login this is: signed by us, not expired, not ended, account still active."""
        signed = guard.read(self.secret, guard.cookie_in(cookie_header))
        if signed is None:
            return None
        with self.store.read() as tx:
            found = tx.execute(sa.select(users).where(users.c.id == signed[0])).first()
        fits = found is not None and found.active and found.session == signed[1]
        return found if fits else None

    def name_of(self, request: Request) -> str | None:
        found = self.user_of(request.headers.get("cookie", ""))
        return found.name if found else None

    def lead_of(self, request: Request) -> str | None:
        """The name of a lead; None for everybody else."""
        found = self.user_of(request.headers.get("cookie", ""))
        return found.name if found is not None and found.role == "lead" else None

    def role_of(self, cookie_header: str) -> str | None:
        found = self.user_of(cookie_header)
        return found.role if found is not None else None

    def user_id(self, name: str) -> int:
        """For the handlers of the page, which look their user up each time."""
        with self.store.read() as tx:
            found = accounts.find_user(tx, name)
        if found is None or not found.active:
            raise Refused("This account is not active. Log in again, or ask the lead.")
        return int(found.id)

    async def start(self, request: Request) -> Response:
        role = self.role_of(request.headers.get("cookie", ""))
        return RedirectResponse(_HOME[role] if role else "/login", 303)

    async def show(self, _request: Request) -> Response:
        return self._form("", 200)

    async def log_in(self, request: Request) -> Response:
        form = parse_qs((await request.body()).decode("utf-8", "replace"))
        name, password = form.get("name", [""])[0], form.get("password", [""])[0]
        address = request.client.host if request.client else "unknown"
        check = partial(accounts.check_login, self.store, name, password, address)
        found = await asyncio.get_running_loop().run_in_executor(self.door, check)
        if found is None:
            closed = accounts.seconds_closed(self.store, name, address)
            if closed > 0:
                minutes = int(closed // 60) + 1
                return self._form(f"Too many failed logins. Try again in {minutes} minutes.", 429)
            return self._form("Name and password do not fit.", 401)
        answer = RedirectResponse(_HOME[found.role], 303)
        answer.set_cookie(
            guard.COOKIE,
            guard.sign(self.secret, found.id, found.session),
            max_age=guard.SESSION_SECONDS,
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )
        return answer

    async def log_out(self, request: Request) -> Response:
        found = self.user_of(request.headers.get("cookie", ""))
        if found is not None:
            with self.store.write() as tx:
                # ends the login on the server, too: a copied cookie is worth nothing afterwards
                update = sa.update(users).where(users.c.id == found.id)
                tx.execute(update.values(session=users.c.session + 1))
                log_event(tx, "logout", found.id)
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(guard.COOKIE)
        return answer

    def _form(self, said: str, status: int) -> Response:
        message = f'<p class="bad" role="alert">{html.escape(said)}</p>' if said else ""
        page = self.page.replace("<!-- said -->", message)
        return HTMLResponse(page, status, {"content-security-policy": guard.LOGIN_CSP})


async def _health(_request: Request) -> Response:
    return Response("ok\n", media_type="text/plain")


def create_app(store: Store, run_dir: Path, names: Sequence[str] = LOCAL_NAMES) -> FastAPI:
    """The whole server as an ASGI app."""
    # seconds to import: errors of the command line must not wait for it
    from labeling_ui import app as page
    from labeling_ui import lead, lead_page

    logins, dashboard = Logins(store), Dashboard(store)

    async def stats(request: Request) -> Response:
        if logins.lead_of(request) is None:
            return JSONResponse({"error": "This is for leads."}, 403)
        found = await asyncio.to_thread(dashboard.overview)
        return JSONResponse(found.to_json())

    server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for path, method, handler in (
        ("/", "GET", logins.start),
        ("/healthz", "GET", _health),
        ("/login", "GET", logins.show),
        ("/login", "POST", logins.log_in),
        ("/logout", "POST", logins.log_out),
        # before the mounts: the first that fits answers
        ("/lead/stats.json", "GET", stats),
    ):
        server.add_route(path, handler, methods=[method])
    tell_progress = Teller(run_dir, store).soon
    handlers = page.Handlers(store, logins.user_id, tell_progress)
    lead_handlers = lead.Handlers(store, logins.user_id, tell_progress, dashboard)
    mount(server, run_dir, "/ui", page.build(handlers), logins.name_of, page.HEAD)
    mount(
        server, run_dir, "/lead", lead_page.build(lead_handlers), logins.lead_of,
        lead_page.HEAD, lead_page.CSS,
    )  # fmt: skip
    server.add_middleware(guard.Guard, names=names, role_of=logins.role_of)
    return server


def names_of(host: str, public_url: str | None) -> list[str]:
    """Host names under which browsers may reach this server."""
    names = [*LOCAL_NAMES]
    if host not in LOCAL_NAMES:
        names += [host, socket.gethostname(), socket.getfqdn()]
    if public_url:
        name = urlsplit(public_url).hostname
        if not name:
            raise ConfigError(
                f"--public-url {public_url}: not a URL", "Example: https://rank.example.org"
            )
        names.append(name)
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prefline rank", description="The ranking app.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--public-url", help="address that browsers use, behind a proxy with TLS")
    given = parser.parse_args(arguments)
    try:
        return _serve(given)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _serve(given: argparse.Namespace) -> int:
    run_dir = given.run.resolve()
    store = open_run_store(run_dir)
    if not any(user.active for user in accounts.list_users(store)):
        raise ConfigError(
            "nobody can log in: there is no account yet",
            f"Make one with: prefline users {given.run} add NAME",
        )
    check_port(given.host, given.port)
    keep_gradio_quiet()
    app = create_app(store, run_dir, names_of(given.host, given.public_url))
    if given.host not in LOCAL_NAMES and not given.public_url:
        print(
            f"warning: {given.host} is open to the network and this server speaks plain HTTP."
            " Put a proxy with TLS in front of it and give --public-url https://...",
            file=sys.stderr,
        )
    shown = f"[{given.host}]" if ":" in given.host else given.host
    print(f"Ranking app: {given.public_url or f'http://{shown}:{given.port}'}", file=sys.stderr)
    serve(app, given.host, given.port)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
