"""The manifest of an artifact, its fingerprint, and why it is stale.

A fingerprint covers what can change the numbers: schema, stage, version, hashed settings, seed and
the digests of the inputs. Devices, paths, logging and saving are recorded but not covered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import field_paths
from pipeline.errors import ArtifactError
from pipeline.files import write_atomic
from pipeline.plan import Stage, Step
from pipeline.records import canonical_json
from pipeline.settings import Settings

SCHEMA = 1
NAME = "manifest.json"


class InputRecord(BaseModel):
    """Where one input came from: a step of this run, or what the user gave."""

    model_config = ConfigDict(frozen=True)

    digest: str
    step: str | None = None
    stage: str | None = None
    fingerprint: str | None = None
    sources: tuple[str, ...] = ()


class FileRecord(BaseModel):
    """One file of an artifact; `path` is relative to `artifact/`."""

    model_config = ConfigDict(frozen=True)

    path: str
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is and how it was made. Its presence on disk means that it is complete."""

    model_config = ConfigDict(populate_by_name=True, frozen=True)

    schema_number: int = Field(SCHEMA, alias="schema")
    stage: str
    stage_version: int
    kind: str
    step: str
    round: int
    fingerprint: str
    digest: str
    inputs: dict[str, InputRecord] = {}
    settings: dict[str, Any] = {}
    unhashed: dict[str, Any] = {}
    derived: dict[str, Any] = {}
    files: tuple[FileRecord, ...] = ()
    contract: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    cost: dict[str, float] = {}
    seed: int = 0
    world_size: int = 1
    precision: str = "fp32"
    resumed_from: int | None = None
    environment: dict[str, Any] = {}
    started: str = ""
    finished: str = ""
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        """Put the manifest into `folder`, by rename."""
        row = self.model_dump(mode="json", by_alias=True)
        write_atomic(folder / NAME, json.dumps(row, indent=1, ensure_ascii=False) + "\n")


def read(folder: Path) -> Manifest:
    """The manifest of the step directory `folder`.

    Raises:
        ArtifactError: damaged, or made by a newer version of prefline.
    """
    path = folder / NAME
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        number = row["schema"]
        if not isinstance(number, int):
            raise ValueError("no schema number")
        check_schema(number, SCHEMA, path)
        return Manifest.model_validate(row)
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        raise ArtifactError(
            f"{path}: damaged: not a readable manifest",
            f"Remove {folder} and run again to make the step anew.",
        ) from None


def check_schema(found: int, known: int, path: Path) -> None:
    """Refuse what a later version wrote, before its fields are misread."""
    if found > known:
        raise ArtifactError(
            f"{path}: made by a newer version of prefline (schema {found}, this one knows {known})",
            "Install a newer prefline to work with it.",
        )


# ---- settings ------------------------------------------------------------------------------


def is_hashed(field: Any) -> bool:
    """Whether a settings field is covered by the fingerprint."""
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("hashed") is False)


def flat_settings(settings: Settings, sections: tuple[str, ...]) -> dict[str, tuple[Any, bool]]:
    """Every setting of `sections`: dotted key -> (value as JSON, whether it is hashed).

    A section may be a single setting (`rank.heldout_fraction`).
    """
    plain = settings.model_dump(mode="json", include={name.split(".")[0] for name in sections})
    found = {}
    for key, field in field_paths(Settings).items():
        if key in sections or key.split(".")[0] in sections:
            found[key] = (_at(plain, key), is_hashed(field))
    return found


def hashed_settings(settings: Settings, stage: Stage) -> dict[str, Any]:
    """The settings that a stage's result depends on."""
    rows = flat_settings(settings, stage.sections)
    return {key: value for key, (value, hashed) in rows.items() if hashed}


def unhashed_settings(settings: Settings, stage: Stage) -> dict[str, Any]:
    """The settings that are recorded only, those of run, launch and cost included."""
    rows = flat_settings(settings, ("run", "launch", "cost", *stage.sections))
    return {key: value for key, (value, hashed) in rows.items() if not hashed}


def defaults() -> dict[str, Any]:
    """The default of every setting, as JSON."""
    # model_construct: a tree of defaults alone is no valid pipeline (nothing to start from)
    return values(Settings.model_construct())


def values(settings: Settings) -> dict[str, Any]:
    """Dotted key -> value as JSON."""
    plain = settings.model_dump(mode="json")
    return {key: _at(plain, key) for key in field_paths(Settings)}


def _at(plain: Mapping[str, Any], key: str) -> Any:
    value: Any = plain
    for part in key.split("."):
        value = value[part]
    return value


# ---- fingerprint ---------------------------------------------------------------------------


def fingerprint(step: Step, settings: Settings, digests: Mapping[str, str]) -> str:
    """What identifies the result of `step`; `digests` are those of its inputs, by role.

    Settings at their default stay out of it, so that a new setting makes nothing stale.
    """
    default = defaults()
    changed = {
        key: value
        for key, value in hashed_settings(settings, step.stage).items()
        if value != default[key]
    }
    covered: dict[str, Any] = {
        "schema": SCHEMA,
        "stage": step.stage.name,
        "stage_version": step.stage.version,
        "settings": changed,
        "inputs": dict(digests),
        "seed": settings.run.seed,
    }
    # rankings carry their round: the same samples ranked in another round are another artifact
    if step.round > 1:
        covered["round"] = step.round
    return hashlib.sha256(canonical_json(covered).encode("utf-8")).hexdigest()


def why_stale(
    old: Manifest, step: Step, settings: Settings, digests: Mapping[str, str | None]
) -> str | None:
    """The first reasons for which `old` is no longer the result of `step`; None if it still is.

    A digest of None is an input that is about to be made again.
    """
    reasons = []
    if old.stage_version != step.stage.version:
        reasons.append(f"stage version {old.stage_version} -> {step.stage.version}")
    default = defaults()
    sections = {key.split(".")[0] for key in old.settings}
    for key, value in hashed_settings(settings, step.stage).items():
        if sections and key.split(".")[0] not in sections:
            # that it is read at all now has a reason of its own, which is told
            continue
        # a setting that is younger than the manifest had its default then
        before = old.settings.get(key, default[key])
        if before != value:
            reasons.append(f"{key} {show(before)} -> {show(value)}")
    if old.seed != settings.run.seed:
        reasons.append(f"run.seed {old.seed} -> {settings.run.seed}")
    if not reasons:
        for role in sorted({*old.inputs, *digests}):
            was, now = old.inputs.get(role), digests.get(role)
            if was is None or role not in digests or was.digest != now:
                reasons.append(f"input {step.inputs.get(role) or role} changed")
    reasons = list(dict.fromkeys(reasons))
    more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return ", ".join(reasons[:3]) + more if reasons else None


def show(value: Any) -> str:
    """A setting's value as a person would type it."""
    if isinstance(value, float) and value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return json.dumps(value, ensure_ascii=False)
