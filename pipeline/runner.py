"""Runs what is missing, in order: explains before it spends, skips what is done, stops for people."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.metadata
import platform
import subprocess
import sys
from dataclasses import replace

import pipeline
from pipeline import artifacts, contract, gate, launch, manifest
from pipeline.crew import Crew, Interrupted
from pipeline.errors import (
    ArtifactError,
    ConfigError,
    PeopleNeeded,
    StageError,
    Stopped,
    ToolkitError,
)
from pipeline.job import Job
from pipeline.manifest import InputRecord, Manifest
from pipeline.plan import COMES_WITH, STAGES, Step, plan
from pipeline.settings import Settings
from pipeline.states import Inspector, StepState, inspect
from pipeline.workspace import Run

__all__ = ["StepState", "execute", "explain", "inspect", "select"]

_VERBS = {
    "tokenizer": "train",
    "model": "train",
    "samples": "sample",
    "rankings": "rank",
    "reward_model": "train",
    "policy": "train",
    "answers": "ask the models",
    "judgements": "ask people",
    "evaluation": "evaluate",
}
_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
)


def select(settings: Settings, until: str | None = None, only: str | None = None) -> list[Step]:
    """The steps that a command is about.

    Raises:
        ConfigError: the line has no such step.
    """
    steps = plan(settings)
    wanted = until or only
    if wanted is None:
        return steps
    # people judge in steps of their own, which belong to the command
    with_it = COMES_WITH.get(wanted, ()) if only else ()
    chosen = [
        i
        for i, step in enumerate(steps)
        if wanted in (step.name, step.stage.name) or step.stage.name in with_it
    ]
    if not chosen:
        names = [step.name for step in steps]
        close = difflib.get_close_matches(wanted, [*names, *STAGES], n=1)
        hint = f"This line has the steps {', '.join(names)}."
        if wanted in STAGES:
            raise ConfigError(f"this configuration asks for no {wanted} step", hint)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"there is no step {wanted!r}{meant}", hint)
    if only:
        return [steps[i] for i in chosen]
    # a stage's name means its first round; later ones have names of their own
    return steps[: chosen[0] + 1]


def check_ready(run: Run, only: str) -> None:
    """Refuse a stage alone whose inputs are not done, before the run's configuration is changed.

    Raises:
        ArtifactError: the first of its steps lacks something (those of later rounds may).
    """
    states = {state.step.name: state for state in inspect(run)}
    first = select(run.settings, only=only)[0]
    if states[first.name].word != "done":
        _require_inputs(run, first, states)


def explain(state: StepState) -> str:
    """What would happen to a step, and why, in one line."""
    name = state.step.name
    verb = _VERBS[state.step.stage.kind]
    if state.word == "done":
        return f"{name}: done, nothing to do"
    if state.word == "damaged" or (state.gate and state.gate.closed):
        return f"{name}: {state.text}, will stop here"
    if state.word in ("partial", "running", "failed", "waiting"):
        return f"{name}: {state.text}, will go on"
    text = f"stale ({state.reason})" if state.word == "stale" else state.text
    return f"{name}: {text}, will {verb}"


def dry_run(run: Run, until: str | None = None, only: str | None = None) -> list[str]:
    """The explanation of every step; nothing is started or written."""
    names = {step.name for step in select(run.settings, until, only)}
    return [explain(state) for state in inspect(run) if state.step.name in names]


def execute(run: Run, until: str | None = None, only: str | None = None) -> list[StepState]:
    """Bring the chosen steps up to date; the caller holds the lock of the run.

    Raises:
        PeopleNeeded, Stopped, StageError, ArtifactError: the line ends here, for this reason.
    """
    chosen = {step.name for step in select(run.settings, until, only)}
    inspector = Inspector(run)
    states: dict[str, StepState] = {}
    worked = False
    try:
        with Crew(run.settings.launch, run.jobs) as crew:
            for step in inspector.steps:
                state = inspector.look(step, states)
                if step.name in chosen:
                    # `prefline ppo` with several rounds: as many as have what they need
                    if only and worked and not _ready(step, states):
                        say(f"{step.name}: {_lacks(step, states)}, left for later")
                    else:
                        state = _bring_up_to_date(run, inspector, crew, state, states)
                        worked = True
                states[step.name] = state
                if chosen <= states.keys():
                    break
    finally:
        inspector.cache.save()
    return [state for name, state in states.items() if name in chosen]


def _bring_up_to_date(
    run: Run,
    inspector: Inspector,
    crew: Crew,
    state: StepState,
    states: dict[str, StepState],
) -> StepState:
    """`state` after its step was run, if it had to be."""
    step = state.step
    if state.word == "done":
        assert state.work is not None
        artifacts.point_latest(state.work)
        say(explain(state))
        return state
    if state.word == "damaged":
        assert state.work is not None
        raise ArtifactError(
            f"{step.name}: {state.text} ({state.work / artifacts.FOLDER})",
            f"Restore the file, or remove {state.work} and run again to make the step anew.",
        )
    _require_inputs(run, step, states)
    _check_gate(run, state)
    _check_inputs(inspector, state, states)
    say(explain(state))
    _run_step(run, crew, state)
    return _published(inspector, state, states)


def _published(inspector: Inspector, before: StepState, states: dict[str, StepState]) -> StepState:
    """The state of a step whose child has just said that it is done."""
    assert before.fingerprint is not None
    work = inspector.run.step_dir(before.step.name, before.fingerprint)
    artifacts.remember(work, manifest.read(work), inspector.cache)
    inspector.accept(work)
    state = inspector.look(before.step, states)
    if state.word != "done":
        raise ArtifactError(f"{before.step.name}: finished, but its result is {state.text}")
    return state


def _ready(step: Step, states: dict[str, StepState]) -> bool:
    return all(states[name].word == "done" for name in step.inputs.values())


def _require_inputs(run: Run, step: Step, states: dict[str, StepState]) -> None:
    if not _ready(step, states):
        raise ArtifactError(
            f"{step.name}: {_lacks(step, states)}",
            f"prefline run {run.path} --until {step.name}",
        )


def _lacks(step: Step, states: dict[str, StepState]) -> str:
    lacking = dict.fromkeys(
        f"{name}, which is {states[name].text}"
        for name in step.inputs.values()
        if states[name].word != "done"
    )
    return f"needs the result of {' and of '.join(lacking)}"


def _check_gate(run: Run, state: StepState) -> None:
    found, name = state.gate, state.step.name
    if found is None or not found.reasons:
        return
    if found.closed:
        facts = {"step": name, "fingerprint": state.fingerprint}
        run.record("gate", **facts, reason=found.text)
        raise StageError(f"{name}: {state.text}", gate.HINT)
    say(
        f"WARNING: {name}: reward.gate.force goes on through {found.text.split('; reward.gate')[0]}"
    )


def _check_inputs(inspector: Inspector, state: StepState, states: dict[str, StepState]) -> None:
    """Contracts and bytes of everything that the step is about to read."""
    contract.check_contracts(state.step.name, state.inputs.values())
    for name in dict.fromkeys(state.step.inputs.values()):
        given = states[name]
        assert given.work is not None
        assert given.manifest is not None
        artifacts.verify_before_use(given.work, given.manifest, inspector.cache)


# ---- one step ------------------------------------------------------------------------------


def _run_step(run: Run, crew: Crew, state: StepState) -> None:
    """Run one step in its child, and write the history."""
    job = make_job(run, state)
    facts = {"step": job.step, "fingerprint": job.fingerprint}
    run.record("started", **facts, why=state.text)
    try:
        crew.run(job)
    except PeopleNeeded as error:
        run.record("people", **facts, reason=error.message)
        raise
    except (Stopped, Interrupted) as error:
        run.record("stopped", **facts, reason=error.message)
        raise
    except ToolkitError as error:
        # on a full disk the reason matters more than its record
        with contextlib.suppress(OSError):
            run.record("failed", **facts, reason=error.message, hint=error.hint)
        raise
    run.record("done", **facts)


def make_job(run: Run, state: StepState) -> Job:
    """All that the child needs to know about a step whose inputs are there."""
    step, fingerprint = state.step, state.fingerprint
    assert fingerprint is not None
    # absolute: the child has a current folder of its own
    inputs = {
        role: replace(item, path=item.path.absolute() if item.path else None)
        for role, item in state.inputs.items()
    }
    work = run.step_dir(step.name, fingerprint).absolute()
    return Job(
        step=step.name,
        stage=step.stage.name,
        module=step.stage.module,
        round=step.round,
        fingerprint=fingerprint,
        work=work,
        run_dir=run.path.absolute(),
        settings=run.settings.model_dump(mode="json"),
        inputs=inputs,
        manifest=_draft(run, state).model_dump(mode="json", by_alias=True),
    )


def _draft(run: Run, state: StepState) -> Manifest:
    """The manifest as far as it is known before the work."""
    step, settings = state.step, run.settings
    return Manifest(
        stage=step.stage.name,
        stage_version=step.stage.version,
        kind=step.stage.kind,
        step=step.name,
        round=step.round,
        fingerprint=state.fingerprint or "",
        digest="",
        inputs={
            role: InputRecord(
                digest=item.digest,
                step=item.step,
                stage=item.stage,
                fingerprint=item.fingerprint,
                sources=item.sources,
            )
            for role, item in state.inputs.items()
        },
        settings=manifest.hashed_settings(settings, step.stage),
        derived={"gate": state.gate.to_row()} if state.gate else {},
        unhashed=manifest.unhashed_settings(settings, step.stage),
        seed=settings.run.seed,
        precision=settings.model.precision,
        environment=environment(),
    )


@functools.cache
def environment() -> dict[str, str | bool | None]:
    """Versions and device, as they are recorded in every manifest."""
    found: dict[str, str | bool | None] = {
        "prefline": pipeline.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    devices = launch.gpus()
    found["device"] = ", ".join(name for name, _ in devices) if devices else "cpu"
    found["git"] = _git("rev-parse", "HEAD")
    found["dirty"] = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return found


def _git(*arguments: str) -> str | None:
    """What git says about our own sources; None where they are no checkout."""
    if not (launch.HOME / "pyproject.toml").is_file():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(launch.HOME), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def say(text: str) -> None:
    """A line about progress, on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201
