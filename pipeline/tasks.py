"""A benchmark as data: a file of items and some lines of YAML that say how to ask and how to score.

Three scorers (docs/evaluation.md): choice by likelihood, pair by likelihood, exact match of a written answer.
`{column}` in a template is a column of the row, `{a.b}` a field inside one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config import Strict, read_yaml, validate
from pipeline.errors import ConfigError, DataError
from pipeline.records import canonical_json

_SLOT = re.compile(r"\{([\w.-]+)\}")
_NEEDED = {
    "choice": ("prompt", "choices", "answer"),
    "pair": ("more", "less"),
    "exact": ("prompt", "answer"),
}
_ONLY = {
    "choices": "choice",
    "normalise": "choice",
    "bias": "choice",
    "more": "pair",
    "less": "pair",
    "tokens": "pair",
    "final": "exact",
    "chain_of_thought": "exact",
    "shots": "exact",
    "shots_split": "exact",
    "max_response_tokens": "exact",
    "stop": "exact",
}


class Task(Strict):
    """One benchmark: where its items are, how a model is asked, how its answer is scored."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name in metrics and report."""
    scorer: Literal["choice", "pair", "exact"]
    """choice: which continuation is likelier. pair: which of two sentences. exact: the written answer."""
    data: str
    """A local file or folder (relative to this file), or the id of a dataset on the hub."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str | None = None
    """Split of a hub dataset; null needs a dataset with one split."""
    revision: str | None = None
    """Commit or tag of a hub dataset."""
    prompt: str = ""
    """What stands before the answer; a template."""
    examples: str = ""
    """Text before every prompt, as it stands."""
    chat: bool = False
    """Ask in the model's chat template, as one user turn; false asks with plain text."""
    choices: tuple[str, ...] | str = ()
    """Templates of the choices, or the column that holds a list of them."""
    answer: str = ""
    """choice: the column with the right choice (number from 0, letter, its text, or a list of 0 and 1).
    exact: a template of the whole answer."""
    normalise: Literal["none", "tokens", "bytes"] = "none"
    """What decides a choice: the summed logprob, or that per token or per UTF-8 byte of the choice."""
    bias: Literal["bbq"] | None = None
    """Also the bias scores of BBQ (arXiv 2110.08193), from the columns of its files."""
    group: str | None = None
    """Column by whose values the figures are also given."""
    more: str = ""
    """The sentence that says more of a stereotype; a template."""
    less: str = ""
    """The sentence that says less of it; a template."""
    tokens: Literal["all", "shared"] = "all"
    """pair: sum over all tokens of a sentence, or over those that both sentences have."""
    final: str | None = None
    """exact: what stands before the final answer, such as ####; null takes the whole answer."""
    chain_of_thought: bool = True
    """exact: the examples show the whole answer; false shows the final answer only."""
    shots: int = Field(0, ge=0)
    """exact: solved examples before the question, never scored themselves."""
    shots_split: str | None = None
    """exact: the split that the examples come from; null takes them out of the items."""
    max_response_tokens: int = Field(256, ge=1)
    """exact: the answer is cut at this many tokens."""
    stop: tuple[str, ...] = ()
    """exact: the answer ends before the first of these texts."""

    @model_validator(mode="after")
    def _fits_its_scorer(self) -> Task:
        for name in _NEEDED[self.scorer]:
            if not getattr(self, name):
                raise ValueError(f"scorer: {self.scorer} needs {name}")
        for name, scorer in _ONLY.items():
            if name in self.model_fields_set and scorer != self.scorer:
                raise ValueError(
                    f"{name} belongs to scorer: {scorer}, and this one is {self.scorer}"
                )
        if self.scorer == "pair" and (self.prompt or self.examples or self.chat):
            raise ValueError("scorer: pair scores whole sentences: it has no prompt")
        return self


def read_task(path: Path) -> Task:
    """The task in a YAML file, its local data made absolute.

    Raises:
        ConfigError: every problem with its key and line.
    """
    from pipeline.sources import kind

    values, places = read_yaml(path)
    try:
        task = validate(Task, values, places)
    except ConfigError as error:
        raise ConfigError(f"task file {path}: {error.message}", error.hint) from None
    # what the user means is beside the task file, wherever the command is started
    beside = path.expanduser().absolute().parent / os.path.expanduser(task.data)
    if kind(task.data) == "path" or beside.exists():
        task = task.model_copy(update={"data": os.path.abspath(beside)})
    return task


def check_task(path: Path) -> None:
    """Refuse a task file that cannot be used, before any step runs.

    Raises:
        ConfigError: the file is wrong.
        DataError: its data is not there.
    """
    task = read_task(path)
    if os.path.isabs(task.data) and not Path(task.data).exists():
        _, places = read_yaml(path)
        where = places.get(("data",), str(path))
        raise DataError(
            f"{where}: data: {task.data} does not exist", "Correct data in the task file."
        )


def field_of(row: dict[str, Any], column: str) -> Any:
    """The value of `column` of a row; `a.b` is the field b inside column a.

    Raises:
        DataError: there is no such column; the message names those that there are.
    """
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            known = ", ".join(sorted(map(str, row)))
            raise DataError(f"no column {column!r}; the row has {known}")
        value = value[part]
    return value


def fill(template: str, row: dict[str, Any]) -> str:
    """The template with the row's columns in it; a list or an object is written as JSON.

    Raises:
        DataError: a column that the row does not have.
    """

    def text(slot: re.Match[str]) -> str:
        value = field_of(row, slot[1])
        return canonical_json(value) if isinstance(value, list | dict) else str(value)

    return _SLOT.sub(text, template)
