"""The command `prefline`: parse, call, print. Results go to stdout, progress to stderr."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import pipeline
from pipeline import cli_looking, crashes
from pipeline.cli_arguments import Overrides, RunDir, Target, Wait
from pipeline.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    PeopleNeeded,
    Stopped,
    ToolkitError,
)

app = typer.Typer(
    name="prefline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A line from raw text to an aligned policy: tokenizer, pretrain, sft, sample, rank, reward,"
    " ppo (or dpo, kto, grpo, rloo), evaluate.\n\nStart with:  prefline run configs/demo.yaml",
)
_POLICIES = ("ppo", "dpo", "kto", "grpo", "rloo")
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

# ---- running -------------------------------------------------------------------------------


@app.command()
def run(
    target: Target,
    overrides: Overrides = None,
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would happen, and do nothing.")
    ] = False,
    wait: Wait = None,
) -> None:
    """Run what is missing, in order; wait for people where they are needed.

    Steps that are done are left alone. A changed setting runs again what depends on it, and says
    why before it spends time.

    Example:  prefline run configs/demo.yaml --until sft sft.lr=2e-3
    """
    _run(target, overrides, until=until, dry_run=dry_run, finish=until is None, wait=wait)


@app.command()
def resume(target: RunDir, wait: Wait = None) -> None:
    """Say what would happen, then continue from the last checkpoint.

    Example:  prefline resume runs/demo
    """
    from pipeline import runner, workspace

    for line in runner.dry_run(workspace.open_run(target)):
        runner.say(line)
    runner.say("")
    _run(target, None, finish=True, wait=wait)


def _run(
    target: Path,
    overrides: Sequence[str] | None,
    *,
    until: str | None = None,
    only: str | None = None,
    dry_run: bool = False,
    finish: bool = False,
    wait: bool | None = None,
) -> None:
    from pipeline import launch, lend, runner, sources, trackers, waiting, workspace

    draft = workspace.draft_run(target, overrides or ())
    runner.select(draft.settings, until, only)
    sources.check_all(draft.settings)
    trackers.check(draft.settings.run.tracker)
    launch.check_profile(draft.settings.launch.profile)
    if dry_run:
        for line in runner.dry_run(draft, until, only):
            print(line)
        return
    if draft.settings.launch.machine_rank:
        lend.lend(draft)
        return
    if only:
        runner.check_ready(draft, only)
    with workspace.writer(draft) as (opened, changes):
        runner.say(f"run {opened.path}")
        for change in changes:
            runner.say(f"changed: {change}")
        work = functools.partial(runner.execute, opened, until, only)
        try:
            if wait if wait is not None else sys.stderr.isatty():
                states = waiting.until_ranked(opened, work, _how_to_rank(opened.path))
            else:
                states = work()
        except PeopleNeeded as error:
            raise PeopleNeeded(error.message, _how_to_rank(opened.path)) from None
        if finish:
            _finish(opened.path, states)


def _how_to_rank(path: Path) -> str:
    return (
        f"Make an account:  prefline users {path} add NAME\n"
        f"       Open the app:     prefline rank {path}\n"
        f"       Then go on:       prefline resume {path}"
    )


def _finish(path: Path, states: Sequence[object]) -> None:
    from pipeline import tables
    from pipeline.report import write_report
    from pipeline.states import StepState

    for line in tables.achieved_lines([s for s in states if isinstance(s, StepState)]):
        print(line)
    print(f"report: {write_report(path)}")


def _add_stage_command(stage: str, text: str) -> None:
    def command(target: Target, overrides: Overrides = None) -> None:
        # to ask for one way of making the policy is to choose it
        chosen = [f"run.policy={stage}"] if stage in _POLICIES else []
        _run(target, [*chosen, *(overrides or ())], only=stage)

    example = f"Example:  prefline {stage} runs/demo"
    command.__doc__ = f"{text}\n\nWhat it reads must be done already.\n\n{example}"
    app.command(stage)(command)


for _stage, _text in {
    "tokenizer": "Train the tokenizer, and nothing else.",
    "pretrain": "Train the language model on text, and nothing else.",
    "sft": "Fine-tune on demonstrations, and nothing else.",
    "sample": "Sample responses to be ranked, and nothing else.",
    "reward": "Train the reward model on the rankings, and nothing else.",
    "ppo": "Optimise the policy with PPO (sets run.policy), and nothing else.",
    "dpo": "Optimise the policy on pairs of the rankings (sets run.policy), and nothing else.",
    "kto": "Optimise the policy on good and bad responses of the rankings (sets run.policy), and nothing else.",
    "grpo": "Optimise the policy with GRPO (sets run.policy), and nothing else.",
    "rloo": "Optimise the policy with RLOO (sets run.policy), and nothing else.",
}.items():
    _add_stage_command(_stage, _text)


@app.command()
def evaluate(
    target: Target,
    overrides: Overrides = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="Then also tasks of the LM Evaluation Harness on the policy, as arc_easy,hellaswag.",
        ),
    ] = None,
) -> None:
    """Compare the policy with sft and base, and nothing else.

    What it reads must be done already.

    Example:  prefline evaluate runs/demo
    """
    from pipeline import harness, workspace

    if lm_eval is not None:
        harness.check_installed()
    _run(target, overrides, only="evaluate")
    if lm_eval is not None:
        opened = workspace.open_run(workspace.draft_run(target, overrides or ()).path)
        for line in harness.lines(harness.evaluate(opened, lm_eval)):
            print(line)


# ---- people --------------------------------------------------------------------------------


@app.command()
def rank(
    target: RunDir,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
) -> None:
    """Serve the ranking app until Ctrl-C.

    Example:  prefline rank runs/demo --port 8000
    """
    from pipeline import launch, workspace

    path = workspace.open_run(target).path
    arguments = [str(path), "--host", host, "--port", str(port)]
    raise typer.Exit(launch.call("labeling_ui.server", arguments))


@app.command(context_settings=_PASS_ON)
def users(context: typer.Context) -> None:
    """Accounts of the ranking app: RUN add NAME, RUN list, RUN disable NAME.

    Example:  prefline users runs/demo add ada --role lead
    """
    _pass_on("labeling_ui.accounts", context.args)


@app.command(context_settings=_PASS_ON)
def labels(context: typer.Context) -> None:
    """Labels in and out: RUN import|queue|export|stats|backup|forget (docs/labels.md).

    Example:  prefline labels runs/demo export --to rankings.jsonl
    """
    _pass_on("labeling_ui.labels", context.args)


def _pass_on(module: str, arguments: list[str]) -> None:
    from pipeline import launch, workspace

    words = list(arguments)
    if words and not words[0].startswith("-"):
        words[0] = str(workspace.open_run(Path(words[0])).path)
    raise typer.Exit(launch.call(module, words or ["--help"]))


# ---- playing -------------------------------------------------------------------------------

Model = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run, a model folder, a GGUF file or a hub id.")
]
Port = Annotated[int, typer.Option(help="Port on 127.0.0.1 to listen on.")]


@app.command()
def chat(target: Model, port: Port = 7861) -> None:
    """Talk to base, sft and the policies side by side, in a browser, until Ctrl-C.

    Example:  prefline chat runs/demo
    """
    _play(target, "chat", port)


@app.command()
def inspect(target: Model, port: Port = 7861) -> None:
    """Look inside a model: tokens, odds, attention, losses, in a browser, until Ctrl-C.

    Example:  prefline inspect runs/demo
    """
    _play(target, "inspect", port)


def _play(target: str, page: str, port: int) -> None:
    from pipeline import launch

    arguments = [target, "--page", page, "--port", str(port)]
    raise typer.Exit(launch.call("labeling_ui.playground", arguments))


app.add_typer(cli_looking.app)


# ---- entry ---------------------------------------------------------------------------------


def check_siblings() -> None:
    """Refuse to work with a foreign package called `stages` or `labeling_ui`.

    The three names are general words; another distribution or the current folder may have them.
    """
    home = Path(pipeline.__file__).resolve().parent.parent
    if getattr(pipeline, "OWNER", None) != "prefline":
        _foreign("pipeline", home, home)
    for name in ("stages", "labeling_ui"):
        spec = importlib.util.find_spec(name)
        place = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if place != home:
            _foreign(name, place, home)


def _foreign(name: str, place: Path | None, home: Path) -> None:
    found = f"belongs to another package (in {place})" if place else "was not found"
    raise ToolkitError(
        f"the name {name!r} {found}. prefline expected it in {home}",
        "Install prefline in an environment of its own.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; every error for people is one message and an exit code."""
    try:
        check_siblings()
        app(args=arguments, prog_name="prefline")
    except ToolkitError as error:
        words = {PeopleNeeded: "waiting", Stopped: "stopped"}
        print(f"{words.get(type(error), 'error')}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # `prefline status RUN | head`: nobody reads on; a flush at exit must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except OSError as problem:
        known = crashes.explain_system(problem)
        print(f"error: {known}", file=sys.stderr, flush=True)
        sys.exit(known.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
