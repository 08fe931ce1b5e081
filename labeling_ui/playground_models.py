"""The models of the playground, which live in a child process; asked over HTTP on loopback."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx

from labeling_ui.forms import Refused
from pipeline import inventory, launch
from pipeline.errors import StageError
from pipeline.inventory import Offered
from pipeline.worker import die_with_parent

_OK, _REFUSED = 200, 422
_GONE = "The process that holds the models has ended. Start the playground again."


class Models:
    """Asks a server of stages.serve; `offered` is what it can be asked about."""

    def __init__(self, offered: list[Offered], port: int, token: str) -> None:
        self.offered = offered
        self._client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"authorization": f"Bearer {token}"},
            # a large model takes minutes to load; a proxy has no business with loopback
            timeout=httpx.Timeout(5, read=None, pool=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.offered]

    def label_of(self, name: str) -> str:
        return next((one.label for one in self.offered if one.name == name), name)

    def version_of(self, name: str) -> str:
        return next((one.version for one in self.offered if one.name == name), name)

    async def ask(self, question: str, **given: Any) -> dict[str, Any]:
        """The answer to a question of stages.questions.

        Raises:
            Refused: it cannot be answered; why, in words for people.
        """
        with _told():
            response = await self._client.post(f"/{question}", json=given)
        return _answer(response.status_code, response.content)

    async def stream(self, question: str, **given: Any) -> AsyncGenerator[dict[str, Any], None]:
        """The answers of a stream as they come; leaving the loop stops the model.

        Raises:
            Refused: as `ask`.
        """
        with _told():
            async with self._client.stream("POST", f"/{question}", json=given) as response:
                if response.status_code != _OK:
                    _answer(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    yield json.loads(line)

    async def close(self) -> None:
        await self._client.aclose()


def start(offered: list[Offered]) -> tuple[subprocess.Popen[str], str]:
    """Start the child; it needs some seconds until `connect`."""
    token = secrets.token_urlsafe(32)
    child = subprocess.Popen(
        [sys.executable, "-m", "stages.serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=launch.environment(),
        preexec_fn=die_with_parent,
    )
    assert child.stdin is not None
    models = json.loads(inventory.to_json(offered))
    # through a pipe: arguments and environments can be seen by others
    child.stdin.write(json.dumps({"token": token, "models": models}) + "\n")
    child.stdin.flush()
    return child, token


def connect(child: subprocess.Popen[str], offered: list[Offered], token: str) -> Models:
    """The models, once the child is ready.

    Raises:
        StageError: it ended before.
    """
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise StageError(
            f"the process that holds the models ended with code {child.wait()}",
            "See above for why.",
        )
    return Models(offered, json.loads(line)["port"], token)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError:
        raise Refused(_GONE) from None


def _answer(status: int, body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(body)
    if status == _OK:
        return found
    said = str(found.get("error", "no reason"))
    raise Refused(said if status == _REFUSED else f"The models cannot answer: {said}")
