"""The files of an export: one snapshot in, a folder (or one file of it) out, row by row.

    rankings.jsonl                 every ranking, with all that its annotator said beside the order
    pairs.parquet                  TRL's conversational preference format, merged by `mode`
    groups.parquet                 one row per set of responses, the ranks of every annotator
    demonstrations.jsonl           answers that people wrote, as the sft stage reads them
    demonstrations_heldout.jsonl   those to held-out prompts: not to be trained on
    manifest.json                  what was read, left out (by reason) and written; hashes

The same store gives the same bytes, and so does its backup.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pipeline
from labeling_ui import schema
from labeling_ui.aggregate import MODES, group_rankings, pair_rows
from labeling_ui.exporting import Asked, asked, pseudonyms
from labeling_ui.row_files import RowFile, open_rows
from labeling_ui.store import Store
from pipeline.errors import DataError
from pipeline.files import put_folder, read_json, sha256, sync, write_atomic
from pipeline.records import Message

FORMATS = {
    "rankings": "rankings.jsonl",
    "pairs": "pairs.jsonl",
    "parquet": "pairs.parquet",
}
"""What can be had as a file of its own: --format and the file that it is like."""
FILES = (
    "rankings.jsonl",
    "pairs.parquet",
    "groups.parquet",
    "demonstrations.jsonl",
    "demonstrations_heldout.jsonl",
)
MANIFEST = "manifest.json"
_GROUPED = {"pairs.jsonl", "pairs.parquet", "groups.parquet"}


@dataclass(frozen=True)
class Options:
    """mode: how annotators are merged into pairs, one of aggregate.MODES. everything: rankings.jsonl
    also holds what does not count (skipped, late, ...), each with its reason in `left_out`."""

    heldout_fraction: float
    mode: str = MODES[0]
    everything: bool = False


@dataclass
class Counts:
    """What an export read and what it left out, by reason."""

    prompts: int = 0
    tasks: int = 0
    answers: int = 0
    rankings: int = 0
    annotators: set[str] = field(default_factory=set)
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def drop(self, file: str, reasons: Counter[str]) -> None:
        self.left_out.setdefault(file, Counter()).update(reasons)

    def to_json(self) -> dict[str, int]:
        """How much was read."""
        return {
            "prompts": self.prompts,
            "tasks": self.tasks,
            "answers": self.answers,
            "rankings_that_count": self.rankings,
            "annotators": len(self.annotators),
        }


def export_file(store: Store, to: Path, format: str, options: Options) -> Counts:
    """Write one of FORMATS, whole or not at all."""
    temporary = to.with_name(to.name + ".tmp")
    try:
        counts = _write(store, {FORMATS[format]: temporary}, options)
        sync(temporary)
        os.replace(temporary, to)
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def export_folder(store: Store, to: Path, options: Options, replace: bool = False) -> Counts:
    """Write all FILES and the manifest, whole or not at all.

    Raises:
        DataError: `to` is there, and is no export that may be replaced.
    """
    _check_target(to, replace)
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        counts = _write(store, {name: temporary / name for name in FILES}, options)
        manifest = _manifest(temporary, counts, options)
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        write_atomic(temporary / MANIFEST, text)
        put_folder(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


# ---- rows ----------------------------------------------------------------------------------


def _write(store: Store, paths: dict[str, Path], options: Options) -> Counts:
    counts = Counts()
    shown = pseudonyms(store)
    with ExitStack() as stack, store.read() as tx:
        files = {name: stack.enter_context(open_rows(name, path)) for name, path in paths.items()}
        for prompt in asked(tx, options.heldout_fraction, shown):
            _count(prompt, counts)
            _write_prompt(prompt, files, counts, options)
        counts.rows = {name: file.count for name, file in files.items()}
    return counts


def _count(prompt: Asked, counts: Counts) -> None:
    counts.prompts += 1
    counts.tasks += prompt.tasks
    counts.answers += len(prompt.answers)
    counts.rankings += len(prompt.rankings)
    counts.annotators.update(a.annotator for a in prompt.answers if a.counts)


def _write_prompt(
    prompt: Asked, files: dict[str, RowFile], counts: Counts, options: Options
) -> None:
    groups, repeated = (
        group_rankings(prompt.rankings) if files.keys() & _GROUPED else ([], Counter())
    )
    makers: dict[str, Callable[[], tuple[Iterable[dict[str, Any]], Counter[str]]]] = {
        "rankings.jsonl": lambda: _ranking_rows(prompt, options.everything),
        "pairs.jsonl": lambda: _pairs(groups, repeated, options.mode),
        "pairs.parquet": lambda: _pairs(groups, repeated, options.mode),
        "groups.parquet": lambda: ((group.to_row() for group in groups), repeated),
        "demonstrations.jsonl": lambda: _demonstrations(prompt, "train"),
        "demonstrations_heldout.jsonl": lambda: _demonstrations(prompt, "heldout"),
    }
    for name, file in files.items():
        rows, dropped = makers[name]()
        for row in rows:
            file.write(row)
        if dropped:
            counts.drop(name, dropped)


def _ranking_rows(prompt: Asked, everything: bool) -> tuple[list[dict[str, Any]], Counter[str]]:
    rows, dropped = [], Counter[str]()
    seen: set[str] = set()
    for answer in prompt.answers:
        if answer.row.status == "written":
            dropped["written answers (see demonstrations.jsonl)"] += 1
        elif answer.left_out and not everything:
            dropped[answer.left_out] += 1
        elif answer.counts and answer.id in seen:
            dropped["equal rankings of one annotator"] += 1
        else:
            seen.add(answer.id)
            rows.append(answer.to_row())
    return rows, dropped


def _pairs(
    groups: list[Any], repeated: Counter[str], mode: str
) -> tuple[Iterator[dict[str, Any]], Counter[str]]:
    rows, dropped = pair_rows(groups, mode)
    return map(preference_row, rows), dropped + repeated


def preference_row(row: dict[str, Any]) -> dict[str, Any]:
    """A pair as TRL reads it."""
    # TRL takes a column `label` beside a prompt for unpaired preferences
    row["soft_label"] = row.pop("label")
    return row


def _demonstrations(prompt: Asked, split: str) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Written answers and ideal answers, as conversations; equal ones once."""
    dropped: Counter[str] = Counter()
    rows: dict[str, dict[str, Any]] = {}
    for answer in prompt.answers if prompt.split == split else ():
        text = answer.row.ideal
        if text is None or not text.strip():
            continue
        # that all responses were bad is no reason against the one that a person wrote
        if answer.left_out not in (None, "all_bad"):
            dropped[str(answer.left_out)] += 1
            continue
        if text in rows:
            dropped["equal answers to one prompt"] += 1
            continue
        said: Message = {"role": "assistant", "content": text}
        rows[text] = {
            "messages": [*answer.messages, said],
            "prompt_id": prompt.prompt_id,
            "annotator": answer.annotator,
            "source": "written" if answer.row.status == "written" else "ideal",
        }
    return [rows[text] for text in sorted(rows)], dropped


# ---- the folder ----------------------------------------------------------------------------


def _check_target(to: Path, replace: bool) -> None:
    if not to.parent.is_dir():
        raise DataError(f"{to.parent}: no such folder")
    if not to.exists():
        return
    if not replace:
        raise DataError(f"{to}: exists already", "Choose another name, or add --replace.")
    made_here = read_json(to / MANIFEST) if to.is_dir() else None
    if not isinstance(made_here, dict) or "export" not in made_here:
        raise DataError(f"{to}: is no export of labels, so it is not replaced")


def _manifest(folder: Path, counts: Counts, options: Options) -> dict[str, Any]:
    return {
        "export": 1,
        "prefline": pipeline.__version__,
        "store_schema": schema.VERSION,
        "mode": options.mode,
        "everything": options.everything,
        "heldout": {
            "fraction": options.heldout_fraction,
            "rule": "a hash of the prompt's messages decides, and so does the rank step; prompts of"
            " a validation or test split are held out too",
        },
        "read": counts.to_json(),
        "files": {
            name: {
                "rows": counts.rows[name],
                "left_out": dict(sorted((+counts.left_out.get(name, Counter())).items())),
                "sha256": sha256(folder / name),
            }
            for name in FILES
        },
    }
