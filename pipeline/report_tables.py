"""The tables of the report: qualities, costs, settings, lineage, environments."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from pipeline.config import field_paths
from pipeline.manifest import defaults
from pipeline.report_data import StepView, flat, mapping, rankings_by_annotator
from pipeline.report_plots import Row, dumbbell, finite, share_bar
from pipeline.settings import Settings
from pipeline.workspace import Run


def annotator_rows(step: StepView) -> list[tuple[str, int, Markup]]:
    counts = rankings_by_annotator(step)
    return [(name, count, share_bar(count / counts[0][1])) for name, count in counts]


def quality_rows(evaluate: StepView | None) -> list[tuple[str, list[float | None], Markup]]:
    if evaluate is None:
        return []
    maps = [mapping(evaluate.metrics.get(f"quality_{who}")) for who in ("base", "sft", "policy")]
    rows = []
    for name in dict.fromkeys(name for found in maps for name in found):
        values = [finite(found.get(name)) for found in maps]
        named = zip(("base", "sft", "policy"), ("grey", "blue", "orange"), values, strict=True)
        rows.append((str(name).replace("_", " "), values, dumbbell(list(named))))
    return rows


def setting_rows(run: Run) -> dict[str, list[Row]]:
    """Every setting by section: its value, its default, who set it, and what it means."""
    values = run.settings.model_dump(mode="json")
    default = defaults()
    sections: dict[str, list[Row]] = {}
    for key, field in field_paths(Settings).items():
        value: Any = values
        for part in key.split("."):
            value = value[part]
        row = {"key": key, "value": _plain(value), "default": _plain(default[key])}
        row |= {"changed": value != default[key], "from": run.origins.get(key, "")}
        row["help"] = field.description
        sections.setdefault(key.split(".")[0], []).append(row)
    return sections


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def lineage_row(step: StepView) -> Row:
    """Where a result came from: steps of this run, or what the user gave."""
    inputs = []
    for role, given in mapping(step.manifest.get("inputs")).items():
        sources = mapping(given).get("sources")
        given_by_user = (
            ", ".join(map(str, sources)) if isinstance(sources, list) and sources else "given"
        )
        inputs.append(
            (role, mapping(given).get("step") or given_by_user, _hex(mapping(given).get("digest")))
        )
    return {
        "step": step.name,
        "done": bool(step.manifest),
        "fingerprint": _hex(step.manifest.get("fingerprint")),
        "digest": _hex(step.manifest.get("digest")),
        "inputs": inputs,
        "finished": step.manifest.get("finished"),
        "resumed_from": step.manifest.get("resumed_from"),
    }


def _hex(value: Any) -> str:
    return str(value or "").removeprefix("sha256:")


def environment_rows(steps: Iterable[StepView]) -> list[tuple[str, Row]]:
    """Each environment once, with the steps that ran in it."""
    found: dict[str, tuple[list[str], Row]] = {}
    for step in steps:
        made_on = flat(mapping(step.manifest.get("environment")))
        if made_on:
            key = json.dumps(made_on, sort_keys=True, default=str)
            found.setdefault(key, ([], made_on))[0].append(step.name)
    return [(", ".join(names), made_on) for names, made_on in found.values()]
