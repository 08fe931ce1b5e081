"""An OpenAI-compatible judge on loopback that decides by a rule and misbehaves on demand.

It reads answers A and B out of the default template and prefers the one with more different words. What
stands in the request changes its manners, the first time a question is asked or always:

    BUSY 429 with Retry-After: 0, once · BROKEN 500, once · LATE no answer in time, once
    GARBAGE no verdict, always · FIRST always A · REFUSE 400, always
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Decide = Callable[[str, str, str], str]
_PARTS = re.compile(
    r"----- the request -----\n(.*)\n----- answer A -----\n(.*)\n----- answer B -----\n(.*)\n----- end",
    re.DOTALL,
)


def more_words(_prompt: str, first: str, second: str) -> str:
    one, other = len(set(first.split())), len(set(second.split()))
    return "tie" if one == other else "A" if one > other else "B"


class Judge(ThreadingHTTPServer):
    """questions: how often each was asked. key: what a request must carry, if anything."""

    daemon_threads = True

    def __init__(self, decide: Decide, key: str | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.decide, self.key = decide, key
        self.questions: Counter[str] = Counter()
        self.bodies: list[dict[str, object]] = []
        self.let_go = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Judge
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        key = self.headers.get("authorization", "").removeprefix("Bearer ")
        if self.path != "/v1/chat/completions":
            return self._send(404, {"error": "no such path"})
        if self.server.key and key != self.server.key:
            return self._send(401, {"error": f"wrong key {key}"})
        text = body["messages"][-1]["content"]
        self.server.bodies.append(body)
        self.server.questions[text] += 1
        is_first = self.server.questions[text] == 1
        found = _PARTS.search(text)
        assert found, text
        prompt, first, second = found.groups()
        if "BUSY" in prompt and is_first:
            return self._send(429, {"error": "slow down"}, {"Retry-After": "0"})
        if "BROKEN" in prompt and is_first:
            return self._send(500, {"error": "oh"})
        if "REFUSE" in prompt:
            return self._send(400, {"error": "content policy"})
        if "LATE" in prompt and is_first:
            self.server.let_go.wait(20)
        said = "A" if "FIRST" in prompt else self.server.decide(prompt, first, second)
        answer = "I like both." if "GARBAGE" in prompt else f"Let me think.\n\n**{said}**"
        usage = {"prompt_tokens": 100, "completion_tokens": 7}
        message = {"role": "assistant", "content": answer}
        self._send(200, {"choices": [{"message": message}], "usage": usage})
        return None

    def _send(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def judge_server(decide: Decide = more_words, key: str | None = None) -> Iterator[Judge]:
    server = Judge(decide, key)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()
