"""Strict settings from one YAML file and `key=value` overrides; all problems are reported at once.

No includes, no interpolation, no class paths. Every problem names its key, where it came from
(`file:line` or the command line) and, where a name looks mistyped, the one that was probably meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigError

_MAX_YAML_BYTES = 1_000_000


class Strict(BaseModel):
    """A frozen settings section: unknown keys are errors, the docstring under a field is its help."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def unhashed(default: Any, **constraints: Any) -> Any:
    """A field that cannot change numbers (logging, saving, devices): recorded, not fingerprinted."""
    return Field(default, json_schema_extra={"hashed": False}, **constraints)


SettingsT = TypeVar("SettingsT", bound=Strict)
Sources = dict[tuple[str, ...], str]


def load_settings(
    model: type[SettingsT], path: Path | None, overrides: Iterable[str] = ()
) -> SettingsT:
    """Read `path`, apply `key=value` overrides and validate.

    Raises:
        ConfigError: every problem at once, each with its key, source and suggestion.
    """
    values, sources = read_values(path, overrides)
    return validate(model, values, sources)


def read_values(path: Path | None, overrides: Iterable[str] = ()) -> tuple[dict[str, Any], Sources]:
    """The plain values of `path` under `overrides`, and where each comes from; not validated."""
    values: dict[str, Any] = {}
    sources: Sources = {}
    if path is not None:
        values, sources = read_yaml(path)
    for override in overrides:
        _apply_override(override, values, sources)
    return values, sources


def validate(
    model: type[SettingsT], values: Mapping[str, Any], sources: Sources | None = None
) -> SettingsT:
    """Build `model` from plain values or raise one ConfigError that lists every problem."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_describe(problem, model, sources or {}) for problem in error.errors()]
        count = f"{len(lines)} problem{'s' if len(lines) != 1 else ''}"
        text = "\n".join(f"  {line}" for line in dict.fromkeys(lines))
        raise ConfigError(f"{count} in the configuration:\n{text}") from None


def read_yaml(path: Path) -> tuple[dict[str, Any], Sources]:
    """The mapping in `path` and, for each key path, its `file:line`.

    Raises:
        ConfigError: unreadable, empty, not a mapping, a duplicate key, a tag or an alias.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration ({error.strerror})") from None
    if len(raw) > _MAX_YAML_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes is too large for a configuration")
    try:
        node = yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    # an alias can expand a small file without bound, and hides where a value comes from
    for event in yaml.parse(raw, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise ConfigError(f"{path}:{line}: aliases are not allowed; write the value out")
    if node is None:
        raise ConfigError(f"{path}: the configuration is empty", "Start from configs/demo.yaml.")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: expected a mapping of settings such as 'ppo:' at the top level")
    sources: Sources = {}
    values = _plain(node, path, (), sources)
    return values, sources


def _plain(node: yaml.Node, path: Path, at: tuple[str, ...], sources: Sources) -> Any:
    """A YAML node as plain values; notes the line of each key, refuses tags and repeats."""
    line = node.start_mark.line + 1
    # an explicit tag differs from the one that the plain text resolves to
    if isinstance(node, yaml.ScalarNode):
        implicit = (node.style is None, node.style is not None)
        loader: Any = yaml.SafeLoader("")
        if node.tag != loader.resolve(yaml.ScalarNode, node.value, implicit):
            raise ConfigError(f"{path}:{line}: tags such as {node.tag!r} are not allowed")
        return loader.construct_object(node)
    if isinstance(node, yaml.SequenceNode):
        if node.tag != "tag:yaml.org,2002:seq":
            raise ConfigError(f"{path}:{line}: tags such as {node.tag!r} are not allowed")
        return [_plain(item, path, (*at, str(i)), sources) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    if node.tag != "tag:yaml.org,2002:map":
        raise ConfigError(f"{path}:{line}: tags such as {node.tag!r} are not allowed")
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{path}:{key_line}: a key must be a word")
        key = str(key_node.value)
        if key in result:
            raise ConfigError(f"{path}:{key_line}: key {'.'.join((*at, key))!r} appears twice")
        sources[(*at, key)] = f"{path}:{key_line}"
        result[key] = _plain(value_node, path, (*at, key), sources)
    return result


def _apply_override(override: str, values: dict[str, Any], sources: Sources) -> None:
    key, equals, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise ConfigError(
            f"command line: {override!r} is not of the form key=value",
            "Example: ppo.kl_coef=0.1",
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"command line: the value of {key!r} is not valid YAML: {text!r}"
        ) from None
    section = values
    for part in parts[:-1]:
        nested = section.get(part)
        section[part] = dict(nested) if isinstance(nested, Mapping) else {}
        section = section[part]
    section[parts[-1]] = value
    sources[parts] = "command line"


def _describe(problem: Any, model: type[BaseModel], sources: Sources) -> str:
    loc = tuple(str(part) for part in problem["loc"])
    key = ".".join(loc) or "settings"
    # where it was given itself, or the section around it; or, of an unknown section, what it holds
    places = [loc[:n] for n in range(len(loc), 0, -1)]
    places += [place for place in sources if place[: len(loc)] == loc]
    where = next((sources[place] for place in places if place in sources), "default")
    if problem["type"] == "extra_forbidden":
        message = "unknown key"
        suggestion = suggest(loc, model)
        if suggestion:
            message += f"; did you mean {suggestion!r}?"
    elif problem["type"] == "missing":
        message = "is required"
    else:
        message = str(problem["msg"])
        message = message.removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        # a validator of a whole section has the section as input: too long to echo
        if not isinstance(problem["input"], Mapping | BaseModel):
            message += f", got {problem['input']!r}"
    # a rule between sections has no key or line of its own; its message names the keys
    return f"{key}: {message}  [{where}]" if loc else message


def suggest(loc: tuple[str, ...], model: type[BaseModel]) -> str | None:
    """The existing key that a mistyped key path `loc` was probably meant to be."""
    parent: type[BaseModel] | None = model
    for part in loc[:-1]:
        field = parent.model_fields.get(part) if parent else None
        parent = _as_model(field.annotation) if field else None
    if parent is None:
        return None
    close = difflib.get_close_matches(loc[-1], parent.model_fields, n=1, cutoff=0.6)
    if close:
        return ".".join((*loc[:-1], close[0]))
    everywhere = {key.rsplit(".", 1)[-1]: key for key in field_paths(model)}
    elsewhere = difflib.get_close_matches(loc[-1], everywhere, n=1, cutoff=0.8)
    return everywhere[elsewhere[0]] if elsewhere else None


def field_paths(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every leaf field of the settings tree: dotted key -> pydantic field."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        nested = _as_model(field.annotation)
        if nested is None:
            found[prefix + name] = field
        else:
            found.update(field_paths(nested, f"{prefix}{name}."))
    return found


def _as_model(annotation: Any) -> type[BaseModel] | None:
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_model else None
