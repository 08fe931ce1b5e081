"""Models behind HTTP on loopback, for the playground: a child process that dies with its parent.

    python -m stages.serve          started by labeling_ui.playground, not by people

The parent writes one line of JSON to its stdin: {"token": ..., "models": [...]} (pipeline.inventory);
the child answers with one line on stdout, {"port": ...}, and serves until stdin is closed. POST /NAME
with a JSON object answers a question of `stages.questions`; a stream is one JSON object a line. Every
request needs the token. What goes wrong for a reason that people can mend is status 422, with a message.
"""

from __future__ import annotations

import hmac
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers.utils import logging as hf_logging

from pipeline import worker
from pipeline.errors import ToolkitError
from pipeline.inventory import Offered, from_rows
from stages.loaded import Models
from stages.questions import QUESTIONS, STREAMS

_MAX_BODY_BYTES = 2**20
_IDLE_SECONDS = 60
_REFUSED = 422


class Server(ThreadingHTTPServer):
    """Serves the models on a free port of 127.0.0.1 to whoever knows the token."""

    daemon_threads = True

    def __init__(self, offered: list[Offered], token: str, limit_bytes: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = Models(offered, limit_bytes)
        self.token = token


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _IDLE_SECONDS

    def do_POST(self) -> None:
        if not self._knows_token():
            self._send(401, {"error": "a token is needed"})
            return
        name = self.path.removeprefix("/")
        try:
            given = self._given()
            if name in STREAMS:
                self._stream(STREAMS[name](self.server.models, **given))
            elif name in QUESTIONS:
                self._send(200, QUESTIONS[name](self.server.models, **given))
            else:
                self._send(404, {"error": f"there is no question {name!r}"})
        except ToolkitError as error:
            self._send(_REFUSED, {"error": str(error)})
        except (ConnectionError, TimeoutError):
            # nobody waits any more: they pressed stop, or closed the page
            self.close_connection = True
        except Exception as error:  # noqa: BLE001 - the last place where anything can be told
            traceback.print_exc()
            self._send(500, {"error": f"{type(error).__name__}: {error}"})

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: what people type is not for a log."""

    def _knows_token(self) -> bool:
        given = self.headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(given.encode(), self.server.token.encode())

    def _given(self) -> dict[str, Any]:
        length = int(self.headers.get("content-length") or 0)
        if length > _MAX_BODY_BYTES:
            raise ToolkitError(f"a question may have {_MAX_BODY_BYTES} bytes")
        found: dict[str, Any] = json.loads(self.rfile.read(length) or b"{}")
        return found

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = _line(answer)
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, answers: Iterator[dict[str, Any]]) -> None:
        # the first one before the header: an error can still be told by its status
        first = next(answers, {})
        self.send_response(200)
        self.send_header("content-type", "application/x-ndjson")
        self.end_headers()
        self.wfile.write(_line(first))
        for answer in answers:
            self.wfile.write(_line(answer))


def _line(answer: dict[str, Any]) -> bytes:
    return (json.dumps(_finite(answer)) + "\n").encode()


def _finite(value: Any) -> Any:
    """JSON has no infinity: where a model is broken, its numbers are nothing."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    worker.die_with_parent()
    # a Ctrl-C of the terminal is the parent's to act on
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked = json.loads(sys.stdin.readline())
    hf_logging.disable_progress_bar()
    server = Server(from_rows(asked["models"]), asked["token"])
    print(json.dumps({"port": server.server_port}), flush=True)  # noqa: T201 - the parent reads it
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # also where the kernel cannot tell: a parent that is gone closes the pipe
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
