"""`prefline export`: a result of a run as a folder that stands for itself, with its card.

The folder of a model is what plain transformers, `transformers serve`, vLLM and other servers read:

    model.safetensors config.json tokenizer.json tokenizer_config.json chat_template.jinja
    generation_config.json     sampling as the model was trained and judged with
    README.md                  the card (cards.py)
    export.json                what this is: fingerprint, digest, hash of every file

That of rankings is what `datasets.load_dataset` reads. The same results give the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline
from pipeline import artifacts, launch, manifest
from pipeline.cards import Card, dataset_card, model_card
from pipeline.errors import ArtifactError, ConfigError, StageError
from pipeline.files import put_folder, read_json, sha256
from pipeline.pedigree import Made, chain, evaluation_of, shown_source, trained_by_adapters
from pipeline.plan import plan
from pipeline.sources import KEYS, kind
from pipeline.states import inspect
from pipeline.workspace import Run

MARK = "export.json"
README = "README.md"
WHAT = {"policy": "policy", "sft": "model", "reward": "reward_model", "rankings": "rankings"}
"""What can be exported, and the kind of its artifact."""
_HUB = "hub:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# tokenizers write this for "no limit", and servers believe it
_NO_LIMIT = 10**29
# one file of a training artifact that means nothing without the model it was trained on
_NOT_EXPORTED = ("adapter/",)
_BESIDE_ADAPTERS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    what: str = "policy"
    adapter: bool = False
    force: bool = False
    licence: str | None = None
    """Of the export itself, as an id of the hub's list (`apache-2.0`) or in words."""
    input_licences: dict[str, str] | None = None
    """By setting: `sft.data` -> `cc-by-4.0`."""


def parse_licences(given: Iterable[str]) -> tuple[str | None, dict[str, str]]:
    """`apache-2.0` is that of the export, `sft.data=cc-by-4.0` that of an input.

    Raises:
        ConfigError: no such input, or two licences for the export.
    """
    own: str | None = None
    inputs: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            if own:
                raise ConfigError(f"--licence: both {own!r} and {text!r} are given for the export")
            own = text.strip() or None
        elif key not in KEYS or not value.strip():
            raise ConfigError(
                f"--licence {text!r}: {key!r} is no setting that names data or a model",
                f"Known are {', '.join(KEYS)}.",
            )
        else:
            inputs[key] = value.strip()
    return own, inputs


def hub_name(to: str) -> str | None:
    """OWNER/NAME of `hub:OWNER/NAME`; None for a folder.

    Raises:
        ConfigError: not of that form.
    """
    if not to.startswith(_HUB):
        return None
    name = to.removeprefix(_HUB)
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"--to {to}: a repository is named hub:OWNER/NAME")
    return name


# ---- choosing ------------------------------------------------------------------------------


def choose(run: Run, request: Request) -> tuple[Made, str | None]:
    """The result that is meant, and what is wrong with it if `force` lets it pass.

    Raises:
        ConfigError: the line makes no such thing.
        ArtifactError: it is not there, stale or damaged.
    """
    if request.what not in WHAT:
        raise ConfigError(f"--what {request.what}: known are {', '.join(WHAT)}")
    wanted = WHAT[request.what]
    steps = [
        step
        for step in plan(run.settings)
        if step.stage.kind == wanted and (wanted != "model" or step.stage.name == "sft")
    ]
    if not steps:
        raise ConfigError(
            f"{run.path}: this line makes no {request.what.replace('_', ' ')}, so there is none to export"
        )
    name = steps[-1].name
    state = next(state for state in inspect(run) if state.step.name == name)
    work = state.work if state.manifest else run.latest(name)
    if work is None or not (work / manifest.NAME).is_file():
        raise ArtifactError(
            f"{name}: there is nothing to export, it is {state.text}", f"prefline run {run.path}"
        )
    made = Made(work, manifest.read(work))
    problem = None if state.word == "done" else state.text
    # `status` trusts times and sizes; what leaves the house is read byte by byte
    damage = artifacts.find_damage(work, made.manifest, None)
    problem = f"damaged: {damage}" if damage else problem
    if problem and not request.force:
        raise ArtifactError(
            f"{name}: {problem}",
            f"prefline run {run.path} brings it up to date; --force exports the last result as it is,"
            " and the card says so.",
        )
    return made, problem


# ---- building ------------------------------------------------------------------------------


def export_folder(run: Run, to: Path, request: Request) -> Path:
    """Write the export to the folder `to`, whole or not at all.

    Raises:
        ConfigError: `to` holds what is no export of ours, or an export changed since.
        ArtifactError: see `choose`.
    """
    to = Path(os.path.abspath(to.expanduser()))
    check_target(to)
    made, problem = choose(run, request)
    temporary = to.with_name(f".{to.name}.export.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        build(run, made, problem, request, temporary)
        put_folder(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return to


def export_hub(run: Run, name: str, request: Request, public: bool) -> int:
    """Push the export to a repository of the hub; the exit code of the child that does it."""
    made, problem = choose(run, request)
    with tempfile.TemporaryDirectory(prefix="prefline-export-") as parent:
        folder = Path(parent) / "export"
        build(run, made, problem, request, folder)
        sort = "dataset" if request.what == "rankings" else "model"
        visible = "public" if public else "private"
        return launch.call("stages.hub", [str(folder), name, sort, visible])


def build(run: Run, made: Made, problem: str | None, request: Request, folder: Path) -> None:
    """Fill the new folder `folder`."""
    folder.mkdir(parents=True)
    card = Card(
        name=run.settings.run.name,
        what=request.what,
        settings=run.settings,
        line=chain(run, made),
        evaluation=evaluation_of(run, made) if request.what == "policy" else None,
        problem=problem,
        licence=request.licence,
        input_licences=request.input_licences or {},
        adapter=None,
    )
    if request.what == "rankings":
        if request.adapter:
            raise ConfigError("--adapter: rankings have no weights")
        counts = _rankings(made, folder)
        text = dataset_card(card, counts)
    else:
        if request.adapter:
            card = card.with_adapter(_adapter(card, folder))
        else:
            _model(made, card, folder)
        text = model_card(card)
    (folder / README).write_text(text, encoding="utf-8")
    _mark(made, request, folder)


def _model(made: Made, card: Card, folder: Path) -> None:
    """The plain files of the artifact; three of them completed for servers."""
    source = made.work / artifacts.FOLDER
    for file in made.manifest.files:
        if file.path.startswith(_NOT_EXPORTED):
            continue
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / file.path).is_file():
            shutil.copyfile(source / file.path, target)
    # training reads whole rows and keeps no cache; who generates without one waits
    _complete(folder / "config.json", {"use_cache": True})
    if made.manifest.kind != "reward_model":
        _complete(folder / "generation_config.json", {"use_cache": True, **card.sampling})
    limit = made.manifest.contract.get("max_length")
    own = read_json(folder / "tokenizer_config.json")
    if limit and isinstance(own, dict) and (own.get("model_max_length") or _NO_LIMIT) >= _NO_LIMIT:
        _complete(folder / "tokenizer_config.json", {"model_max_length": limit})


def _complete(path: Path, values: dict[str, Any]) -> None:
    held = read_json(path)
    if isinstance(held, dict):
        text = json.dumps({**held, **values}, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _rankings(made: Made, folder: Path) -> dict[str, Any]:
    """Pairs and groups as parquet, by the child that knows how rankings become pairs."""
    source = made.work / artifacts.FOLDER / "rankings.jsonl"
    code = launch.call("labeling_ui.dataset", [str(source), str(folder)])
    counts = read_json(folder / "counts.json")
    if code or not isinstance(counts, dict):
        raise StageError(f"export: the rankings could not be written (exit code {code})")
    (folder / "counts.json").unlink()
    return counts


def _adapter(card: Card, folder: Path) -> dict[str, Any]:
    """What LoRA added to the model below it, as peft reads it; and what the card says of it.

    Raises:
        ConfigError: the model was trained whole, or nobody could load the model below.
    """
    made = card.made.manifest
    if card.what == "reward":
        raise ConfigError("--adapter: of a reward model only the whole can be exported")
    rank, below = trained_by_adapters(card.line)
    if below is None:
        raise ConfigError(
            f"--adapter: {made.step} was trained whole ({made.stage}.lora.rank is 0), so there is no adapter",
            "Leave --adapter out to export the whole model.",
        )
    job: dict[str, Any] = {"rank": rank, "folder": str(folder)}
    job["policy"] = str(card.made.work / artifacts.FOLDER)
    facts: dict[str, Any] = {"rank": rank}
    if below.step:
        base = next(m for m in card.line if m.manifest.fingerprint == below.fingerprint)
        job["base"] = {"path": str(base.work / artifacts.FOLDER)}
        facts["base_words"] = f"the result of step {below.step} of the same run"
        facts["base_example"] = f"path/to/{below.step}"
        facts["base_comment"] = f"prefline export RUN --what {below.step} writes it"
    else:
        source = below.sources[0]
        if kind(source) != "hub" and not Path(source).is_dir():
            raise ConfigError(
                f"--adapter: the model below is the file {Path(source).name}, which adapters cannot be put on",
                "Leave --adapter out to export the whole model.",
            )
        job["base"] = {"sources": [source]}
        facts["base_words"] = facts["base_comment"] = shown_source(source)
        facts["base_example"] = source if kind(source) == "hub" else f"path/to/{Path(source).name}"
    with tempfile.TemporaryDirectory(prefix="prefline-export-") as parent:
        file = Path(parent) / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        code = launch.call("stages.export", [str(file)])
        found = read_json(file.with_suffix(".done"))
    if code or not isinstance(found, dict):
        raise StageError(f"--adapter: no adapter could be made (exit code {code})")
    for name in _BESIDE_ADAPTERS:
        if (card.made.work / artifacts.FOLDER / name).is_file():
            shutil.copyfile(card.made.work / artifacts.FOLDER / name, folder / name)
    return {**facts, **found}


def _mark(made: Made, request: Request, folder: Path) -> None:
    files = {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    row = {
        "export": 1,
        "made_by": f"{pipeline.OWNER} {pipeline.__version__}",
        "what": "adapter" if request.adapter else request.what,
        "step": made.manifest.step,
        "fingerprint": made.manifest.fingerprint,
        "digest": made.manifest.digest,
        "files": files,
    }
    (folder / MARK).write_text(json.dumps(row, indent=1, sort_keys=True) + "\n", encoding="utf-8")


# ---- the target ----------------------------------------------------------------------------


def check_target(to: Path) -> None:
    """Refuse a folder whose content would be lost.

    Raises:
        ConfigError: names what is in the way.
    """
    if not to.parent.is_dir():
        raise ConfigError(f"--to: {to.parent}: no such folder", "Make it first.")
    if not to.exists():
        return
    if not to.is_dir():
        raise ConfigError(f"--to: {to} is a file", "Give the name of a new folder.")
    held = {
        path.relative_to(to).as_posix(): path for path in sorted(to.rglob("*")) if path.is_file()
    }
    if not held and not any(to.iterdir()):
        return
    made_here = read_json(to / MARK)
    files = made_here.get("files") if isinstance(made_here, dict) else None
    if not isinstance(files, dict):
        raise ConfigError(
            f"--to: {to} is not empty and is no export of prefline, so it is not replaced",
            "Give the name of a new folder.",
        )
    for name, path in held.items():
        if name != MARK and files.get(name) != sha256(path):
            word = "was changed since" if name in files else "does not belong to"
            raise ConfigError(
                f"--to: {to} is not replaced: {name} {word} the export",
                "Move it away, or give the name of a new folder.",
            )
