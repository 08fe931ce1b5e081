"""Does something at the Nth call of a function of ours, in a child process; sitecustomize.py installs it.

PREFLINE_AT_CALL: a JSON list of faults with "where" ("stages.experience:roll_out", "module:Class.method"),
"call" (N, from 1), "rank" (the others do nothing) and "do":

    signal   "number" to the rank itself, or to the leading process where "to" is "parent"
    fill     write FILLER (a path on the disk of the run) until "leave" bytes of the disk are left
    limit    files may not grow beyond "bytes" from here on
    clock    time.time and datetime are "seconds" off from here on; time.monotonic is not
"""

import datetime
import functools
import importlib.abc
import os
import resource
import shutil
import sys
import time


def install(plans: list[dict]) -> None:
    if "pipeline.worker" not in sys.orig_argv:
        return
    for plan in plans:
        if os.environ.get("RANK", "0") == str(plan["rank"]):
            module, _, path = plan["where"].partition(":")
            sys.meta_path.insert(0, _Finder(module, path.split("."), plan))


class _Finder(importlib.abc.MetaPathFinder):
    """Lets a module be loaded as usual, and wraps one of its functions before anybody can take it."""

    def __init__(self, module: str, path: list[str], plan: dict) -> None:
        self.module, self.path, self.plan = module, path, plan

    def find_spec(self, name, where, target=None):
        if name != self.module:
            return None
        # the next finder may wrap another function of it
        rest = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, where, target) for finder in rest)
        spec = next(found for found in specs if found is not None)
        load = spec.loader.exec_module

        def load_and_wrap(module):
            load(module)
            place = functools.reduce(getattr, self.path[:-1], module)
            setattr(place, self.path[-1], _counted(getattr(place, self.path[-1]), self.plan))

        spec.loader.exec_module = load_and_wrap
        return spec


def _counted(function, plan: dict):
    calls = 0

    @functools.wraps(function)
    def wrapper(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == plan["call"]:
            print(f"fault: {plan['do']} at {plan['where']}", file=sys.stderr, flush=True)
            _ACTIONS[plan["do"]](plan)
        return function(*arguments, **named)

    return wrapper


def _signal(plan: dict) -> None:
    pid = int(os.environ["PREFLINE_OWNER"]) if plan.get("to") == "parent" else os.getpid()
    os.kill(pid, plan["number"])


def _fill(plan: dict) -> None:
    with open(plan["filler"], "wb", buffering=0) as file:
        while (free := shutil.disk_usage(plan["filler"]).free - plan["leave"]) > 0:
            file.write(bytes(min(free, 2**20)))


def _limit(plan: dict) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (plan["bytes"], resource.RLIM_INFINITY))


def _clock(plan: dict) -> None:
    now, seconds, kind = time.time, plan["seconds"], datetime.datetime
    time.time = lambda: now() + seconds

    class Shifted(kind):
        @classmethod
        def now(cls, tz=None):
            return kind.now(tz) + datetime.timedelta(seconds=seconds)

    datetime.datetime = Shifted
    for module in list(sys.modules.values()):
        if getattr(module, "datetime", None) is kind:
            module.datetime = Shifted


_ACTIONS = {"signal": _signal, "fill": _fill, "limit": _limit, "clock": _clock}
