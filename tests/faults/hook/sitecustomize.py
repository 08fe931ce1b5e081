"""Kills this process at its Nth change of a file in the run directory; Python imports it at the start.

PREFLINE_FAULT: JSON with "run" (the directory), "kind" ("worker" or "parent"), "at" (N, from 1; 0: never) and
"log" (a file that gets a line: the change that did not happen, or, at a natural end, how many there were).
Changes are what Python audits: a file opened for writing, a rename, a removal, a folder made or removed. The
process dies before the change happens; one of the other kind, or with fewer changes, lives.
"""

import atexit
import json
import os
import signal
import sys

_WRITING = os.O_WRONLY | os.O_RDWR
# event -> which of its arguments are paths
_PATHS = {"os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,)}


def _kind() -> str:
    return "worker" if "pipeline.worker" in sys.orig_argv else "parent"


def _install(plan: dict) -> None:
    number = 0

    def note(text: str) -> None:
        log = os.open(plan["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, f"{text}\n".encode())
        os.close(log)

    def on_event(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            touched = (path,) if isinstance(flags, int) and flags & _WRITING else ()
        else:
            touched = tuple(arguments[i] for i in _PATHS.get(event, ()))
        paths = [os.fsdecode(p) for p in touched if isinstance(p, str | bytes | os.PathLike)]
        if not any(os.path.abspath(path).startswith(plan["run"]) for path in paths):
            return
        nonlocal number
        number += 1
        if number == plan["at"]:
            note(f"{event} {' -> '.join(os.path.relpath(path, plan['run']) for path in paths)}")
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    atexit.register(lambda: note(str(number)))


if _text := os.environ.get("PREFLINE_FAULT"):
    _plan = json.loads(_text)
    if _plan["kind"] == _kind():
        _install(_plan)
if _text := os.environ.get("PREFLINE_AT_CALL"):
    import at_call

    at_call.install(json.loads(_text))
