"""What the line carries: prompts, responses, rankings; and reading rows with `file:line` errors.

Ids are hashes of content, so the same work gives the same ids, files and digests.
A message is `{"role": "system" | "user" | "assistant", "content": str}`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

Message = dict[str, str]
SPLITS = ("train", "validation", "test")
ROW_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt", ".md", ".zip")
# a file of a zip is read whole; one of a few kilobytes can unpack to more than the memory holds
_LARGEST_MEMBER = 2**30


# made once: json.dumps makes one a call, which costs as much as a small value
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return _CANONICAL.encode(value)


def content_id(*parts: Any) -> str:
    """16 hex digits of the sha256 of `parts`: the identity of content."""
    text = canonical_json(list(parts))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@lru_cache(maxsize=256)
def response_id(prompt_id: str, text: str) -> str:
    """Identity of a response. What was asked last is remembered: several people rank the same texts."""
    return content_id("response", prompt_id, text)


def hash_fraction(*parts: Any) -> float:
    """A number in [0, 1) that depends on content only; splits are made with it."""
    return int(content_id(*parts), 16) / 16**16


def is_heldout(prompt_id: str, heldout_fraction: float) -> bool:
    """Whether the reward model must not see this prompt's rankings; decided by the prompt alone."""
    return hash_fraction("heldout", prompt_id) < heldout_fraction


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an assistant's turn, and the split it belongs to."""

    messages: tuple[Message, ...]
    split: str = "train"

    @property
    def id(self) -> str:
        return content_id("prompt", list(self.messages))

    @property
    def text(self) -> str:
        """The last user turn: what a person would call the prompt."""
        return self.messages[-1]["content"]

    def to_row(self) -> dict[str, Any]:
        return {"id": self.id, "messages": list(self.messages), "split": self.split}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Prompt:
        return cls(tuple(row["messages"]), row["split"])


@dataclass(frozen=True)
class Response:
    """One answer to a prompt. `ended`: it stopped by itself; `tokens`: its length, end included."""

    text: str
    ended: bool = True
    tokens: int | None = None

    def id(self, prompt_id: str) -> str:
        return response_id(prompt_id, self.text)


@dataclass(frozen=True)
class SampleGroup:
    """The different responses of one prompt, as sampled; exact duplicates are merged before.

    priority: how much a label is wanted, where a reward model chose among the prompts; more is more.
    selection_probability: that the prompt came to be ranked, given the candidates and their
    priorities, over the draw of those taken at random; weights of 1 / probability undo the choice.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    priority: float | None = None
    selection_probability: float | None = None

    def to_row(self) -> dict[str, Any]:
        responses = [{"id": r.id(self.prompt.id), **asdict(r)} for r in self.responses]
        row = {**self.prompt.to_row(), "responses": responses}
        # absent where nothing was chosen, as in files from before there was a choice
        for key in ("priority", "selection_probability"):
            if getattr(self, key) is not None:
                row[key] = getattr(self, key)
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> SampleGroup:
        responses = (Response(r["text"], r["ended"], r["tokens"]) for r in row["responses"])
        return cls(
            Prompt.from_row(row),
            tuple(responses),
            row.get("priority"),
            row.get("selection_probability"),
        )


@dataclass(frozen=True)
class Ranking:
    """One annotator's order of the responses of one prompt.

    ranks[i] belongs to responses[i]: 1 is best, equal numbers are ties.
    split: `train`, or `heldout` for prompts whose rankings the reward model never sees.
    """

    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    annotator: str
    split: str = "train"
    round: int = 1
    source: str = "app"

    @cached_property
    def prompt_id(self) -> str:
        return content_id("prompt", list(self.messages))

    @cached_property
    def id(self) -> str:
        order = sorted(zip(self.responses, self.ranks, strict=True))
        return content_id("ranking", list(self.messages), order, self.annotator, self.round)

    @property
    def strict_pairs(self) -> list[tuple[int, int]]:
        """(chosen, rejected) positions of every pair that is not a tie."""
        spots = range(len(self.ranks))
        return [(i, j) for i in spots for j in spots if self.ranks[i] < self.ranks[j]]

    def to_row(self) -> dict[str, Any]:
        responses = [
            {"id": response_id(self.prompt_id, text), "text": text, "rank": rank}
            for text, rank in zip(self.responses, self.ranks, strict=True)
        ]
        return {
            "id": self.id,
            "prompt_id": self.prompt_id,
            "messages": list(self.messages),
            "responses": responses,
            "annotator": self.annotator,
            "split": self.split,
            "round": self.round,
            "source": self.source,
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Ranking:
        return cls(
            messages=tuple(row["messages"]),
            responses=tuple(r["text"] for r in row["responses"]),
            ranks=tuple(r["rank"] for r in row["responses"]),
            annotator=row["annotator"],
            split=row["split"],
            round=row["round"],
            source=row["source"],
        )


@dataclass
class Tally:
    """Counts rows that cannot be used, by reason, so that nothing is dropped in silence."""

    used: int = 0
    merged: int = 0
    """Rows that repeat an earlier one; they are neither bad nor new."""
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def use(self) -> None:
        self.used += 1

    def drop(self, reason: str, where: str) -> None:
        self.reasons[reason] += 1
        self.first.setdefault(reason, where)

    @property
    def dropped(self) -> int:
        return sum(self.reasons.values())

    def check(self, what: str, max_bad_fraction: float) -> None:
        """Refuse data with no usable row, or with too many unusable ones.

        Raises:
            DataError: names the reasons, how often each occurred and the first place.
        """
        total = self.used + self.merged + self.dropped
        reasons = "; ".join(
            f"{count} x {reason} (first: {self.first[reason]})"
            for reason, count in self.reasons.most_common()
        )
        if self.used == 0:
            raise DataError(f"{what}: no usable row in {total}. {reasons or 'It is empty.'}")
        if self.dropped > max_bad_fraction * total:
            raise DataError(
                f"{what}: {self.dropped} of {total} rows cannot be used: {reasons}",
                f"Mend them, or allow more with max_bad_fraction (now {max_bad_fraction}).",
            )

    def summary(self) -> str:
        text = f"{self.used} rows"
        if self.merged:
            text += f" ({self.merged} repeats merged)"
        if self.reasons:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
            text += f" used, {self.dropped} left out ({reasons})"
        return text


# ---- rows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnknownFile:
    """Stands for a file whose suffix says nothing about how to read it."""

    suffix: str


def _hidden(name: str) -> bool:
    """Whether a file is the system's own (`.git`, `__MACOSX`), not the user's data."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(`file:line`, value) for each row of a file, or of every known file in a folder.

    A value is a dict for files with columns, a str for text. A .txt file is one text; a .zip is
    read as the files in it. A file of unknown kind in a folder or a .zip is an `UnknownFile`, so
    that the caller counts it and nothing is passed over in silence.

    Raises:
        DataError: missing, unknown suffix, or text that does not parse (names file and line).
    """
    if path.is_dir():
        names = [(p, p.relative_to(path).as_posix()) for p in sorted(path.rglob("*"))]
        files = [p for p, name in names if p.is_file() and not _hidden(name)]
        if not any(p.suffix.lower() in ROW_SUFFIXES for p in files):
            known = ", ".join(ROW_SUFFIXES)
            raise DataError(f"{path}: no data file in this folder (looked for {known})")
        for file in files:
            if file.suffix.lower() in ROW_SUFFIXES:
                yield from read_rows(file)
            else:
                yield str(file), UnknownFile(file.suffix)
        return
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_rows(path)
        elif path.suffix.lower() == ".zip":
            yield from _zip_rows(path)
        else:
            yield from _text_rows(str(path), path.suffix.lower(), path.read_bytes())
    except OSError as error:
        # pyarrow raises OSError without an errno for a torn file
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _text_rows(name: str, suffix: str, raw: bytes) -> Iterator[tuple[str, Any]]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        broken = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{name}:{broken}: not UTF-8 text (byte {error.start})") from None
    if suffix == ".jsonl":
        # not splitlines: that also cuts at U+2028, which is legal inside a JSON string
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{name}:{number}", _json(line, name, number)
    elif suffix == ".json":
        document = _json(text, name, 1)
        rows = document if isinstance(document, list) else [document]
        for number, row in enumerate(rows, 1):
            yield f"{name}: row {number}", row
    elif suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        try:
            for row in reader:
                yield f"{name}:{reader.line_num}", dict(row)
        except csv.Error as error:
            raise DataError(f"{name}:{reader.line_num}: not valid CSV ({error})") from None
    elif suffix in (".txt", ".md", ""):
        yield name, text
    else:
        known = ", ".join(ROW_SUFFIXES)
        raise DataError(f"{name}: unknown kind of file {suffix!r}; known are {known}")


def _json(text: str, name: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{name}:{line}: not valid JSON ({error.msg})") from None
    except RecursionError:
        raise DataError(f"{name}:{first_line}: JSON is nested too deeply") from None
    except ValueError as error:
        # a number of thousands of digits
        raise DataError(f"{name}:{first_line}: not valid JSON ({error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from None


def _zip_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                suffix = Path(name).suffix.lower()
                if name.endswith("/") or _hidden(name):
                    continue
                if archive.getinfo(name).file_size > _LARGEST_MEMBER:
                    raise DataError(
                        f"{path}/{name}: unpacks to more than {_LARGEST_MEMBER >> 20:,} MiB",
                        "Unpack it, and give the folder.",
                    )
                if suffix in (".txt", ".md", ".jsonl", ".json", ".csv"):
                    yield from _text_rows(f"{path}/{name}", suffix, archive.read(name))
                else:
                    yield f"{path}/{name}", UnknownFile(suffix)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{path}: not a readable zip file ({error})") from None


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as canonical JSONL; the number of rows."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(canonical_json(row) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file of ours."""
    return [row for _, row in read_rows(path)]
