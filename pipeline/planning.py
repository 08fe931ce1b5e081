"""`prefline plan`: what it prints, as lines and as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import planner, planner_tables, runner, sources, workspace
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Shown:
    """lines: for people. row: for scripts."""

    lines: list[str]
    row: dict[str, Any]


def plan_target(
    target: Path, overrides: list[str], flops: float | None, hours: float | None
) -> Shown:
    """The plan of a configuration; of a run also what it took, and the plan is kept beside it."""
    draft = workspace.draft_run(target, overrides)
    sources.check_all(draft.settings)
    runner.say("measuring this machine, some ten seconds")
    found = planner.make_plan(draft.settings)
    shown = planner_tables.lines(found, draft.settings.cost)
    budget = planner.budget_flops(found, flops, hours)
    if budget:
        found["optimum"] = planner.optimum_rows(found, budget)
        shown += ["", *planner_tables.optimum_lines(found, budget, found["optimum"])]
    if target.is_dir():
        run = workspace.open_run(target)
        if not overrides:
            planner.save(run, found)
        done = (s for s in runner.inspect(run) if s.word == "done")
        rows = planner.compare(found, {s.step.name: s.manifest for s in done if s.manifest}, run)
        found["comparison"] = rows
        if rows:
            shown += ["", *planner_tables.comparison_lines(rows)]
    return Shown(shown, found)


def fit_runs(targets: list[Path], flops: float | None) -> Shown:
    """A scaling law from the pretraining of several runs, with a plot beside the first of them."""
    from pipeline import scaling_fit, scaling_plot

    points = [scaling_fit.read_point(workspace.open_run(target)) for target in targets]
    if len({(point.parameters, point.tokens) for point in points}) < scaling_fit.LEAST:
        raise ConfigError(
            f"plan --fit: {len(points)} runs are too few to fit five numbers",
            f"Give at least {scaling_fit.LEAST} runs of different sizes and lengths; configs/sweep.yaml shows"
            " how to make them.",
        )
    fitted = scaling_fit.fit(points)
    plot = targets[0].resolve().parent / "scaling.svg"
    scaling_plot.draw(fitted, plot)
    lines = scaling_fit.lines(fitted, flops)
    return Shown([*lines, "", f"plot: {plot}"], fitted.to_row())
