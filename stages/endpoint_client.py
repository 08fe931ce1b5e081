"""Questions to an OpenAI-compatible server: repeated where that may help, never asked twice.

Answers go to a file as they come, under a hash of all that was asked, so that a step that is killed
and resumed asks for the rest only. The key is read from the environment when it is needed; it is in no
file, no message and no log.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx

from pipeline import worker
from pipeline.errors import ConfigError, StageError
from pipeline.records import canonical_json, content_id
from pipeline.settings.judges import EndpointSettings

Row = dict[str, Any]
PAUSE_SECONDS, _LONGEST_PAUSE = 1.0, 60.0
_SHOWN_CHARACTERS = 200
# the server could not now, but may be able to later
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
# the server will not, for this question: too long, or refused by a filter
_NOT_THIS_ONE = (400, 413, 422)
_ALL_REFUSED = 5


class Endpoint:
    """A server, as evaluate.endpoint names it; every failure is an error that names the address.

    Raises:
        ConfigError: the environment variable that should hold the key is not set.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.url = f"{settings.url}/chat/completions"
        self._key = _key(settings.key_variable)
        self._leave = threading.Event()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # a redirect would carry the key to another place
        self._http = httpx.Client(
            headers=headers, timeout=settings.timeout_seconds, follow_redirects=False
        )

    def request(self, text: str) -> Row:
        """The body of a question."""
        body: Row = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self.settings.max_tokens,
            "temperature": 0,
            **self.settings.extra,
        }
        return {name: value for name, value in body.items() if value is not None}

    def id_of(self, text: str) -> str:
        return content_id("endpoint", self.request(text))

    def ask_all(
        self, texts: Sequence[str], kept: Path, progress: Callable[[int, int], None]
    ) -> dict[str, Row]:
        """A row for each question, by `id_of`: {id, answer, ...}, or {id, refused: why}.

        Ends early, with what there is, when a signal asks this process to stop.

        Args:
            kept: file that gets every answer as it comes. What it holds is not asked for again, nor
                what the files of other processes beside it hold (`endpoint-0-of-2.jsonl`).

        Raises:
            StageError: the server cannot be used, or does not answer after all attempts.
        """
        wanted = {self.id_of(text): text for text in texts}
        beside = sorted(kept.parent.glob(f"{kept.stem.partition('-')[0]}*.jsonl"))
        before = {key: row for file in beside for key, row in kept_answers(file).items()}
        found = {key: row for key, row in before.items() if key in wanted}
        missing = [key for key in wanted if key not in found]
        with (
            kept.open("a", encoding="utf-8") as file,
            ThreadPoolExecutor(self.settings.requests_at_once) as pool,
        ):
            # a kill may have torn the last line
            if file.tell():
                file.write("\n")
            asked = [pool.submit(self._ask, key, wanted[key]) for key in missing]
            try:
                for done in as_completed(asked):
                    row = done.result()
                    found[row["id"]] = row
                    if "answer" in row:
                        file.write(canonical_json(row) + "\n")
                        file.flush()
                    self._check_refusals(found, len(wanted))
                    progress(len(found), len(wanted))
                    if worker.stop_requested():
                        break
            finally:
                self._leave.set()
                pool.shutdown(cancel_futures=True)
        return found

    def _ask(self, key: str, text: str) -> Row:
        """The answer to one question, after as many attempts as are allowed."""
        problem = ""
        for attempt in range(self.settings.attempts):
            pause = PAUSE_SECONDS * 2**attempt
            try:
                reply = self._http.post(self.url, json=self.request(text))
            except httpx.TimeoutException:
                problem = f"no answer within {self.settings.timeout_seconds:g} s"
            except httpx.TransportError as error:
                problem = self._safe(f"{type(error).__name__}: {error}")
            else:
                shown = f"HTTP {reply.status_code}: {self._safe(reply.text)}"
                if reply.status_code in _NOT_THIS_ONE:
                    return {"id": key, "refused": shown}
                if reply.status_code == 200:
                    row = _read(key, reply)
                    if row is not None:
                        return row
                    problem = f"no chat completion came back but {self._safe(reply.text)}"
                elif reply.status_code in _AGAIN:
                    problem, pause = shown, _retry_after(reply, pause)
                else:
                    raise StageError(f"{self.url}: {shown}", self._hint(reply.status_code))
            last = attempt + 1 == self.settings.attempts
            if not last and self._leave.wait(min(pause, _LONGEST_PAUSE)):
                break
        raise StageError(
            f"{self.url}: {problem} ({self.settings.attempts} attempts)",
            "What was answered so far is kept: prefline resume goes on from there.",
        )

    def _check_refusals(self, found: dict[str, Row], wanted: int) -> None:
        """A server that refuses everything has been asked wrongly."""
        refused = [row["refused"] for row in found.values() if "refused" in row]
        if len(refused) == len(found) >= min(_ALL_REFUSED, wanted):
            raise StageError(
                f"{self.url}: every question is refused ({refused[0]})",
                "Check evaluate.endpoint.model; evaluate.endpoint.extra changes what is sent.",
            )

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            name = self.settings.key_variable
            held = f"It was sent the key in ${name}." if name else "No key was sent:"
            return f"{held} evaluate.endpoint.key_variable names the variable that holds it."
        return "Check evaluate.endpoint.url: it is the part before /chat/completions."

    def _safe(self, text: str) -> str:
        """The beginning of what a server said, on one line; servers may repeat the key."""
        if self._key:
            text = text.replace(self._key, "(the key)")
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return repr(line[:_SHOWN_CHARACTERS])


def kept_answers(file: Path) -> dict[str, Row]:
    """The answers in a file of `ask_all`, by id; a line that a kill has torn is left out."""
    rows = {}
    for line in file.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows[row["id"]] = row
    return rows


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"evaluate.endpoint.key_variable: the environment has no {variable}",
            f"export {variable}=... before the command.",
        )
    return key


def _read(key: str, reply: httpx.Response) -> Row | None:
    """What the first choice says, and the tokens that the server counted; None: no chat completion."""
    try:
        said = reply.json()
        answer = said["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    usage = said.get("usage") or {}
    counted = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    tokens = {name: n for name, n in counted.items() if isinstance(n, int)}
    # a model that thinks may give nothing else
    return {"id": key, "answer": answer if isinstance(answer, str) else "", **tokens}


def _retry_after(reply: httpx.Response, otherwise: float) -> float:
    """Seconds that the server asks for; it may also give a date, which is not looked at."""
    try:
        return max(0.0, float(reply.headers["retry-after"]))
    except (KeyError, ValueError):
        return otherwise
