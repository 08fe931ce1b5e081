"""How our pages are served: Gradio's, with all off that they do not need, over uvicorn."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request

from pipeline.errors import ConfigError

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def check_port(host: str, port: int) -> None:
    """Refuse a port that is taken before seconds go into starting."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"cannot listen on {host}:{port} ({reason})", "Try another --port."
            ) from None


def keep_gradio_quiet() -> None:
    """Before Gradio is imported: it asks and reports over the network otherwise."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"


def mount(
    server: FastAPI,
    run_dir: Path,
    path: str,
    blocks: Any,
    who: Callable[[Request], str | None] | None,
    head: str,
    css: str = "",
) -> None:
    """A Gradio page behind a login (who: the name behind a request), with all off that it does not need."""
    import gradio

    gradio.mount_gradio_app(
        server,
        blocks,
        path=path,
        auth_dependency=who,
        allowed_paths=[],
        blocked_paths=[str(run_dir.resolve())],
        max_file_size="1kb",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        ssr_mode=False,
        # system fonts: Gradio's themes would ask a font server
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=css,
        head=head,
    )


def serve(app: FastAPI, host: str, port: int, grace_seconds: int | None = None) -> None:
    """Until Ctrl-C. grace_seconds: for requests that are under way then; None waits for all."""
    import uvicorn

    # Gradio serves files that lie in the working and the temporary folder: there are none here
    empty = tempfile.mkdtemp(prefix="prefline-app-")
    os.environ["GRADIO_TEMP_DIR"] = empty
    os.chdir(empty)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=grace_seconds,
    )
