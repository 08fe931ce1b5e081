"""The models of a run, or of a folder, as data: what the playground offers to talk to and look into."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import artifacts, manifest, sources
from pipeline.errors import ArtifactError, ConfigError
from pipeline.job import Input
from pipeline.manifest import InputRecord, Manifest
from pipeline.plan import STAGES
from pipeline.records import hash_fraction, read_jsonl
from pipeline.workspace import RUN_FILE, Run, open_run

_MOST_PROMPTS = 30
_MODEL_FILE = "config.json"


@dataclass(frozen=True)
class Offered:
    """One language model.

    name: the step that made it, or `base` for the user's own model. digest, fingerprint: which
    version of it. reference, start: names of other offered models: what the KL penalty of a policy
    is against, and what it started from. reward: the reward model that goes with it. work: the
    directory of its step, with checkpoints.
    """

    name: str
    label: str
    item: Input
    stage: str = ""
    round: int = 0
    reference: str | None = None
    start: Input | None = None
    reward: Input | None = None
    work: Path | None = None

    @property
    def version(self) -> str:
        """The name and which version of it: `sft@4f9c2ab71d03`."""
        fingerprint = self.item.fingerprint
        return f"{self.name}@{fingerprint[:12]}" if fingerprint else self.name


def of(target: str) -> tuple[list[Offered], Run | None]:
    """The models of a run; or of a model folder, GGUF file or hub id, then without a run.

    Raises:
        ConfigError: there is nothing of the kind.
        ArtifactError: the run has no finished model yet.
    """
    path = Path(target).expanduser()
    is_model = path.suffix.lower() == ".gguf" or (
        (path / _MODEL_FILE).is_file() and not (path / RUN_FILE).is_file()
    )
    if not is_model and (path.exists() or sources.kind(target) == "path"):
        run = open_run(path)
        return of_run(run), run
    if path.suffix.lower() == ".gguf" and not path.is_file():
        raise ConfigError(f"{target} does not exist")
    source = str(path.absolute()) if is_model else target
    name = path.stem if is_model else target
    return [Offered("base", name, Input("model", "", sources=(source,)))], None


def of_run(run: Run) -> list[Offered]:
    """Every finished `model` and `policy` of a run, in the order in which they were made.

    Raises:
        ArtifactError: there is none.
    """
    order = list(STAGES)
    made = [
        (work, found)
        for work, found in _latest(run)
        if found.kind in ("model", "policy") and found.stage in order and not _is_encoder(found)
    ]
    made.sort(key=lambda pair: (pair[1].round, order.index(pair[1].stage)))
    names = {(found.step, found.fingerprint): found.step for _, found in made}
    offered = []
    if run.settings.model.base:
        base = Input("model", "", sources=(run.settings.model.base,))
        offered.append(Offered("base", f"base ({Path(run.settings.model.base).name})", base))
    reward = _artifact(run, "reward", None)
    for work, found in made:
        reads = found.inputs
        rewarded = _input(run, "reward_model", reads.get("reward_model")) or reward
        offered.append(
            Offered(
                name=found.step,
                label=_label(found),
                item=_item(found.kind, work, found),
                stage=found.stage,
                round=found.round,
                reference=_name_of(reads.get("reference"), names),
                start=_input(run, "model", reads.get("model")),
                reward=rewarded,
                work=work,
            )
        )
    if not offered:
        raise ArtifactError(
            f"{run.path}: no model is finished yet", f"prefline run {run.path} --until sft"
        )
    return offered


def example_prompts(run: Run) -> list[str]:
    """Some prompts of the run that no training stage saw, in an order that tells nothing."""
    work = run.latest("sample") or run.latest("rank")
    path = work / artifacts.FOLDER / "prompts.jsonl" if work else None
    if path is None or not path.is_file():
        return []
    rows = [row for row in read_jsonl(path) if len(row["messages"]) == 1]
    rows = [row for row in rows if row["split"] == "test"] or rows
    rows.sort(key=lambda row: hash_fraction("playground", row["id"]))
    return [row["messages"][0]["content"] for row in rows[:_MOST_PROMPTS]]


def to_json(offered: list[Offered]) -> str:
    """For the process that loads them."""
    return json.dumps([asdict(one) for one in offered], default=str)


def from_rows(rows: list[dict[str, Any]]) -> list[Offered]:
    return [
        Offered(
            **{
                **row,
                "item": _parsed(row["item"]),
                "start": _parsed(row["start"]),
                "reward": _parsed(row["reward"]),
                "work": Path(row["work"]) if row["work"] else None,
            }
        )
        for row in rows
    ]


# ---- parts ---------------------------------------------------------------------------------


def _parsed(row: dict[str, Any] | None) -> Any:
    if row is None:
        return None
    path = Path(row["path"]) if row["path"] else None
    return Input(**{**row, "path": path, "sources": tuple(row["sources"])})


def _latest(run: Run) -> list[tuple[Path, Manifest]]:
    steps = sorted(path.parent.name for path in run.path.glob(f"*/{artifacts.LATEST}"))
    works = [work for step in steps if (work := run.latest(step)) is not None]
    return [(work, manifest.read(work)) for work in works]


def _is_encoder(found: Manifest) -> bool:
    """A masked-word encoder writes nothing."""
    return found.stage == "pretrain" and found.settings.get("pretrain.objective") == "masked"


def _label(found: Manifest) -> str:
    words = {"pretrain": "base (pretrain)"}
    more = f" (round {found.round})" if found.round > 1 else ""
    return words.get(found.step, found.step) + more


def _item(role: str, work: Path, found: Manifest) -> Input:
    return Input(
        role,
        found.digest,
        path=work / artifacts.FOLDER,
        step=found.step,
        stage=found.stage,
        fingerprint=found.fingerprint,
        contract=found.contract,
    )


def _artifact(run: Run, step: str, fingerprint: str | None) -> Input | None:
    """The result of a step: of this fingerprint, or the latest one; None where it is gone."""
    work = run.step_dir(step, fingerprint) if fingerprint else run.latest(step)
    if work is None or not (work / manifest.NAME).is_file():
        return None
    return _item(step, work, manifest.read(work))


def _input(run: Run, role: str, read: InputRecord | None) -> Input | None:
    """What a step read, where it is now: a run may have been moved since."""
    if read is None:
        return None
    if read.step and read.fingerprint:
        return _artifact(run, read.step, read.fingerprint)
    return Input(role, read.digest, sources=read.sources) if read.sources else None


def _name_of(read: InputRecord | None, names: dict[tuple[str, str], str]) -> str | None:
    if read is None:
        return None
    if read.step:
        return names.get((read.step, read.fingerprint or ""))
    return "base" if read.sources else None
