"""The items of a benchmark: rows of the user's file or of a hub dataset, asked as the task file says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.errors import DataError
from pipeline.records import Tally, content_id
from pipeline.sources import kind
from pipeline.tasks import Task, field_of, fill
from stages.data import rows_of

Row = dict[str, Any]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


class Item(NamedTuple):
    """One question. targets: choices, the pair (more, less), or the one right answer.

    right: for a choice, whether each target is right. shots: solved examples before it.
    """

    id: str
    group: str | None
    prompt: str
    targets: tuple[str, ...]
    right: tuple[bool, ...]
    row: Row


def read_items(task: Task, limit: int | None) -> tuple[list[Item], str, Tally]:
    """The items to be scored, the solved examples before each prompt, and what could not be used.

    With a limit, those whose hash is smallest: a part of the file that nobody chose.

    Raises:
        DataError: the data cannot be read, or does not fit the task file; it names place and key.
    """
    tally = Tally()
    items: dict[str, Item] = {}
    for where, row in _rows(task, task.split):
        if not isinstance(row, dict):
            tally.drop("not a row with columns", where)
            continue
        item = _item(task, row, where)
        if item.id in items:
            tally.merged += 1
            continue
        tally.use()
        items[item.id] = item
    if not items:
        tally.check(f"task {task.name}: {task.data}", 1.0)
    chosen = [items[id] for id in sorted(items)]
    solved = chosen
    if task.shots and task.shots_split:
        rows = _rows(task, task.shots_split)
        solved = sorted((_item(task, row, where) for where, row in rows), key=lambda item: item.id)
    shown, left = solved[: task.shots], chosen
    if task.shots and not task.shots_split:
        left = chosen[task.shots :]
    if len(shown) < task.shots or not left:
        raise DataError(
            f"task {task.name}: {len(chosen)} items are too few for {task.shots} examples",
            "Lower shots in the task file.",
        )
    examples = "".join(_solved(task, item) for item in shown)
    return left[:limit], examples, tally


def question(task: Task, item: Item, shots: str) -> str:
    """All that a model reads before it answers."""
    return task.examples + shots + item.prompt


def final_answer(text: str, task: Task) -> str:
    """The answer that counts: behind the last mark, or the last number where there is no mark.

    A number is written one way: no thousands commas, no trailing zeros; other text in lower case.
    """
    for stop in task.stop:
        text = text.split(stop)[0]
    if task.final is not None and task.final in text:
        text = text.rsplit(task.final, 1)[1].strip().split("\n")[0]
        numbers = _NUMBER.findall(text)
        return _plain_number(numbers[0]) if numbers else _plain_text(text)
    numbers = _NUMBER.findall(text)
    if task.final is not None:
        return _plain_number(numbers[-1]) if numbers else ""
    only = _NUMBER.fullmatch(text.strip().strip("$.").strip())
    return _plain_number(only[0]) if only else _plain_text(text)


def _plain_number(text: str) -> str:
    text = text.replace(",", "")
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    whole, _, part = digits.partition(".")
    part = part.rstrip("0")
    whole = whole.lstrip("0") or "0"
    zero = whole == "0" and not part
    return f"{'' if zero else sign}{whole}{'.' if part else ''}{part}"


def _plain_text(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .!\"'")


def _solved(task: Task, item: Item) -> str:
    answer = item.targets[0]
    if not task.chain_of_thought:
        answer = f"{task.final} {final_answer(answer, task)}" if task.final else answer
    return f"{join(item.prompt, answer)}\n\n"


def join(prompt: str, answer: str) -> str:
    """An answer behind its prompt, with a space between unless one of them brings its own."""
    return f"{prompt}{gap(prompt, answer)}"


def gap(prompt: str, answer: str) -> str:
    """`answer` as it follows `prompt`: with a space before it unless one of them has one."""
    has_own = not prompt or prompt[-1].isspace() or answer[:1].isspace()
    return answer if has_own else f" {answer}"


def _rows(task: Task, split: str | None) -> Iterator[tuple[str, Any]]:
    if kind(task.data) != "hub":
        yield from rows_of(task.data)
        return
    import datasets

    name = f"task {task.name}: {task.data}"
    try:
        found = datasets.load_dataset(task.data, task.subset, split=split, revision=task.revision)
    # errors of requests and huggingface_hub are OSErrors
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0][:200]
        raise DataError(
            f"{name}: this dataset cannot be read from the hub ({first})",
            "Offline, give data in the task file the path of a local copy.",
        ) from None
    if isinstance(found, dict):
        if len(found) > 1:
            raise DataError(f"{name}: set split to one of {', '.join(found)}")
        [found] = found.values()
    for number, row in enumerate(found, 1):
        yield f"{task.data}/{split or ''}: row {number}", row


def _item(task: Task, row: Row, where: str) -> Item:
    at = "prompt"
    try:
        prompt = fill(task.prompt, row)
        at = "group"
        group = None if task.group is None else str(field_of(row, task.group))
        right: tuple[bool, ...] = ()
        targets: tuple[str, ...]
        if task.scorer == "pair":
            at = "more, less"
            targets = (fill(task.more, row), fill(task.less, row))
        elif task.scorer == "exact":
            at = "answer"
            targets = (fill(task.answer, row),)
        else:
            at = "choices"
            targets = _choices(task, row)
            at = "answer"
            right = _right(task, row, targets)
    except DataError as error:
        raise DataError(f"task {task.name}: {at}: {where}: {error.message}", error.hint) from None
    if not all(target.strip() for target in targets):
        raise DataError(f"task {task.name}: {where}: an empty answer or choice")
    return Item(content_id(task.name, row), group, prompt, targets, right, row)


def _choices(task: Task, row: Row) -> tuple[str, ...]:
    if not isinstance(task.choices, str):
        return tuple(fill(choice, row) for choice in task.choices)
    found = field_of(row, task.choices)
    if not isinstance(found, list) or len(found) < 2:
        raise DataError(f"column {task.choices!r} is not a list of two or more choices")
    return tuple(map(str, found))


def _right(task: Task, row: Row, choices: tuple[str, ...]) -> tuple[bool, ...]:
    """For each choice whether it is right: from a number, a letter, a text or a list of 0 and 1."""
    value = field_of(row, task.answer)
    count = len(choices)
    if isinstance(value, list):
        if len(value) != count or not set(value) <= {0, 1} or not any(value):
            raise DataError(f"{value!r} does not say which of {count} choices are right")
        return tuple(map(bool, value))
    text = str(value).strip()
    place: int | None = None
    # a choice may be a number itself: then its text counts, unless the column holds numbers
    if isinstance(value, str) and text in choices:
        place = choices.index(text)
    elif text.isdigit():
        place = int(text)
    elif len(text) == 1 and text.isalpha():
        place = ord(text.upper()) - ord("A")
    if place is None or not 0 <= place < count:
        raise DataError(f"{value!r} names none of the {count} choices")
    return tuple(i == place for i in range(count))
