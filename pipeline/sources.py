"""What the user gives: `demo:NAME`, a local path, or the id of a model or dataset on a hub.

A local path begins with `/`, `.` or `~`, or has the suffix of a data or model file, or exists.
Everything else that looks like `name` or `owner/name` is a hub id.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from pathlib import Path
from typing import Literal

from pipeline import demo_world, tasks
from pipeline.errors import ConfigError, DataError
from pipeline.files import HashCache
from pipeline.records import ROW_SUFFIXES, canonical_json
from pipeline.settings import Settings

Kind = Literal["demo", "path", "hub"]

DEMO_NAMES = ("stories", "demonstrations", "prompts")
# every setting that holds sources; tests/unit/test_sources.py compares with the settings tree
KEYS = (
    "model.base",
    "tokenizer.data",
    "pretrain.data",
    "sft.data",
    "sample.prompts",
    "rank.data",
    "ppo.prompts",
    "ppo.reward_models",
    "ppo.gold_model",
    "ppo.ptx_data",
    "grpo.prompts",
    "grpo.reward_models",
    "rloo.prompts",
    "rloo.reward_models",
    "evaluate.prompts",
    "evaluate.text",
    "evaluate.tasks",
    "evaluate.refusal_prompts",
    "evaluate.refusal_annotations",
    "evaluate.toxicity_prompts",
)
_TASK_SUFFIXES = (".yaml", ".yml")
_FILE_SUFFIXES = (*ROW_SUFFIXES, ".gguf", ".safetensors", ".arrow", ".gz", ".zst", *_TASK_SUFFIXES)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def kind(source: str) -> Kind:
    """What sort of thing `source` names."""
    if source.startswith("demo:"):
        return "demo"
    if source.startswith(("/", ".", "~")) or source.lower().endswith(_FILE_SUFFIXES):
        return "path"
    if not _HUB_ID.fullmatch(source) or Path(source).exists():
        return "path"
    return "hub"


def resolve(source: str) -> str:
    """`source` with a local path made absolute, so that a run means the same from any folder."""
    if kind(source) != "path":
        return source
    return os.path.abspath(os.path.expanduser(source))


def check(source: str, key: str) -> None:
    """Refuse a source that cannot be read.

    Raises:
        ConfigError: empty, or an unknown `demo:` name.
        DataError: a local path that does not exist or cannot be read.
    """
    if not source.strip():
        raise ConfigError(f"{key}: is empty", "Give a path, a hub id or demo:NAME.")
    what = kind(source)
    if what == "demo":
        name = source.removeprefix("demo:")
        if name not in DEMO_NAMES:
            close = difflib.get_close_matches(name, DEMO_NAMES, n=1)
            meant = f"; did you mean 'demo:{close[0]}'?" if close else ""
            known = ", ".join(f"demo:{known}" for known in DEMO_NAMES)
            raise ConfigError(f"{key}: unknown {source!r}{meant}", f"Known are {known}.")
    elif what == "path":
        path = Path(source).expanduser()
        if not path.exists():
            hint = f"Correct {key}, or put the file there. A hub id has the form owner/name."
            raise DataError(f"{key}: {source} does not exist", hint)
        if not os.access(path, os.R_OK):
            raise DataError(f"{key}: {source} cannot be read (permission denied)")
        if key == "evaluate.tasks":
            tasks.check_task(path)


def digest(source: str, cache: HashCache) -> str:
    """`sha256:...` of what `source` holds now; a hub id stands for itself.

    Raises:
        DataError: the path does not exist.
    """
    what = kind(source)
    if what == "hub":
        return _sha256("hub", source)
    if what == "demo":
        return _sha256("demo", source, demo_world.VERSION)
    path = Path(source).expanduser()
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        rows = [[file.relative_to(path).as_posix(), cache.sha256(file)] for file in files]
        return _sha256("folder", rows)
    if path.suffix.lower() in _TASK_SUFFIXES and path.is_file():
        # a task file stands for the items that it names, too
        return _sha256("task", cache.sha256(path), digest(tasks.read_task(path).data, cache))
    try:
        # the suffix decides how a file is read, the rest of its name does not matter
        return _sha256("file", path.suffix.lower(), cache.sha256(path))
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from None


def digest_all(sources: tuple[str, ...], cache: HashCache) -> str:
    """One digest for a role that is fed by several sources; their order counts."""
    return _sha256("sources", [digest(source, cache) for source in sources])


def given(settings: Settings) -> list[tuple[str, str]]:
    """(key, source) of every source in the settings."""
    found = []
    for key in KEYS:
        section, name = key.split(".")
        value = getattr(getattr(settings, section), name)
        for source in (value,) if isinstance(value, str) else value or ():
            found.append((key, source))
    return found


def resolve_all(settings: Settings) -> Settings:
    """The settings with every local path made absolute."""
    for key in KEYS:
        section_name, name = key.split(".")
        section = getattr(settings, section_name)
        value = getattr(section, name)
        if value is None:
            continue
        absolute = resolve(value) if isinstance(value, str) else tuple(map(resolve, value))
        section = section.model_copy(update={name: absolute})
        settings = settings.model_copy(update={section_name: section})
    return settings


def check_all(settings: Settings) -> None:
    """Refuse settings that name something which is not there, all problems at once."""
    problems: list[DataError | ConfigError] = []
    for key, source in given(settings):
        try:
            check(source, key)
        except (DataError, ConfigError) as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = "\n".join(f"  {problem.message}" for problem in problems)
        raise DataError(f"{len(problems)} sources cannot be used:\n{lines}", problems[0].hint)


def _sha256(*parts: object) -> str:
    text = canonical_json(list(parts))
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
