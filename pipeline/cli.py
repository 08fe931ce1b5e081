"""The command `prefline`: parse, call, print. Results go to stdout, progress to stderr."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import pipeline
from pipeline import crashes
from pipeline.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    ArtifactError,
    ConfigError,
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

Target = Annotated[
    Path, typer.Argument(metavar="CONFIG|RUN", help="A configuration (.yaml) or a run directory.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, as runs/demo.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, as ppo.kl_coef=0.1."),
]
Wait = Annotated[
    bool | None,
    typer.Option(
        "--wait/--no-wait",
        help="Wait until people have ranked enough, or end with exit code 3. Default: wait in a"
        " terminal.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]


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


# ---- looking -------------------------------------------------------------------------------


@app.command()
def status(target: RunDir, as_json: Json = False) -> None:
    """Show the state of every step.

    Example:  prefline status runs/demo
    """
    from pipeline import runner, tables, workspace

    opened = workspace.open_run(target)
    states = runner.inspect(opened)
    if as_json:
        rows = [state.to_row() for state in states]
        print(json.dumps({"run": str(opened.path), "steps": rows}, indent=1))
        return
    for line in tables.status_lines(states):
        print(line)


@app.command()
def verify(target: RunDir) -> None:
    """Read every byte of every artifact again and compare it with its manifest.

    Example:  prefline verify runs/demo
    """
    from pipeline import artifacts, lineage, workspace

    opened = workspace.open_run(target)
    damaged = 0
    found = lineage.all_manifests(opened)
    for work, made in found.items():
        damage = artifacts.find_damage(work, made, None)
        damaged += damage is not None
        name = work.relative_to(opened.path)
        print(f"{name}: {f'damaged: {damage}' if damage else f'ok, {len(made.files)} files'}")
    if damaged:
        raise ArtifactError(
            f"{damaged} of {len(found)} artifacts are damaged",
            "Restore the files, or remove the step's directory and run again.",
        )


@app.command()
def lineage(
    target: RunDir,
    label: Annotated[
        str | None, typer.Option(metavar="ID", help="A ranking: show all that it has touched.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what the last policy was made from, or all that one label has touched.

    Example:  prefline lineage runs/demo --label 3f9a1c
    """
    from pipeline import lineage as lines
    from pipeline import workspace

    opened = workspace.open_run(target)
    if label:
        reached = lines.forward(opened, label)
        if as_json:
            print(json.dumps(reached, indent=1, ensure_ascii=False))
            return
        row = reached["label"]
        print(f"label {row['id']} by {row['annotator']} (round {row.get('round', '?')})")
        for item in reached["touched"]:
            print(f"  {item['step']}  {item['fingerprint'][:12]}")
        return
    tree = lines.backward(opened)
    print(json.dumps(tree.to_row(), indent=1) if as_json else "\n".join(lines.tree_lines(tree)))


@app.command()
def config(
    target: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG|RUN", help="A configuration or a run directory."),
    ] = None,
    overrides: Overrides = None,
    fields: Annotated[
        bool, typer.Option("--fields", help="List every setting, its default and its meaning.")
    ] = False,
) -> None:
    """Show the resolved settings, and where each value comes from.

    Example:  prefline config configs/demo.yaml ppo.kl_coef=0.1
    """
    from pipeline import tables, workspace

    if fields:
        print("\n".join(tables.field_lines()))
        return
    if target is None:
        raise ConfigError("config: give a configuration or a run directory, or --fields")
    drafted = workspace.draft_run(target, overrides or ())
    print(workspace.config_text(drafted.settings, drafted.origins), end="")


@app.command()
def report(
    targets: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    to: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Where the comparison of several runs goes."),
    ] = Path("comparison.html"),
) -> None:
    """Write report.html of each run, a page that works offline; print its path.

    Of several runs also a page that compares them: which is better, what differs, what each cost.

    Example:  prefline report runs/demo
    Example:  prefline report runs/ppo-1 runs/ppo-2 runs/dpo --to ppo-or-dpo.html
    """
    from pipeline import workspace
    from pipeline.report import write_report

    paths = [workspace.open_run(target).path for target in targets]
    for path in paths:
        print(write_report(path))
    if len(set(paths)) > 1:
        from pipeline.report_compare import write_comparison

        print(write_comparison(list(dict.fromkeys(paths)), to))


@app.command()
def export(
    target: RunDir,
    to: Annotated[str, typer.Option(metavar="DIR|hub:OWNER/NAME", help="Where it goes.")],
    what: Annotated[
        str, typer.Option(metavar="policy|sft|reward|rankings", help="What leaves the house.")
    ] = "policy",
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Only what LoRA has added to the base model.")
    ] = False,
    licence: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID|KEY=ID", help="Of the export, or of an input: sft.data=cc-by-4.0."
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="A new repository of the hub is private otherwise.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also a stale or damaged result; the card says so.")
    ] = False,
) -> None:
    """Write the final model, or the rankings, with a card; or push them to the hub (docs/export.md).

    Example:  prefline export runs/demo --to exported --licence apache-2.0
    """
    from pipeline import export as exports
    from pipeline import workspace

    own, inputs = exports.parse_licences(licence or ())
    request = exports.Request(what, adapter, force, own, inputs)
    repository = exports.hub_name(to)
    opened = workspace.open_run(target)
    if repository:
        raise typer.Exit(exports.export_hub(opened, repository, request, public))
    print(exports.export_folder(opened, Path(to), request))


@app.command()
def plan(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|RUN [KEY=VALUE]...",
            help="What to plan, and settings to change; with --fit, run directories.",
        ),
    ],
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit a scaling law to the pretraining of several runs.")
    ] = False,
    flops: Annotated[
        float | None, typer.Option(min=1, help="A budget to find the best model size for.")
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0.001, help="The same, in hours of this machine.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a run will take: parameters, FLOPs, memory, time, money; of a run, what it took.

    Measures this machine for some ten seconds. --fit RUN... fits loss = E + A/N^alpha + B/D^beta to
    runs of different sizes, and says what larger ones would reach.

    Example:  prefline plan configs/demo.yaml ppo.updates=200
    """
    from pipeline import planning

    if fit:
        show = planning.fit_runs([Path(target) for target in targets], flops)
    else:
        show = planning.plan_target(Path(targets[0]), targets[1:], flops, hours)
    print(json.dumps(show.row, indent=1) if as_json else "\n".join(show.lines))


@app.command()
def doctor() -> None:
    """Show versions and devices, and what is missing.

    Example:  prefline doctor
    """
    from pipeline import doctor as checks

    lines, healthy = checks.examine()
    print("\n".join(lines))
    if not healthy:
        raise ToolkitError("something is missing, see above")


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
