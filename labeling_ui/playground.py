"""The playground: talk to the models of a run side by side, and look inside of one.

    python -m labeling_ui.playground RUN|MODEL [--page chat|inspect] [--port 7861]

It listens on this machine only and has no login. This process draws; the models live in a child
(stages.serve), which ends with it.
"""

# ruff: noqa: T201 - a command: it says where it listens
from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse

from labeling_ui import guard, playground_models
from labeling_ui.hosting import LOCAL_NAMES, check_port, keep_gradio_quiet, mount, serve
from labeling_ui.playground_models import Models
from labeling_ui.store import Store, open_run_store
from pipeline import inventory
from pipeline.errors import EXIT_DONE, ToolkitError
from pipeline.workspace import Run

HOST = "127.0.0.1"
ASSETS = Path(__file__).parent / "assets"
_PAGES = {"chat": "Chat", "inspect": "Inspect"}


def create_app(models: Models, run: Run | None, first: str = "chat") -> FastAPI:
    """The whole server as an ASGI app. first: the page behind `/`."""
    # seconds to import: errors of the command line must not wait for it
    from labeling_ui import playground_chat, playground_inspect

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await models.close()

    async def start(_request: Request) -> Response:
        return RedirectResponse(f"/{first}/", 303)

    async def health(_request: Request) -> Response:
        return Response("ok\n", media_type="text/plain")

    server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    server.add_route("/", start, methods=["GET"])
    server.add_route("/healthz", health, methods=["GET"])
    prompts = inventory.example_prompts(run) if run else []
    css = (ASSETS / "playground.css").read_text(encoding="utf-8")
    head = f'<meta name="viewport" content="width=device-width"><style>{css}</style>'
    folder = run.path if run else Path(tempfile.gettempdir())
    for name, page in (
        ("chat", playground_chat.build(models, prompts, _saver(run), _nav(run, "chat"))),
        ("inspect", playground_inspect.build(models, prompts, _nav(run, "inspect"))),
    ):
        mount(server, folder, f"/{name}", page, None, head)
    server.add_middleware(guard.Guard, names=LOCAL_NAMES, role_of=lambda _: None)
    return server


def _saver(run: Run | None) -> Callable[[dict[str, Any], dict[str, Any]], bool] | None:
    """Saves a comparison in the run's label store, which is opened, and made, when there is one."""
    if run is None:
        return None
    from labeling_ui import playground_talk

    opened: list[Store] = []

    def save(row: dict[str, Any], sampling: dict[str, Any]) -> bool:
        if not opened:
            opened.append(open_run_store(run.path))
        return playground_talk.save(opened[0], row, sampling)

    return save


def _nav(run: Run | None, here: str) -> str:
    """Our own words, and the run's name as text."""
    from labeling_ui.playground_parts import shown

    links = "".join(
        f'<a href="/{name}/"{" aria-current=page" if name == here else ""}>{word}</a>'
        for name, word in _PAGES.items()
    )
    name = shown(run.settings.run.name) if run else ""
    return (
        f'<header class="pg-top"><h1>prefline <span>playground</span></h1><span>{name}</span>'
        f'<nav aria-label="Pages">{links}</nav></header>'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prefline chat", description="The playground.")
    parser.add_argument("target", help="run directory, model folder, GGUF file or hub id")
    parser.add_argument("--page", choices=list(_PAGES), default="chat")
    parser.add_argument("--port", type=int, default=7861)
    given = parser.parse_args(arguments)
    try:
        return _serve(given)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _serve(given: argparse.Namespace) -> int:
    offered, run = inventory.of(given.target)
    check_port(HOST, given.port)
    # the child loads its libraries while this process loads its own
    child, token = playground_models.start(offered)
    try:
        keep_gradio_quiet()
        # this process loads it while the child loads its own
        import gradio  # noqa: F401

        models = playground_models.connect(child, offered, token)
        app = create_app(models, run, given.page)
        print(f"Playground: http://{HOST}:{given.port}/{given.page}/", file=sys.stderr)
        # browsers keep a stream open, for which an end would wait
        serve(app, HOST, given.port, grace_seconds=1)
    finally:
        child.kill()
        child.wait()
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
