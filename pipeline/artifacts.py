"""Artifacts on disk: the digest of a folder, publishing it in one instant, and verifying it.

Order of a publication: `artifact.tmp` is hashed and flushed, renamed to `artifact`, then the
manifest appears by rename, then `latest` names it. A kill between any two leaves `partial`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from pipeline import manifest as manifests
from pipeline.errors import ArtifactError, StageError
from pipeline.files import HashCache, sha256, sync, sync_all, write_atomic
from pipeline.manifest import FileRecord, Manifest
from pipeline.records import canonical_json

FOLDER = "artifact"
UNFINISHED = "artifact.tmp"
LATEST = "latest"
# nothing that runs code when it is read: no pickle, no Python
SUFFIXES = (
    ".safetensors",
    ".json",
    ".jsonl",
    ".parquet",
    ".txt",
    ".md",
    ".jinja",
    ".model",
    ".png",
)
_SMALL_BYTES = 16 * 2**20


def scan(folder: Path) -> list[FileRecord]:
    """Size and hash of every file below `folder`, sorted by path."""
    return [
        FileRecord(
            path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=sha256(path)
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def digest(files: Iterable[FileRecord]) -> str:
    """`sha256:...` over the sorted (path, size, sha256) of the files."""
    rows = sorted([file.path, file.bytes, file.sha256] for file in files)
    return "sha256:" + hashlib.sha256(canonical_json(rows).encode("utf-8")).hexdigest()


def check_files(folder: Path, step: str) -> None:
    """Refuse to publish a folder that is empty or holds what an artifact may not hold.

    Raises:
        StageError: names the file.
    """
    paths = sorted(folder.rglob("*")) if folder.is_dir() else []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise StageError(f"{step}: {name} is a link; an artifact holds plain files only")
        if path.is_file() and path.suffix.lower() not in SUFFIXES:
            known = ", ".join(SUFFIXES)
            raise StageError(f"{step}: {name} may not be in an artifact; allowed are {known}")
    if not any(path.is_file() for path in paths):
        raise StageError(f"{step}: the stage wrote nothing into its artifact folder")


def prepare(work: Path) -> Path:
    """A fresh, empty folder for the result of a step."""
    unfinished = work / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def publish(work: Path, draft: Manifest) -> Manifest:
    """Make `artifact.tmp` the result of the step in `work`; `draft` lacks files and digest only."""
    unfinished, final = work / UNFINISHED, work / FOLDER
    check_files(unfinished, draft.step)
    files = scan(unfinished)
    sync_all(unfinished)
    # a leftover of a kill between the rename and the manifest
    shutil.rmtree(final, ignore_errors=True)
    os.rename(unfinished, final)
    sync(work)
    complete = draft.model_copy(update={"files": tuple(files), "digest": digest(files)})
    complete.write(work)
    point_latest(work)
    return complete


def point_latest(work: Path) -> None:
    """Make `<step>/latest` name the step directory `work`, if it does not yet."""
    latest = work.parent / LATEST
    if not latest.is_file() or latest.read_text(encoding="utf-8").strip() != work.name:
        write_atomic(latest, work.name + "\n")


def find_damage(work: Path, manifest: Manifest, cache: HashCache | None) -> str | None:
    """What is wrong with the artifact in `work`, in a few words that begin with the file; or None.

    With a cache, a file whose size and time of change are as remembered is not read again.
    """
    folder = work / FOLDER
    expected = {file.path: file for file in manifest.files}
    for name, file in expected.items():
        path = folder / name
        # of another's run a manifest may say anything: before a byte is read
        if refusal := _refusal(folder, name):
            return f"{name} {refusal}"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file.bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {file.bytes}"
        if (cache.sha256(path) if cache else sha256(path)) != file.sha256:
            return f"{name} has changed bytes"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (path.is_file() or path.is_symlink()) and name not in expected:
            return f"{name} does not belong to the artifact"
    if digest(manifest.files) != manifest.digest:
        return f"{manifests.NAME} contradicts itself (digest)"
    return None


def _refusal(folder: Path, name: str) -> str | None:
    """Why a file that a manifest lists is not for us, whatever its bytes are."""
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts:
        return "leads out of the artifact"
    if any((folder / part).is_symlink() for part in (inside, *inside.parents)):
        return "is a link; an artifact holds plain files only"
    if inside.suffix.lower() not in SUFFIXES:
        return "may not be in an artifact"
    return None


def verify(work: Path, manifest: Manifest, cache: HashCache | None = None) -> None:
    """Refuse a damaged artifact. Without a cache every byte is read.

    Raises:
        ArtifactError: names the file.
    """
    damage = find_damage(work, manifest, cache)
    if damage:
        raise ArtifactError(
            f"{manifest.step}: damaged: {damage} ({work / FOLDER})",
            f"Restore the file, or remove {work} and run again to make the step anew.",
        )


def verify_before_use(work: Path, manifest: Manifest, cache: HashCache) -> None:
    """Verify as much as costs little: every byte of a small artifact, times and sizes of a large."""
    small = sum(file.bytes for file in manifest.files) <= _SMALL_BYTES
    verify(work, manifest, None if small else cache)


def remember(work: Path, manifest: Manifest, cache: HashCache) -> None:
    """Note the hashes of an artifact that was published a moment ago."""
    for file in manifest.files:
        cache.remember(work / FOLDER / file.path, file.sha256)
