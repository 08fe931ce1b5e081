"""Files that grow row by row in constant memory: canonical JSONL, and parquet with a fixed schema.

A parquet file ends with a list of its row groups, which its writer keeps in memory: with 1,000 rows
a group, 80 MB at a million rankings. So a group is written when it has 32 MB or 50,000 rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pipeline.records import canonical_json

# so many rows become columns at once. Of a parquet row group: these decide the bytes of the file
_BATCH_ROWS = 1000
_GROUP_ROWS = 50_000
_GROUP_BYTES = 32 * 2**20


class RowFile(Protocol):
    """Takes rows; `count` says how many."""

    count: int

    def write(self, row: dict[str, Any]) -> None: ...


@contextmanager
def open_rows(name: str, path: Path) -> Iterator[RowFile]:
    """A file at `path` for rows of the kind that `name` holds; its suffix decides the format."""
    if name.endswith(".jsonl"):
        with path.open("w", encoding="utf-8", newline="\n") as file:
            yield _Lines(file)
        return
    import pyarrow.parquet

    schema = _schema(name)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        rows = _Parquet(writer, schema)
        yield rows
        rows.close()


class _Lines:
    def __init__(self, file: Any) -> None:
        self.count = 0
        self._file = file

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(canonical_json(row) + "\n")
        self.count += 1


class _Parquet:
    def __init__(self, writer: Any, schema: Any) -> None:
        self.count = 0
        self._writer, self._schema = writer, schema
        self._waiting: list[dict[str, Any]] = []
        self._batches: list[Any] = []
        self._bytes = 0

    def write(self, row: dict[str, Any]) -> None:
        self.count += 1
        self._waiting.append(row)
        if len(self._waiting) == _BATCH_ROWS:
            self._batch()
            full = len(self._batches) * _BATCH_ROWS >= _GROUP_ROWS
            if full or self._bytes >= _GROUP_BYTES:
                self._group()

    def close(self) -> None:
        self._batch()
        self._group()

    def _batch(self) -> None:
        """Rows become columns, which take a tenth of the memory."""
        import pyarrow

        if not self._waiting:
            return
        columns = [
            pyarrow.array([row[column.name] for row in self._waiting], column.type)
            for column in self._schema
        ]
        batch = pyarrow.record_batch(columns, schema=self._schema)
        self._batches.append(batch)
        self._bytes += batch.nbytes
        self._waiting = []

    def _group(self) -> None:
        import pyarrow

        if self._batches:
            table = pyarrow.Table.from_batches(self._batches, self._schema)
            self._writer.write_table(table)
            self._batches, self._bytes = [], 0


def _schema(name: str) -> Any:
    """A written schema: without rows there is nothing to infer it from."""
    import pyarrow

    text, whole, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    turns = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    texts = pyarrow.list_(text)
    columns = {
        "pairs.parquet": {
            "prompt": turns,
            "chosen": turns,
            "rejected": turns,
            "weight": real,
            "soft_label": real,
            "votes": whole,
            "group_id": text,
            "prompt_id": text,
            "ranking_id": text,
            "annotator": text,
            "split": text,
        },
        "groups.parquet": {
            "prompt": turns,
            "responses": texts,
            "ranks": pyarrow.list_(pyarrow.list_(whole)),
            "annotators": texts,
            "ranking_ids": texts,
            "group_id": text,
            "prompt_id": text,
            "split": text,
        },
    }
    return pyarrow.schema(list(columns[name].items()))
