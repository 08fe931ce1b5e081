"""The run directory: creating and opening it, its configuration, its lock, its history.

RUN/run.json      written last when a run is created: without it the directory is no run
RUN/config.yaml   the resolved settings; the comment behind a value says where it came from
RUN/events.jsonl  append-only history
RUN/lock          held by the one process that may write
RUN/STEP/FINGERPRINT/   the work and the result of a step (see artifacts.py)
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import yaml

import pipeline
from pipeline import artifacts, launch, manifest, sources
from pipeline.config import read_values, validate
from pipeline.errors import ConfigError, LockedError
from pipeline.files import HashCache, read_json, write_atomic
from pipeline.processes import stat
from pipeline.settings import Settings

SCHEMA = 1
RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
EVENTS_FILE = "events.jsonl"
LOCK_FILE = "lock"
OWNER_FILE = "lock.json"
PROGRESS_FILE = "rank-progress.json"
REPORT_FILE = "report.html"
_HASHES_FILE = "hashes.json"
_JOBS_FOLDER = ".jobs"
# a gain below this is not worth the coarser arithmetic, and may be noise of the probe
_WORTH_BF16 = 1.2
# what a creation that was killed may leave behind
_CREATION = {LOCK_FILE, OWNER_FILE, CONFIG_FILE, f"{CONFIG_FILE}.tmp", EVENTS_FILE}
_CREATION |= {f"{RUN_FILE}.tmp", f"{OWNER_FILE}.tmp"}
_NO_WRAP = 10**9

Origins = dict[str, str]


@dataclass(frozen=True)
class Run:
    """A run directory and its settings. The directory of a planned run may not exist yet."""

    path: Path
    settings: Settings
    origins: Origins

    def step_dir(self, step: str, fingerprint: str) -> Path:
        return self.path / step / fingerprint[:12]

    def latest(self, step: str) -> Path | None:
        """The directory that `<step>/latest` names, if it holds a complete result."""
        try:
            name = (self.path / step / artifacts.LATEST).read_text(encoding="utf-8").strip()
        except OSError:
            return None
        work = self.path / step / name
        return work if name and (work / manifest.NAME).is_file() else None

    def hashes(self) -> HashCache:
        return HashCache(self.path / _HASHES_FILE)

    @property
    def jobs(self) -> Path:
        return self.path / _JOBS_FOLDER

    def record(self, event: str, **facts: Any) -> None:
        """Append to the history."""
        row = {"time": now(), "event": event, **{k: v for k, v in facts.items() if v is not None}}
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with (self.path / EVENTS_FILE).open("a", encoding="utf-8") as file:
            file.write(line)

    def events(self) -> list[dict[str, Any]]:
        """The history; a line torn by a kill is left out."""
        try:
            # bytes: a kill may tear a line inside a character
            lines = (self.path / EVENTS_FILE).read_bytes().split(b"\n")
        except OSError:
            return []
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict)]

    def rank_progress(self, step: str) -> tuple[int, int] | None:
        """(have, need) rankings of a rank step, as the label store counted them last."""
        counts = self._counts(step)
        return (int(counts.get("have", 0)), int(counts.get("need", 0))) if counts else None

    def labels(self, step: str) -> dict[str, int] | None:
        """What the label store holds for a rank step; None where nobody has counted."""
        found = self._counts(step).get("labels")
        return found if isinstance(found, dict) else None

    def _counts(self, step: str) -> dict[str, Any]:
        row = read_json(self.path / PROGRESS_FILE)
        counts = row.get(step) if isinstance(row, dict) else None
        return counts if isinstance(counts, dict) else {}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# ---- from what the user typed to a run -------------------------------------------------------


def find_run(target: Path) -> Path | None:
    """The run directory that `target` names: itself, or by its config.yaml; None for a config."""
    if target.is_dir():
        if not (target / RUN_FILE).is_file():
            raise ConfigError(
                f"{target}: not a run directory (it has no {RUN_FILE})",
                "Give a configuration such as configs/demo.yaml, or a directory made by prefline.",
            )
        return target
    if target.name == CONFIG_FILE and (target.parent / RUN_FILE).is_file():
        return target.parent
    if not target.exists():
        raise ConfigError(
            f"{target}: no such file or directory",
            "Give a configuration such as configs/demo.yaml, or a run directory such as runs/demo.",
        )
    return None


def open_run(target: Path, overrides: Iterable[str] = ()) -> Run:
    """An existing run, to look at.

    Raises:
        ConfigError: there is no run.  ArtifactError: it was made by a newer version.
    """
    path = find_run(target)
    if path is None:
        draft = draft_run(target, overrides)
        if not (draft.path / RUN_FILE).is_file():
            raise ConfigError(
                f"{target}: this configuration has not been run yet ({draft.path} is no run)",
                f"prefline run {target}",
            )
        path = draft.path
    return _stored(path.absolute(), overrides)


def draft_run(target: Path, overrides: Iterable[str] = ()) -> Run:
    """The run that `target` and `overrides` ask for; nothing is written."""
    overrides = list(overrides)
    path = find_run(target)
    if path is not None:
        draft = _stored(path.absolute(), overrides)
        return Run(draft.path, _decided(draft.settings, draft.settings), draft.origins)
    values, places = read_values(target, overrides)
    settings = validate(Settings, values, places)
    path = Path(settings.run.dir or f"runs/{settings.run.name}").expanduser().absolute()
    before = _stored(path, ()).settings if (path / RUN_FILE).is_file() else None
    origins = {".".join(place): origin for place, origin in places.items()}
    return Run(path, _decided(settings, before), origins)


def _stored(path: Path, overrides: Iterable[str]) -> Run:
    """The run in `path`, under overrides."""
    identity = read_json(path / RUN_FILE)
    if not isinstance(identity, dict) or not isinstance(identity.get("schema"), int):
        raise ConfigError(f"{path / RUN_FILE}: not readable as the identity of a run")
    manifest.check_schema(identity["schema"], SCHEMA, path / RUN_FILE)
    config = path / CONFIG_FILE
    values, places = read_values(config, overrides)
    settings = validate(Settings, values, places)
    lines = config.read_text(encoding="utf-8").splitlines()
    origins = {}
    for place, origin in places.items():
        key, line = ".".join(place), origin.rpartition(":")[2]
        if origin.startswith(str(config)) and line.isdigit():
            comment = lines[int(line) - 1].rpartition("  # ")[2].strip()
            if comment != "default":
                origins[key] = comment
        else:
            origins[key] = origin
    return Run(path, sources.resolve_all(settings), origins)


def _decided(settings: Settings, before: Settings | None) -> Settings:
    """Settings with absolute paths, and with everything decided that is decided once per run."""
    settings = sources.resolve_all(settings)
    precision = settings.model.precision
    if precision in (None, "auto") and before is not None:
        precision = before.model.precision
    if precision is None:
        precision = "bf16" if any(able >= 8.0 for _, able in launch.gpus()) else "fp32"
    elif precision == "auto":
        # the shape of a model that is not ours is not known here; wider ones gain at least as much
        width = settings.model.hidden_size if settings.model.base is None else 1024
        faster = launch.bf16_speedup(width, settings.launch) >= _WORTH_BF16
        precision = "bf16" if faster else "fp32"
    model = settings.model.model_copy(update={"precision": precision})
    # the directory may be moved; its own name is not part of its settings
    place = settings.run.model_copy(update={"dir": None})
    return settings.model_copy(update={"model": model, "run": place})


# ---- writing -------------------------------------------------------------------------------


@contextlib.contextmanager
def writer(draft: Run) -> Iterator[tuple[Run, list[str]]]:
    """Lock the run, create it or bring its configuration up to date; the changes in words.

    Raises:
        LockedError: another living process works on it.
        ConfigError: the directory holds something else.
    """
    path = draft.path
    new = not (path / RUN_FILE).is_file()
    if new:
        _check_free(path)
    path.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        if not (path / RUN_FILE).is_file():
            _create(draft)
            yield draft, []
            return
        stored = _stored(path, ())
        changes = changed_settings(stored.settings, draft.settings)
        if changes:
            _write_config(draft)
            draft.record("settings", changes=changes)
        yield draft, changes


def changed_settings(before: Settings, after: Settings) -> list[str]:
    """`sft.lr 1e-4 -> 2e-4` for every setting that differs."""
    old, new = manifest.values(before), manifest.values(after)
    return [
        f"{key} {manifest.show(old[key])} -> {manifest.show(new[key])}"
        for key in new
        if old[key] != new[key]
    ]


def _check_free(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run.dir: {path} is a file", "Choose another run.dir.")
    held = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in held if name not in _CREATION]
    if foreign:
        raise ConfigError(
            f"run.dir: {path} exists and is not a run (it holds {foreign[0]})",
            "Choose another run.dir or run.name.",
        )


def _create(draft: Run) -> None:
    _write_config(draft)
    draft.record("created", version=pipeline.__version__)
    identity = {
        "schema": SCHEMA,
        "name": draft.settings.run.name,
        "made_by": f"{pipeline.OWNER} {pipeline.__version__}",
        "created": now(),
    }
    write_atomic(draft.path / RUN_FILE, json.dumps(identity, indent=1) + "\n")


def _write_config(draft: Run) -> None:
    write_atomic(draft.path / CONFIG_FILE, config_text(draft.settings, draft.origins))


def config_text(settings: Settings, origins: Origins) -> str:
    """The resolved settings as YAML; behind each value stands where it came from."""
    lines = ["# The resolved settings. To change one: prefline run RUN key=value"]
    open_sections: tuple[str, ...] = ()
    default = manifest.defaults()
    for key, value in manifest.values(settings).items():
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if open_sections[: depth + 1] != tuple(sections[: depth + 1]):
                lines.append(f"{'  ' * depth}{section}:")
        open_sections = tuple(sections)
        origin = origins.get(key) or ("default" if value == default[key] else "decided")
        lines.append(f"{'  ' * len(sections)}{name}: {_yaml(value)}  # {origin}")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """`value` on one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=_NO_WRAP, allow_unicode=True, sort_keys=False
    )
    text = text.removesuffix("\n").removesuffix("\n...")
    # JSON escapes what YAML would spread over several lines
    return text if "\n" not in text else json.dumps(value, ensure_ascii=False)


# ---- the lock ------------------------------------------------------------------------------


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    lock = filelock.FileLock(path / LOCK_FILE, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        owner = read_json(path / OWNER_FILE) or {}
        raise LockedError(
            f"{path} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}"
            f" since {owner.get('since', '?')}",
            "Wait for it or stop it; `prefline status` shows what it does.",
        ) from None
    try:
        row = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "started": _start_ticks(os.getpid()),
        }
        write_atomic(path / OWNER_FILE, json.dumps(row), durable=False)
        yield
    finally:
        (path / OWNER_FILE).unlink(missing_ok=True)
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a living process works on the run; looks only, takes no lock."""
    owner = read_json(path / OWNER_FILE)
    if not isinstance(owner, dict):
        return False
    if owner.get("host") != socket.gethostname():
        # a process of another machine cannot be asked; its owner file goes away when it ends
        return True
    ticks = _start_ticks(int(owner.get("pid", 0)))
    return ticks is not None and ticks == owner.get("started")


def _start_ticks(pid: int) -> str | None:
    """When a process began, which tells it from a later one with the same id; None if it is gone."""
    fields = stat(pid)
    if fields is not None:
        return fields[19]
    try:
        os.kill(pid, 0)
        return "alive" if pid else None
    except OSError:
        return None
