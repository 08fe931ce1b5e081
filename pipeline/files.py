"""Files that survive a kill at any instant, and their hashes.

A file appears by rename after its bytes are on disk: a reader sees the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Wait until `path` (a file, or the entries of a folder) is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """`sync` of a folder and of everything in it, whatever is inside first."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def replace_durably(temporary: Path, path: Path) -> None:
    """Give a complete file, or folder, its name, once its bytes are on disk: a power cut leaves the old one or
    this one."""
    (sync_all if temporary.is_dir() else sync)(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def put_folder(made: Path, to: Path) -> None:
    """Give a complete folder its name, in place of what is there; between two renames there is neither."""
    sync_all(made)
    # a name of this process: a `.NAME.old` of somebody else is not ours to remove
    old = to.with_name(f".{to.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if to.exists():
        os.replace(to, old)
    os.replace(made, to)
    sync(to.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_atomic(path: Path, text: str, durable: bool = True) -> None:
    """Replace `path` by `text`, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if durable:
        sync(path.parent)


def read_json(path: Path) -> Any:
    """The JSON in `path`, or None where it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sha256(path: Path) -> str:
    """Hex digest of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashCache:
    """Remembers the hash of a file for as long as its size and time of change stay the same.

    Kept in one JSON file, so that `status` does not read gigabytes again. A lost or torn cache
    costs time only. `None` keeps nothing on disk.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        stored = read_json(path) if path else None
        self._rows: dict[str, list[Any]] = stored if isinstance(stored, dict) else {}
        self._changed = False

    def sha256(self, path: Path) -> str:
        """The hash of `path`, read only if it changed since the last time."""
        stat = path.stat()
        row = self._rows.get(self._key(path))
        if row and row[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(row[2])
        fresh = sha256(path)
        self._store(path, stat, fresh)
        return fresh

    def remember(self, path: Path, known: str) -> None:
        """Note a hash that was computed elsewhere a moment ago."""
        self._store(path, path.stat(), known)

    def save(self) -> None:
        """Write the cache; a directory that cannot be written to is no reason to fail."""
        if not self.path or not self._changed:
            return
        try:
            # a name of its own: `status` may save while `run` does
            temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self._rows), encoding="utf-8")
            os.replace(temporary, self.path)
            self._changed = False
        except OSError:
            return

    def _store(self, path: Path, stat: os.stat_result, known: str) -> None:
        self._rows[self._key(path)] = [stat.st_size, stat.st_mtime_ns, known]
        self._changed = True

    def _key(self, path: Path) -> str:
        # relative inside the run directory, so that a moved run keeps its cache
        home = self.path.parent if self.path else None
        absolute = Path(os.path.abspath(path))
        if home and absolute.is_relative_to(os.path.abspath(home)):
            return os.path.relpath(absolute, home)
        return str(absolute)
