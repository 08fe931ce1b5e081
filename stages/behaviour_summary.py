"""The figures of what models do, and the files of rows behind them (see behaviour.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.job import Metrics, Out
from pipeline.records import write_jsonl
from pipeline.settings import Settings
from pipeline.tasks import Task
from stages.answering import Answers
from stages.behaviour import Looks, Seen
from stages.benchmarks import differences, figures
from stages.common import seed_for
from stages.intervals import difference, share
from stages.refusals import LABELS, rates
from stages.response_defects import find_alarms, measures, surprise
from stages.task_data import Item, Row
from stages.toxicity import toxicity_figures


def summarise(
    looks: Looks,
    settings: Settings,
    answers: dict[str, Answers],
    seen: dict[str, Seen],
    metrics: Metrics,
    vocab_size: int,
    out: Out,
) -> Metrics:
    """The figures of all models, with `alarms`; the rows behind them go into files of the artifact.

    metrics: those that evaluate has so far (perplexity, kl_nats, text metrics).
    """
    seed = seed_for(settings.run.seed, "evaluate", "behaviour")
    found: Metrics = {}
    for role, said in answers.items():
        prefix = "" if role == "policy" else f"{role}_"
        found |= {prefix + name: value for name, value in measures(said).items()}
    found["surprise_nats"] = surprise(answers["policy"], metrics["kl_nats"])
    found["alarms"] = find_alarms({**metrics, **found}, vocab_size)
    for alarm in found["alarms"]:
        out.say(f"ALARM {alarm['alarm']}: {alarm['text']}")
    if looks.tasks:
        found["tasks"] = {
            task.name: _task(task, items, seen, seed) for task, items, _ in looks.tasks
        }
    if looks.refusal_prompts:
        found["refusals"] = {role: _refusal_rates(one, seen, seed) for role, one in seen.items()}
    if looks.people_on_refusals:
        found["refusal_annotations"] = looks.people_on_refusals
    if looks.scorer is not None:
        found["toxicity_scorer"] = looks.scorer.name
        found["toxicity"] = {
            role: toxicity_figures([row["toxicity"] for row in one.toxicity], seed)
            for role, one in seen.items()
        }
    if any(one.context for one in seen.values()):
        found["context"] = {role: _context_figures(one) for role, one in seen.items()}
    if out.rank == 0:
        _write(out.artifact, seen)
    return found


def _task(task: Task, items: list[Item], seen: dict[str, Seen], seed: int) -> dict[str, Any]:
    """The figures of each model on a task, and how the policy differs from sft item by item."""
    rows = {role: one.tasks[task.name] for role, one in seen.items()}
    found: dict[str, Any] = {
        "scorer": task.scorer,
        "items": len(items),
        "models": {role: figures(task, items, part, seed) for role, part in rows.items()},
    }
    if "sft" in rows:
        found["policy_minus_sft"] = differences(rows["policy"], rows["sft"], seed)
    cut = {role: sum("reason" in row for row in part) for role, part in rows.items()}
    if any(cut.values()):
        found["too_long"] = cut
    return found


def _refusal_rates(one: Seen, seen: dict[str, Seen], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for group in sorted({row["group"] for row in one.refusals}):
        labels = [row["label"] for row in one.refusals if row["group"] == group]
        found[group] = {"prompts": len(labels), **rates(labels)}
        if "sft" in seen and one is seen.get("policy"):
            other = [row["label"] for row in seen["sft"].refusals if row["group"] == group]
            found[group]["minus_sft"] = {
                label: difference(
                    [float(x == label) for x in labels], [float(x == label) for x in other], seed
                )
                for label in LABELS
            }
    return found


def _context_figures(one: Seen) -> dict[str, Any]:
    """needle_within and needle_past: found needles up to the limit and past it; and what was not read."""
    needles = [row for row in one.context if row["kind"] == "needle"]
    found: dict[str, Any] = {"limit": one.context_limit}
    for name, part in (
        (
            "needle_within",
            [r for r in needles if r["length"] <= (one.context_limit or r["length"])],
        ),
        ("needle_past", [r for r in needles if r["length"] > (one.context_limit or r["length"])]),
    ):
        if part:
            hits = [i < round(r["value"] * r["n"]) for r in part for i in range(r["n"])]
            found[name] = share(hits)
    unread = [f"{row['what']}: {row['why']}" for row in one.context if row["kind"] == "unread"]
    return found | ({"unread": unread} if unread else {})


def _write(folder: Path, seen: dict[str, Seen]) -> None:
    """tasks.jsonl, refusals.jsonl, toxicity.jsonl, context.jsonl: the rows of all models, where any."""
    files: dict[str, list[Row]] = {
        "tasks": [
            {"model": role, "task": name, **row}
            for role, one in seen.items()
            for name, rows in one.tasks.items()
            for row in rows
        ]
    }
    for name in ("refusals", "toxicity", "context"):
        files[name] = [
            {"model": role, **row} for role, one in seen.items() for row in getattr(one, name)
        ]
    for name, rows in files.items():
        if rows:
            write_jsonl(folder / f"{name}.jsonl", rows)
