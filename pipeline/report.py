"""RUN/report.html: one page about one run. Did the feedback work, what happened, what did it cost?

The page is one file: no script, no request, inline CSS and SVG. Everything that a model, a data set or a
person wrote is hostile: jinja2 escapes it, control and direction characters are shown as their numbers,
and the page's own policy (CSP) forbids every script, request and foreign style.
It holds no clock of its own: the same run directory gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline import ledger, states, workspace
from pipeline.files import write_atomic
from pipeline.plan import STAGES
from pipeline.report_behaviour import behaviour
from pipeline.report_charts import score_histograms, training_charts
from pipeline.report_costs import cost_rows, plan_rows
from pipeline.report_data import (
    StepView,
    chosen_samples,
    read_jsonl,
    read_step,
    texts,
)
from pipeline.report_failures import failures
from pipeline.report_frontier import frontier_views
from pipeline.report_judges import TITLES, judge_tables
from pipeline.report_notes import careful_notes
from pipeline.report_plots import Row, finite, number, percent, win_bar
from pipeline.report_reward import reward_view
from pipeline.report_tables import (
    annotator_rows,
    environment_rows,
    lineage_row,
    quality_rows,
    setting_rows,
)
from pipeline.report_tokens import token_views
from pipeline.workspace import Run

LONGEST_TEXT = 4000
# C0, C1, zero-width and direction overrides: they can hide or reorder what a reader sees
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from what is on disk, finished or not; the path of the page.

    Raises:
        ConfigError: `run_dir` is not a run directory.
        ArtifactError: it was made by a newer version.
    """
    run = workspace.open_run(run_dir)
    steps = [read_step(state) for state in states.inspect(run)]
    return write_page("report.html.j2", _view(run, steps), run_dir / workspace.REPORT_FILE)


def write_page(template: str, view: Row, target: Path) -> Path:
    """Fill a template of this folder; the path of the page."""
    page = _environment().get_template(template).render(view)
    # a broken character (lone surrogate) of a model's text must not cost the whole page
    text = page.encode("utf-8", errors="backslashreplace").decode("utf-8")
    write_atomic(target, text, durable=False)
    return target


def _view(run: Run, steps: list[StepView]) -> Row:
    """Everything that the template shows."""
    settings = run.settings
    judged = [
        s
        for s in steps
        if s.stage == "evaluate" and finite(s.metrics.get("win_rate_vs_sft")) is not None
    ]
    last = judged[-1] if judged else None
    comparisons = (
        read_jsonl(last.work / "artifact" / "comparisons.jsonl") if last and last.work else []
    )
    shaded = (
        token_views(read_jsonl(last.work / "artifact" / "tokens.jsonl"), visible)
        if last and last.work
        else {}
    )
    finished = [str(s.manifest["finished"]) for s in steps if s.manifest.get("finished")]
    return {
        "name": settings.run.name,
        "until": max(finished, default=None),
        "done": sum(s.state == "done" for s in steps),
        "steps": steps,
        "rounds": [
            (
                "The model"
                if not any(s.stage == "rank" for s in group)
                else f"Round {group[0].round}",
                group,
            )
            for group in _groups(steps)
        ],
        "verdict": verdict(last, comparisons, several=settings.run.rounds > 1),
        "judged_reward": next(
            (
                s.metrics
                for s in steps
                if s.stage == "reward" and (last is None or s.round == last.round)
            ),
            {},
        ),
        "wins": [(s.round, *_interval(s.metrics), win_bar(*_interval(s.metrics))) for s in judged],
        "failures": failures(run, steps),
        "notes": careful_notes(settings, steps, comparisons),
        "learning": _learning(steps),
        "frontiers": frontier_views(steps),
        "rank_steps": [(s, annotator_rows(s)) for s in steps if s.stage == "rank" and s.manifest],
        "reward_steps": [s for s in steps if s.stage == "reward" and s.manifest],
        "reward_view": reward_view,
        "histograms": score_histograms(steps, comparisons),
        "samples": chosen_samples(comparisons),
        "shaded": shaded,
        "qualities": quality_rows(last),
        "behaviour": behaviour(last),
        "judges": judge_tables(last),
        "costs": cost_rows(steps, settings.cost),
        "planned": plan_rows(run, steps),
        "settings": setting_rows(run),
        "lineage": [lineage_row(step) for step in steps],
        "environments": environment_rows(steps),
    }


def _groups(steps: list[StepView]) -> list[list[StepView]]:
    """The model's own steps first, then one group per round, for the picture of the line."""
    own = [s for s in steps if s.stage in ("tokenizer", "pretrain", "sft")]
    rounds = sorted({s.round for s in steps if s not in own})
    return [
        g
        for g in [own, *([s for s in steps if s not in own and s.round == r] for r in rounds)]
        if g
    ]


def _interval(metrics: Row) -> tuple[float, float | None, float | None]:
    rate = finite(metrics.get("win_rate_vs_sft"))
    assert rate is not None
    return rate, finite(metrics.get("win_rate_low")), finite(metrics.get("win_rate_high"))


def _learning(steps: list[StepView]) -> list[Row]:
    """Plots in blocks: the short steps between two policies share one, each policy has its own."""
    blocks: list[Row] = []
    for step in steps:
        charts = training_charts(step)
        if not charts:
            continue
        if not blocks or _makes_policy(step) or _makes_policy(blocks[-1]["last"]):
            blocks.append({"names": [], "charts": [], "written": []})
        blocks[-1]["last"] = step
        blocks[-1]["names"].append(step.name)
        blocks[-1]["charts"] += charts
        if written := texts(step):
            blocks[-1]["written"].append((step.name, written))
    return blocks


def _makes_policy(step: StepView) -> bool:
    return STAGES[step.stage].kind == "policy"


def verdict(evaluate: StepView | None, comparisons: list[Row], several: bool = False) -> Row:
    """The headline: one word, one sentence, and the numbers below it."""
    if evaluate is None:
        return {
            "word": "Not yet",
            "tone": "open",
            "sentence": "The policy has not been evaluated so far.",
            "counts": {},
            "metrics": {},
        }
    metrics = evaluate.metrics
    rate, low, high = _interval(metrics)
    judge = str(metrics.get("judge") or "an unnamed judge")
    prompts = number(metrics.get("prompts") or len(comparisons) or None)
    where = f"Round {evaluate.round}: on" if several else "On"
    sentence = (
        f"{where} {prompts or 'the'} held-out prompts, {TITLES.get(judge, judge)}"
        f" preferred the policy\u2019s response to the sft model\u2019s in {percent(rate)} of the cases"
    )
    if low is None or high is None:
        word, tone, meaning = "Unclear", "open", "Without an interval nothing follows from it."
    else:
        sentence += f" (95\u202f% interval {percent(low)} to {percent(high)}), ties counted half"
        if low > 0.5:
            word, tone, meaning = (
                "Yes",
                "good",
                "The whole interval lies above 50\u202f%: the feedback worked.",
            )
        elif high < 0.5:
            word, tone, meaning = (
                "No",
                "bad",
                "The whole interval lies below 50\u202f%: the policy got worse.",
            )
        else:
            word, tone, meaning = (
                "Not shown",
                "open",
                "The interval includes 50\u202f%: this may be chance.",
            )
    counts = Counter(str(row.get("winner")) for row in comparisons)
    if comparisons and counts["tie"] == len(comparisons):
        meaning = "Every comparison was a tie: the judge saw no difference at all."
    if evaluate.state != "done":
        tone, meaning = "open", f"{meaning} But this result is not current ({evaluate.state_text})."
    return {
        "word": word,
        "tone": tone,
        "sentence": f"{sentence}. {meaning}",
        "counts": counts,
        "metrics": metrics,
    }


def visible(value: Any) -> Any:
    """What the template prints: nothing as a dash, unseen characters by their number."""
    if value is None:
        return "\u2013"
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _UNSEEN.sub(
        lambda match: f"\u27e8U+{ord(match[0]):04X}\u27e9", value.replace("\r\n", "\n")
    )


def duration(seconds: Any) -> str | None:
    seconds = finite(seconds)
    if seconds is None:
        return None
    if seconds < 60:
        return f"{number(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def big(value: Any, unit: str = "") -> str | None:
    """1234567 -> 1.23 M; with a unit, 1.23 MFLOP."""
    value = finite(value)
    return ledger.big(value, unit) if value else None


def _environment() -> jinja2.Environment:
    """How a page is made from a template of this folder."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def sha256(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    found.globals["LONGEST_TEXT"] = LONGEST_TEXT
    found.filters |= {
        "number": number,
        "percent": percent,
        "duration": duration,
        "big": big,
        "sha256": sha256,
    }
    return found
