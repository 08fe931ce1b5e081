"""What the user gives as data, read as texts, demonstrations and prompts; and documents as tokens.

A source is `demo:NAME`, a file or folder (see pipeline/records.py), a folder written by
`datasets.save_to_disk`, or a dataset id on the hub. A file that does not parse is an error with its
line; a row that cannot be used is counted by reason in a `Tally`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from pipeline import demo_world
from pipeline.errors import DataError
from pipeline.formats import Unusable, clean_text, demonstrations, prompt_messages
from pipeline.records import (
    SPLITS,
    Message,
    Prompt,
    Tally,
    UnknownFile,
    hash_fraction,
    read_rows,
)
from pipeline.sources import check, kind

Conversation = list[Message]

# the demo's data is a data set like any other: it does not change with the seed of a run
_DEMO_SEED = 0
_DEMO_STORIES = 20_000
_DEMO_DEMONSTRATIONS = 2_000
_DOCUMENT_CHARACTERS = 2_000
_LONGEST_DOCUMENT = 1_000_000

# ---- rows ----------------------------------------------------------------------------------


def rows_of(source: str, every_split: bool = False) -> Iterator[tuple[str, Any]]:
    """(where, row) for each row of a source that is not `demo:`.

    every_split: also the validation and test parts of a dataset that has them, each row with its
    `split`; otherwise its train part only.
    """
    if kind(source) == "hub":
        yield from _dataset_rows(_hub_dataset(source), source, every_split)
        return
    check(source, "data")
    path = Path(source).expanduser()
    if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        import datasets

        try:
            dataset = datasets.load_from_disk(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{source}: not a readable dataset ({_first_line(error)})") from None
        yield from _dataset_rows(dataset, source, every_split)
        return
    yield from read_rows(path)


def _hub_dataset(source: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source)
    # errors of requests and huggingface_hub are OSErrors
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source}: this dataset cannot be read from the hub ({_first_line(error)})",
            "A local file must exist; a path begins with / or ./ .",
        ) from None


def _dataset_rows(dataset: Any, source: str, every_split: bool) -> Iterator[tuple[str, Any]]:
    splits = dict(dataset) if isinstance(dataset, dict) else {"train": dataset}
    if not every_split and len(splits) > 1:
        if "train" not in splits:
            names = ", ".join(splits)
            raise DataError(f"{source}: no split is called train; it has {names}")
        splits = {"train": splits["train"]}
    for name, part in splits.items():
        for number, row in enumerate(part, 1):
            if every_split and len(splits) > 1:
                row.setdefault("split", name)
            yield f"{source}/{name}: row {number}", row


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


# ---- texts ---------------------------------------------------------------------------------


def read_texts(
    sources: Iterable[str], text_field: str = "text", max_documents: int | None = None
) -> tuple[Iterator[str], Tally]:
    """The documents of the sources, one after the other, and the tally that fills as one reads.

    A plain text file of up to 2,000 characters is one document, and so is one that came in a .zip
    or a folder with others. A single longer file is cut at blank lines, or at line ends where it
    has no blank line, into documents of at least 2,000 characters; joined, they are the file again.
    """
    tally = Tally()
    return islice(_texts(sources, text_field, tally, max_documents), max_documents), tally


def _texts(
    sources: Iterable[str], text_field: str, tally: Tally, max_documents: int | None
) -> Iterator[str]:
    for source in sources:
        if source == "demo:stories":
            for story in demo_world.stories(max_documents or _DEMO_STORIES, _DEMO_SEED):
                tally.use()
                yield story
            continue
        _refuse_demo(source, "demo:stories")
        for where, row in rows_of(source):
            whole = isinstance(row, str) and _is_text_file(source)
            pieces = split_text(row) if whole else [row]
            for piece in pieces:
                try:
                    text = _text(piece, text_field)
                except Unusable as reason:
                    tally.drop(str(reason), where)
                    continue
                tally.use()
                yield text


def _text(row: Any, text_field: str) -> str:
    _refuse_unknown_file(row)
    if isinstance(row, str):
        return clean_text(row, "the document")
    if not isinstance(row, dict):
        raise Unusable("the row is neither a text nor an object")
    if text_field not in row:
        raise Unusable(f"no column {text_field!r}")
    return clean_text(row[text_field], "the document")


def split_text(text: str) -> list[str]:
    """A long text as documents of 2,000 characters or more; joined they are the text again.

    A paragraph (or line) that is as long by itself is a document of its own.
    """
    if len(text) <= _DOCUMENT_CHARACTERS:
        return [text]
    blank_line = r"\n(?:[ \t\r]*\n)+"
    boundary = blank_line if re.search(blank_line, text) else r"\n"
    ends = [match.end() for match in re.finditer(boundary, text)]
    documents, waiting = [], ""
    for start, end in pairwise([0, *ends, len(text)]):
        paragraph = text[start:end]
        if len(paragraph) >= _DOCUMENT_CHARACTERS and waiting.strip():
            documents.append(waiting)
            waiting = ""
        waiting += paragraph
        if len(waiting) >= _DOCUMENT_CHARACTERS:
            documents.append(waiting)
            waiting = ""
    if documents and not waiting.strip():
        documents[-1] += waiting
    elif waiting:
        documents.append(waiting)
    return [piece for document in documents for piece in _cut(document)]


def _cut(document: str) -> Iterator[str]:
    """A document without any line end can be a whole book: cut between words."""
    while len(document) > _LONGEST_DOCUMENT:
        at = document.rfind(" ", 1, _LONGEST_DOCUMENT)
        at = at if at > 0 else _LONGEST_DOCUMENT
        yield document[:at]
        document = document[at:]
    yield document


def is_heldout(content: str | Conversation, fraction: float) -> bool:
    """Whether a document or a demonstration is held out: by its content, not by its place.

    Of a demonstration only the prompt counts: two answers to one question stay together.
    """
    if not isinstance(content, str):
        first = next((i for i, m in enumerate(content) if m["role"] == "assistant"), None)
        return hash_fraction("heldout", content[:first]) < fraction
    return hash_fraction("heldout", content) < fraction


# ---- demonstrations ------------------------------------------------------------------------


def read_demonstrations(
    sources: Iterable[str], max_examples: int | None = None
) -> tuple[list[Conversation], Tally]:
    """Conversations that end with an assistant turn, in the order of the files."""
    tally = Tally()
    return list(islice(_demonstrations(sources, tally, max_examples), max_examples)), tally


def _demonstrations(
    sources: Iterable[str], tally: Tally, max_examples: int | None
) -> Iterator[Conversation]:
    for source in sources:
        rows: Iterable[tuple[str, Any]]
        if source == "demo:demonstrations":
            made = demo_world.demonstrations(max_examples or _DEMO_DEMONSTRATIONS, _DEMO_SEED)
            rows = (("demo:demonstrations", row) for row in made)
        else:
            _refuse_demo(source, "demo:demonstrations")
            rows = rows_of(source)
        for where, row in rows:
            try:
                _refuse_unknown_file(row)
                found = demonstrations(row)
            except Unusable as reason:
                tally.drop(str(reason), where)
                continue
            for conversation in found:
                tally.use()
                yield conversation


# ---- prompts -------------------------------------------------------------------------------


def read_prompts(
    sources: Iterable[str],
    validation_fraction: float,
    test_fraction: float,
    unmarked: str | None = None,
) -> tuple[list[Prompt], Tally]:
    """The different prompts of the sources with their splits, in the order of the files.

    A row's own `split` counts if it is train, validation or test; otherwise `unmarked` or, without
    it, a hash of the prompt decides. Repeats are merged and counted; where they name different splits, the one that is
    further from training wins, so that no prompt is both trained on and evaluated.
    """
    if validation_fraction + test_fraction >= 1:
        raise DataError(
            "sample.validation_fraction + sample.test_fraction leave nothing to train on"
        )
    tally = Tally()
    found: dict[str, Prompt] = {}
    for where, row in _prompt_rows(sources):
        try:
            _refuse_unknown_file(row)
            messages = tuple(prompt_messages(row))
        except Unusable as reason:
            tally.drop(str(reason), where)
            continue
        own = row.get("split") if isinstance(row, dict) else None
        by_hash = _split_by_hash(messages, validation_fraction, test_fraction)
        prompt = Prompt(messages, own if own in SPLITS else unmarked or by_hash)
        before = found.get(prompt.id)
        if before is None:
            tally.use()
            found[prompt.id] = prompt
            continue
        tally.merged += 1
        if SPLITS.index(prompt.split) > SPLITS.index(before.split):
            found[prompt.id] = prompt
    return list(found.values()), tally


def _prompt_rows(sources: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for source in sources:
        if source == "demo:prompts":
            for split in SPLITS:
                yield from (("demo:prompts", row) for row in demo_world.prompts(split))
            continue
        _refuse_demo(source, "demo:prompts")
        for where, row in rows_of(source, every_split=True):
            if isinstance(row, str) and _is_text_file(source):
                # a text file of prompts has one on each line; a .zip of texts has one in each file
                lines = enumerate(row.split("\n"), 1)
                yield from ((f"{where}:{n}", line) for n, line in lines if line.strip())
            else:
                yield where, row


def _split_by_hash(messages: tuple[Message, ...], validation: float, test: float) -> str:
    """Of the turns without the system's: the same question under two system turns stays together."""
    turns = [[m["role"], m["content"]] for m in messages if m["role"] != "system"]
    place = hash_fraction("split", turns)
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def _is_text_file(source: str) -> bool:
    path = Path(source).expanduser()
    return kind(source) == "path" and path.is_file() and path.suffix.lower() in (".txt", ".md", "")


def _refuse_demo(source: str, known: str) -> None:
    if kind(source) == "demo":
        raise DataError(f"{source} cannot be used here", f"The demo's data for this is {known}.")


def _refuse_unknown_file(row: Any) -> None:
    if isinstance(row, UnknownFile):
        raise Unusable(f"a file of unknown kind {row.suffix!r}")
