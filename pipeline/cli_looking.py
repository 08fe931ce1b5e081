"""The commands of `prefline` that train nothing: they look at a run, plan one, or take its result out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_arguments import Json, Overrides, RunDir
from pipeline.errors import ArtifactError, ConfigError, ToolkitError

app = typer.Typer()


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
