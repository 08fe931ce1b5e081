"""comparison.html: several runs on one page. What differs, which policy is better, at what price?

Runs that differ by their seed alone are one group, and what is said of a way of training is said of its
group. Policies meet in two ways: each against the sft model of its own run, as its judge saw it; and
each against the other, answer by answer on the prompts that both were asked, where the judge gives the
same score in every run (a rule, the demo's rubric). Two reward models are two scales and never meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from pipeline import report, states, workspace
from pipeline.config import field_paths
from pipeline.manifest import flat_settings, is_hashed
from pipeline.plan import STAGES, plan
from pipeline.records import hash_fraction
from pipeline.report_data import StepView, mapping, read_jsonl, read_step
from pipeline.report_notes import careful_notes
from pipeline.report_plots import Row, Series, chart, finite, interval_bar, points, smooth
from pipeline.report_seeds import Evaluated, over_runs
from pipeline.report_tables import setting_rows
from pipeline.settings import Settings
from pipeline.statistics import mean_with_interval
from pipeline.workspace import Run

FILE = "comparison.html"
SAMPLES = 6
# not hashed, because they say which steps there are; the seed is hashed with every stage
_SHAPE = ("run.policy", "run.rounds", "run.seed")
# judges whose score of a text does not depend on the run
_SAME_SCALE = ("rubric", "the rule ")
_COLOURS = ("blue", "orange", "green", "purple", "gold", "grey")


@dataclass(frozen=True)
class RunView:
    """What the page shows of one run. group: from 0; runs of a group differ by their seed alone."""

    name: str
    group: int
    run: Run
    steps: list[StepView]
    comparisons: list[Row]

    def last(self, stage: str) -> StepView | None:
        """The newest step of a stage that has a result."""
        return next((s for s in reversed(self.steps) if s.stage == stage and s.manifest), None)

    @property
    def metrics(self) -> Row:
        step = self.last("evaluate")
        return step.metrics if step else {}

    @property
    def policy(self) -> StepView | None:
        found = [s for s in self.steps if STAGES[s.stage].kind == "policy" and s.manifest]
        return found[-1] if found else None

    @property
    def colour(self) -> str:
        return _COLOURS[self.group % len(_COLOURS)]


def write_comparison(run_dirs: Sequence[Path], target: Path) -> Path:
    """Write one page about several runs, finished or not; its path.

    Raises:
        ConfigError: one of them is not a run directory.
        ArtifactError: one was made by a newer version.
    """
    views = read_runs([workspace.open_run(path) for path in run_dirs])
    return report.write_page("comparison.html.j2", _view(views), target)


def read_runs(runs: Sequence[Run]) -> list[RunView]:
    """The runs in their order, sorted into groups, under names that differ."""
    names = _names([run.path for run in runs])
    makings: list[Row] = []
    views = []
    for i, run in enumerate(runs):
        making = {key: value for key, value in _values(run).items() if key != "run.seed"}
        if making not in makings:
            makings.append(making)
        steps = [read_step(state) for state in states.inspect(run)]
        judged = [s for s in steps if s.stage == "evaluate" and s.work and s.manifest]
        rows = read_jsonl(judged[-1].work / "artifact" / "comparisons.jsonl") if judged else []  # type: ignore[operator]
        views.append(RunView(names[i], makings.index(making), run, steps, rows))
    return views


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = next(
        (n for n in range(1, 20) if len({path.parts[-n:] for path in paths}) == len(paths)), 20
    )
    return ["/".join(path.parts[-parts:]) for path in paths]


def _values(run: Run) -> Row:
    """Every setting that can change a number of the run's own stages, by its key."""
    plain = {row["key"]: row["value"] for rows in setting_rows(run).values() for row in rows}
    fields = field_paths(Settings)
    used = {
        key
        for step in plan(run.settings)
        for key in flat_settings(run.settings, step.stage.sections)
        if is_hashed(fields[key])
    }
    return {key: plain[key] for key in plain if key in used or key in _SHAPE}


# ---- the policies against each other --------------------------------------------------------


def duel(ours: RunView, theirs: RunView) -> Row | None:
    """How often our policy's answer scored higher than theirs to the same prompt; ties count one half.

    None where their judges have no common scale, or no prompt is in both. The interval is the
    percentile bootstrap over prompts.
    """
    judge = str(ours.metrics.get("judge") or "")
    if judge != theirs.metrics.get("judge") or not judge.startswith(_SAME_SCALE):
        return None
    other = {row.get("prompt"): finite(row.get("score_policy")) for row in theirs.comparisons}
    pairs = [
        (own, score)
        for row in ours.comparisons
        if (own := finite(row.get("score_policy"))) is not None
        and (score := other.get(row.get("prompt"))) is not None
    ]
    if not pairs:
        return None
    wins = mean_with_interval([(a > b) + 0.5 * (a == b) for a, b in pairs], seed=0)
    return {**wins._asdict(), "shown": wins.low > 0.5 or wins.high < 0.5}


# ---- the page -------------------------------------------------------------------------------


def _view(views: list[RunView]) -> Row:
    duels = [[None if a is b else duel(a, b) for b in views] for a in views]
    return {
        "views": views,
        "groups": list(_groups(views)),
        "rows": [_figures(view) for view in views],
        "duels": duels if any(cell for row in duels for cell in row) else None,
        "judges": sorted({str(v.metrics["judge"]) for v in views if v.metrics.get("judge")}),
        "charts": [plot for plot in _charts(views) if plot],
        "samples": _samples(views),
        "settings": _differing_settings(views),
        "inputs": _differing_inputs(views),
        "costs": _costs(views),
        "doubts": list(_doubts(views)),
        "notes": [(v.name, careful_notes(v.run.settings, v.steps, v.comparisons)) for v in views],
    }


def _figures(view: RunView) -> Row:
    """One line of the first table."""
    metrics, reward = view.metrics, view.last("reward")
    rate, low, high = (finite(metrics.get(f"win_rate_{key}")) for key in ("vs_sft", "low", "high"))
    return {
        "view": view,
        "policy": view.run.settings.run.policy,
        "seed": view.run.settings.run.seed,
        "done": sum(s.state == "done" for s in view.steps),
        "rate": rate,
        "bar": None if rate is None else interval_bar(rate, low, high, view.colour),
        "low": low,
        "high": high,
        "kl": finite(metrics.get("kl_nats")),
        "tokens": finite(metrics.get("mean_tokens")),
        "degenerate": finite(metrics.get("degenerate_rate")),
        "perplexity": finite(metrics.get("perplexity")),
        "accuracy": finite(reward.metrics.get("heldout_accuracy")) if reward else None,
        "seconds": sum(finite(s.cost.get("seconds")) or 0.0 for s in view.steps) or None,
    }


def _groups(views: Sequence[RunView]) -> Iterator[Row]:
    """Runs that differ by their seed alone: their judges' figures as one."""
    for number in dict.fromkeys(view.group for view in views):
        members = [view for view in views if view.group == number and view.metrics]
        if len(members) > 1:
            rows = over_runs([Evaluated(view.metrics, view.comparisons) for view in members])
            yield {"names": [view.name for view in members], "rows": rows}


def _charts(views: Sequence[RunView]) -> Iterator[Markup | None]:
    def curves(stage: str | None, y: str, x: str = "step") -> list[Series]:
        found = []
        for i, view in enumerate(views):
            step = view.policy if stage is None else view.last(stage)
            rows = step.rows if step else []
            # no two series differ by colour alone
            look = ("line", "thin", "dotted")[i % 3]
            found.append(Series(view.name, smooth(points(rows, y, x)), view.colour, look))  # type: ignore[arg-type]
        return found

    yield chart(
        "Reward against KL",
        "validation score; upper left is better",
        "KL from the reference, nats per response",
        curves(None, "validation_score", "validation_kl"),
    )
    yield chart("Score in training", "normalised score", "update", curves(None, "score"))
    yield chart("KL from the reference", "nats per response", "update", curves(None, "kl"))
    yield chart("Response length", "tokens, mean", "update", curves(None, "response_tokens"))
    yield chart(
        "Reward model: held-out accuracy",
        "of pairs; a coin has 0.5",
        "step",
        curves("reward", "heldout_accuracy"),
    )
    yield chart("sft: held-out loss", "nats per token", "step", curves("sft", "heldout_loss"))
    yield chart(
        "pretrain: held-out loss", "nats per token", "step", curves("pretrain", "heldout_loss")
    )


def _samples(views: Sequence[RunView]) -> list[Row]:
    """Prompts that every evaluated run has answered, drawn by a hash, so nobody chose them."""
    answered = [view for view in views if view.comparisons]
    if not answered:
        return []
    by_prompt = [{row.get("prompt"): row for row in view.comparisons} for view in answered]
    common = set.intersection(*(set(rows) for rows in by_prompt))
    drawn = sorted(
        (prompt for prompt in common if isinstance(prompt, str)),
        key=lambda prompt: hash_fraction("comparison", prompt),
    )
    return [
        {
            "prompt": prompt,
            "answers": [
                (view.name, rows[prompt].get("policy"), finite(rows[prompt].get("score_policy")))
                for view, rows in zip(answered, by_prompt, strict=True)
            ],
        }
        for prompt in drawn[:SAMPLES]
    ]


def _differing_settings(views: Sequence[RunView]) -> list[Row]:
    values = [_values(view.run) for view in views]
    keys = dict.fromkeys(key for row in values for key in row)
    return [
        {"key": key, "values": [row.get(key, "\u2013") for row in values]}
        for key in keys
        # a setting of a stage that only one of them has is no difference of its own
        if len({row[key] for row in values if key in row}) > 1
    ]


def _differing_inputs(views: Sequence[RunView]) -> list[Row]:
    """What users gave to a step (data, models) that is not the same bytes in every run that has it."""
    digests: dict[tuple[str, str], dict[str, str]] = {}
    for view in views:
        for step in view.steps:
            for role, given in mapping(step.manifest.get("inputs")).items():
                if not mapping(given).get("step"):
                    digest = str(mapping(given).get("digest") or "").removeprefix("sha256:")
                    digests.setdefault((step.name, str(role)), {})[view.name] = digest
    return [
        {"step": step, "role": role, "digests": [found.get(view.name, "") for view in views]}
        for (step, role), found in digests.items()
        if len(set(found.values())) > 1
    ]


def _costs(views: Sequence[RunView]) -> Row:
    """Seconds of each step, and the whole: seconds, tokens, FLOPs, peak memory."""
    names = list(dict.fromkeys(step.name for view in views for step in view.steps))
    seconds = [
        {step.name: finite(step.cost.get("seconds")) for step in view.steps} for view in views
    ]

    def total(key: str) -> list[float | None]:
        found = [[finite(step.cost.get(key)) for step in view.steps] for view in views]
        together = max if key == "peak_memory_bytes" else sum
        return [together([v for v in row if v is not None] or [0.0]) or None for row in found]

    return {
        "rows": [(name, [row.get(name) for row in seconds]) for name in names],
        "seconds": total("seconds"),
        "tokens": total("tokens"),
        "flops": total("flops"),
        "memory": total("peak_memory_bytes"),
    }


def _doubts(views: Sequence[RunView]) -> Iterator[str]:
    """Why the runs may not be comparable."""
    unfinished = [v.name for v in views if any(s.state != "done" for s in v.steps)]
    if unfinished:
        yield f"Not finished, or not current: {', '.join(unfinished)}."
    judges = {str(v.metrics["judge"]) for v in views if v.metrics.get("judge")}
    if len(judges) > 1:
        yield f"They were judged by different judges ({', '.join(sorted(judges))}): the win rates do not compare."
    elif judges == {"reward_model"}:
        yield (
            "Each was judged by a reward model of its own. Their win rates against sft compare only as far"
            " as these judges agree, and their scores do not compare at all."
        )
    prompts = [
        frozenset(str(r.get("prompt")) for r in v.comparisons) for v in views if v.comparisons
    ]
    if len(set(prompts)) > 1:
        yield (
            f"They were evaluated on different prompts; {len(frozenset.intersection(*prompts))} are in all."
        )
    alone = [g for g in {v.group for v in views} if sum(v.group == g for v in views) == 1]
    if alone and len({v.group for v in views}) > 1:
        yield (
            "A way of training that was run with one seed only shows what that seed did. Seeds differ more"
            " than the interval of one run says: run each with at least three."
        )
    sizes = {s.manifest["world_size"] for v in views for s in v.steps if s.manifest}
    if len(sizes) > 1:
        yield f"They ran in different numbers of processes: {', '.join(map(str, sorted(sizes)))}."
