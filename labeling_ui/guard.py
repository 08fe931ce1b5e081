"""The door of the ranking app: who may talk to it, how much, and what a browser may do with it."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from labeling_ui.database import Unavailable

COOKIE = "prefline_session"
SESSION_SECONDS = 12 * 3600
# the longest text that a page takes, in letters of four bytes
MAX_BODY_BYTES = 256 * 1024

# Gradio's pages need inline scripts and eval. What matters holds: nothing is loaded from, sent to
# or framed by another place.
PAGE_CSP = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval';"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:;"
    " media-src 'none'; connect-src 'self'; form-action 'self'; frame-src 'none';"
    " frame-ancestors 'none'; object-src 'none'; base-uri 'self'"
)
LOGIN_CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none';"
    " base-uri 'none'"
)
HEADERS = {
    "content-security-policy": PAGE_CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # not no-referrer: with it a browser sends "Origin: null" from our own forms
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}

_FOR_LEADS = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>For leads</title>'
    '<p>This page is for leads. Yours is the <a href="/ui/">ranking page</a>.</p></html>'
)

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def sign(secret: bytes, user_id: int, session: int, now: float | None = None) -> str:
    """The value of a login cookie."""
    expires = int((time.time() if now is None else now) + SESSION_SECONDS)
    text = f"{user_id}.{session}.{expires}"
    return f"{text}.{_mac(secret, text)}"


def read(secret: bytes, cookie: str, now: float | None = None) -> tuple[int, int] | None:
    """(user id, session) of a cookie that we signed and that has not expired."""
    text, _, mac = cookie.rpartition(".")
    if not hmac.compare_digest(_mac(secret, text).encode(), mac.encode("utf-8", "replace")):
        return None
    user_id, session, expires = (int(part) for part in text.split("."))
    if (time.time() if now is None else now) >= expires:
        return None
    return user_id, session


def _mac(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode("utf-8", "replace"), "sha256").hexdigest()


def cookie_in(header: str) -> str:
    """Our cookie's value in a Cookie header, or an empty text."""
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def host_fits(host: str, names: Iterable[str]) -> bool:
    """Whether a Host header names us.

    An address in figures always does: DNS rebinding, against which this is, needs a name.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() in names
    return True


class Guard:
    """Refuses foreign hosts and origins, uploads and large bodies; adds the security headers.

    Args:
        names: host names under which this server is reached.
        role_of: the role of whoever is logged in with a Cookie header; None for strangers.
    """

    def __init__(
        self, app: App, names: Iterable[str], role_of: Callable[[str], str | None]
    ) -> None:
        self.app = app
        self.names = {name.lower() for name in names}
        self.role_of = role_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {
            key.decode("latin-1").lower(): value.decode("latin-1")
            for key, value in scope["headers"]
        }
        try:
            refusal = self._refusal(scope, headers)
        except Unavailable as error:
            refusal = 503, error.message, {"retry-after": "5"}
        if refusal is not None:
            status, text, more = refusal
            await _answer(send, status, text, more)
            return

        started = False

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                there = {key.lower() for key, _ in message["headers"]}
                message["headers"] = list(message["headers"]) + [
                    (key.encode(), value.encode())
                    for key, value in HEADERS.items()
                    if key.encode() not in there
                    # scripts of Gradio have their version in their name
                    and not (key == "cache-control" and "/assets/" in scope["path"])
                ]
            await send(message)

        try:
            await self.app(scope, receive, with_headers)
        except Unavailable as error:
            if started:
                raise
            await _answer(send, 503, error.message, {"retry-after": "5"})

    def _refusal(
        self, scope: Scope, headers: dict[str, str]
    ) -> tuple[int, str, dict[str, str]] | None:
        host = headers.get("host", "")
        path: str = scope["path"]
        method: str = scope.get("method", "GET")
        if scope["type"] != "http":
            return 403, "There is nothing here but HTTP.", {}
        if not host_fits(host, self.names):
            return 400, "This server does not go by that name.", {}
        origin = headers.get("origin")
        # also for GET: Gradio would allow a foreign page to read the answer
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "This request comes from another site.", {}
        if method not in ("GET", "HEAD"):
            if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                return 403, "This request comes from another site.", {}
            if "/upload" in path:
                return 403, "Nothing can be uploaded here.", {}
            length = headers.get("content-length", "")
            if not length.isdigit():
                return 411, "A request must say how long it is.", {}
            if int(length) > MAX_BODY_BYTES:
                return 413, f"A request may hold {MAX_BODY_BYTES} bytes.", {}
        return self._not_yours(path, headers.get("cookie", ""))

    def _not_yours(self, path: str, cookie: str) -> tuple[int, str, dict[str, str]] | None:
        """Pages lead strangers to the login; all that is under /lead is for leads.

        The handlers of both pages look again: this is the first of two doors.
        """
        page = path.strip("/")
        if page != "ui" and page.split("/")[0] != "lead":
            return None
        role = self.role_of(cookie)
        if role is None:
            if page in ("ui", "lead"):
                return 303, "Log in first.", {"location": "/login"}
            return 401, "Log in first.", {}
        if page != "ui" and role != "lead":
            return 403, _FOR_LEADS, {"content-type": "text/html; charset=utf-8"}
        return None


async def _answer(send: Send, status: int, text: str, more: dict[str, str]) -> None:
    body = text.encode()
    fields = {
        "content-type": "text/plain; charset=utf-8",
        "content-length": str(len(body)),
        **HEADERS,
        **more,
    }
    start = {
        "type": "http.response.start",
        "status": status,
        "headers": [(key.encode(), value.encode()) for key, value in fields.items()],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})
