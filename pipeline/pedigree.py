"""What a model card says of where a model comes from: its manifests, in the words and figures of people.

Nothing here is private: of a path only its last part is kept, people appear under their pseudonyms.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import ledger, sources
from pipeline.lineage import all_manifests, label_rows
from pipeline.manifest import InputRecord, Manifest
from pipeline.records import content_id
from pipeline.report_data import StepView, flat, mapping, read_jsonl
from pipeline.report_plots import finite
from pipeline.workspace import Run

Row = dict[str, Any]
# where a later stage or scorer may put such a figure; anything else stands in the table of all figures
BIAS = ("bbq", "crows", "bias", "toxic", "stereotype")
HALLUCINATION = ("truthful", "hallucinat", "mc1", "mc2")
_COSTS = {
    "seconds": "seconds on the clock",
    "busy_seconds": "CPU seconds",
    "tokens": "tokens processed",
    "flops": "FLOPs (counted, not measured)",
    "carbon_grams": "g CO2e",
    "money": "money",
    "human_minutes": "minutes of people",
}


@dataclass(frozen=True)
class Made:
    """A complete result and its directory."""

    work: Path
    manifest: Manifest


def chain(run: Run, last: Made) -> list[Made]:
    """All that `last` was made from, each once and before what reads it; `last` stands at the end."""
    known = {made.fingerprint: Made(work, made) for work, made in all_manifests(run).items()}
    found: dict[str, Made] = {}

    def visit(made: Made) -> None:
        for _, given in sorted(made.manifest.inputs.items()):
            before = known.get(given.fingerprint or "")
            if before and before.manifest.fingerprint not in found:
                visit(before)
        found[made.manifest.fingerprint] = made

    visit(last)
    return list(found.values())


def evaluation_of(run: Run, model: Made) -> Made | None:
    """The last evaluation of just this model; None where there is none."""
    found = [
        Made(work, made)
        for work, made in all_manifests(run).items()
        if made.kind == "evaluation"
        and (given := made.inputs.get("policy"))
        and given.digest == model.manifest.digest
    ]
    return max(found, key=lambda made: made.manifest.finished, default=None)


def last_of(line: Iterable[Made], kind: str) -> Made | None:
    """The result of this kind that was made last, as rounds go."""
    return max(
        (made for made in line if made.manifest.kind == kind),
        key=lambda made: made.manifest.round,
        default=None,
    )


def trained_by_adapters(line: Iterable[Made]) -> tuple[int, InputRecord | None]:
    """Sum of the LoRA ranks that lead to the last result, and the model below the first of them.

    (0, None) where the last result was trained whole.
    """
    known = {made.manifest.fingerprint: made.manifest for made in line}
    at = list(known.values())[-1]
    total, below = 0, None
    while rank := int(at.settings.get(f"{at.stage}.lora.rank") or 0):
        total += rank
        below = at.inputs["model"]
        before = known.get(below.fingerprint or "")
        if before is None:
            break
        at = before
    return total, below


# ---- data ----------------------------------------------------------------------------------


def shown_source(source: str) -> str:
    """A source without the folders that it lies in."""
    return Path(source).name if sources.kind(source) == "path" else source


def data_rows(line: Iterable[Made], licences: dict[str, str]) -> list[Row]:
    """Every source that the user gave: setting, name, hash, licence.

    licences: by setting (`sft.data`), as the user stated them; others are unknown.
    """
    rows: dict[tuple[str, str], Row] = {}
    for made in line:
        for role, given in sorted(made.manifest.inputs.items()):
            if not given.sources:
                continue
            key = _setting(made.manifest, role, given)
            names = [shown_source(source) for source in given.sources]
            kinds = {sources.kind(source) for source in given.sources}
            row = {
                "key": key,
                "names": names,
                "kinds": kinds,
                # the digest of a hub id covers its name only: what the hub served is not known
                "digest": given.digest if kinds != {"hub"} else None,
                "licence": licences.get(key) or ("apache-2.0" if kinds == {"demo"} else None),
            }
            rows.setdefault((key, given.digest), row)
    return list(rows.values())


def _setting(made: Manifest, role: str, given: InputRecord) -> str:
    """The setting that named these sources."""
    # of `model.base` and the like the manifest holds a string
    held = {**made.settings, **made.unhashed}
    wanted = list(given.sources)
    own = sorted(sources.KEYS, key=lambda key: not key.startswith(f"{made.stage}."))
    for key in own:
        value = held.get(key)
        if value is not None and ([value] if isinstance(value, str) else list(value)) == wanted:
            return key
    return f"{made.stage}.{role}"


def base_model(rows: Iterable[Row]) -> str | None:
    """The hub id of the model that the line began with, if that is what it began with."""
    for row in rows:
        if row["key"] == "model.base" and row["kinds"] == {"hub"}:
            return str(row["names"][0])
    return None


# ---- labels --------------------------------------------------------------------------------


def label_facts(line: Iterable[Made]) -> Row | None:
    """How many rankings, by whom, and how far they agree; None where nothing was learned from any."""
    made = last_of(line, "rankings")
    if made is None:
        return None
    rows = label_rows(made.work)
    shown = shown_annotators(rows)
    by: dict[str, int] = {}
    sorts: dict[str, set[str]] = {}
    for row in rows:
        name = shown[str(row["annotator"])]
        by[name] = by.get(name, 0) + 1
        sorts.setdefault(_sort(row), set()).add(name)
    return {
        "made": made,
        "metrics": made.manifest.metrics,
        "rankings": len(rows),
        "by": dict(sorted(by.items(), key=lambda item: (-item[1], item[0]))),
        "sorts": {sort: len(names) for sort, names in sorted(sorts.items())},
        "simulated": set(sorts) == {"simulated"},
    }


def _sort(row: Row) -> str:
    source = str(row.get("source", "?"))
    return {"app": "people"}.get(source, source.partition(":")[0])


def shown_annotators(rows: Iterable[Row]) -> dict[str, str]:
    """Name in a rankings artifact -> name that may leave the house.

    Of people the artifact holds the store's pseudonyms, which stay. A name that came with an import may be
    anybody's and becomes a number.
    """
    sorts: dict[str, str] = {}
    for row in rows:
        sorts[str(row["annotator"])] = _sort(row)
    shown: dict[str, str] = {}
    # in the order of a hash, so that the numbers do not tell the order of the names
    for name in sorted(sorts, key=lambda name: content_id("annotator", name)):
        kept = sorts[name] == "simulated" or name.startswith("p-")
        shown[name] = name if kept else f"import-{len(shown) + 1}"
    return shown


# ---- figures -------------------------------------------------------------------------------


def figures(metrics: Row) -> dict[str, float | str]:
    """Every figure and word of nested metrics, under a dotted name."""
    found: dict[str, float | str] = {}
    for key, value in flat(metrics).items():
        if (figure := finite(value)) is not None:
            found[key] = figure
        elif isinstance(value, str | bool):
            found[key] = str(value)
    return found


def with_words(metrics: Row, words: tuple[str, ...]) -> dict[str, float | str]:
    """The figures whose name holds one of `words`."""
    return {
        key: value
        for key, value in figures(metrics).items()
        if any(word in key.lower() for word in words)
    }


def cost_rows(line: Iterable[Made]) -> list[tuple[str, float]]:
    """What the whole line cost, summed over its results; only what was measured, counted or estimated."""
    total = ledger.total(made.manifest.cost for made in line)
    rows = [(words, total[key]) for key, words in _COSTS.items() if key in total]
    if joules := total.get("energy_joules"):
        rows.append((f"energy in Wh ({ledger.source(total)})", joules / 3600))
    return rows


def views(line: Iterable[Made]) -> list[StepView]:
    """As the report reads them, for its notes."""
    return [
        StepView(
            name=made.manifest.step,
            stage=made.manifest.stage,
            round=made.manifest.round,
            state="done",
            state_text="done",
            work=made.work,
            manifest=made.manifest.model_dump(mode="json", by_alias=True),
            rows=read_jsonl(made.work / "metrics.jsonl"),
        )
        for made in line
    ]


def comparisons(evaluation: Made | None) -> list[Row]:
    """The judged answers of an evaluation."""
    if evaluation is None:
        return []
    return [mapping(row) for row in read_jsonl(evaluation.work / "artifact" / "comparisons.jsonl")]
