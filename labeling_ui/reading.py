"""Rows of what a user names: files, folders, saved datasets, samples of a run, datasets on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import sources
from pipeline.errors import DataError
from pipeline.records import read_rows

_SAMPLES = "samples.jsonl"


def rows_of(source: str, what: str = "rankings") -> Iterator[tuple[str, Any]]:
    """(where, row) of a file or folder, or of the train split of a dataset.

    A folder may be one of `datasets.save_to_disk`, or the sample step's, of which only the sampled
    responses are read.

    Args:
        what: the rows are, for messages.

    Raises:
        DataError: it cannot be read; names the file and line.
    """
    kind = sources.kind(source)
    if kind == "demo":
        raise DataError(f"{source} holds no {what}", "Those of the demo are made by its own steps.")
    if kind == "hub":
        yield from _dataset(source)
        return
    sources.check(source, what)
    path = Path(source).expanduser()
    if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        yield from _dataset(source)
        return
    for sampled in (path / _SAMPLES, path / "artifact" / _SAMPLES):
        # beside them stands the same prompts once more, without responses
        if sampled.is_file():
            path = sampled
    yield from read_rows(path)


def _dataset(source: str) -> Iterator[tuple[str, Any]]:
    import datasets

    local = sources.kind(source) == "path"
    try:
        if local:
            found = datasets.load_from_disk(Path(source).expanduser())
        else:
            found = datasets.load_dataset(source, split="train")
    # the library passes on errors of requests and huggingface_hub, which are OSErrors
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).split("\n")[0][:200]
        kinds = (
            "not a readable dataset"
            if local
            else "neither a local path nor a dataset that can be loaded"
        )
        raise DataError(f"{source}: {kinds} ({first_line})") from None
    if isinstance(found, dict):
        if "train" not in found:
            names = ", ".join(map(str, found))
            raise DataError(f"{source}: no split is called train; it has {names}")
        found = found["train"]
    for number, row in enumerate(found, 1):
        yield f"{source}: row {number}", row
