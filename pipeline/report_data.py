"""What the report reads from a run directory. Any of it may be absent, unfinished, torn or hostile."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.records import hash_fraction
from pipeline.report_plots import Row, finite, number, percent
from pipeline.states import StepState

RANDOM_SAMPLES, LOST_SAMPLES = 8, 3
# what one box of the line shows: metric, words, whether it is a fraction
KEY_METRICS: dict[str, tuple[tuple[str, str, bool], ...]] = {
    "tokenizer": (("bytes_per_token", "bytes per token", False),),
    "pretrain": (("heldout_loss", "held-out loss", False),),
    "sft": (("heldout_loss", "held-out loss", False),),
    "sample": (("responses", "responses", False),),
    "rank": (("rankings", "rankings", False),),
    "reward": (("heldout_accuracy", "held-out accuracy", True),),
    "ppo": (("validation_reward", "validation reward", False),),
    "dpo": (("heldout_accuracy", "held-out accuracy", True),),
    "kto": (("heldout_accuracy", "held-out accuracy", True),),
    "grpo": (("validation_reward", "validation reward", False),),
    "rloo": (("validation_reward", "validation reward", False),),
    "answers": (("prompts", "prompts answered", False),),
    "judge": (("judgements", "judgements", False),),
    "evaluate": (("win_rate_vs_sft", "wins against sft", True),),
}


@dataclass(frozen=True)
class StepView:
    """What is on disk of one step; `manifest` is empty until there is a result."""

    name: str
    stage: str
    round: int
    state: str
    """The first word of `state_text`: done, running, partial, stale, damaged, waiting, failed, missing."""
    state_text: str
    work: Path | None
    manifest: Row
    rows: list[Row]

    @property
    def metrics(self) -> Row:
        return mapping(self.manifest.get("metrics"))

    @property
    def cost(self) -> Row:
        return mapping(self.manifest.get("cost"))

    @property
    def key_metric(self) -> tuple[str, str] | None:
        for metric, words, fraction in KEY_METRICS.get(self.stage, ()):
            text = (percent if fraction else number)(self.metrics.get(metric))
            if text is not None:
                return text, words
        return None


def read_step(state: StepState) -> StepView:
    """What is on disk of a step in this state; a stale or damaged one shows its last result."""
    made = state.manifest.model_dump(mode="json", by_alias=True) if state.manifest else {}
    begun = state.work is not None and state.work.is_dir()
    return StepView(
        name=state.step.name,
        stage=state.step.stage.name,
        round=state.step.round,
        state=state.word,
        state_text=state.text,
        work=state.work if begun else None,
        manifest=made,
        rows=read_jsonl(state.work / "metrics.jsonl") if begun and state.work else [],
    )


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a file that may be absent, or end in a line torn by a kill."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line) if line else None
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def mapping(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def flat(values: Row, prefix: str = "") -> Row:
    """Nested values under dotted names."""
    found: Row = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def chosen_samples(comparisons: list[Row]) -> list[tuple[str, list[Row]]]:
    """Some drawn by a hash of the prompt, so nobody chose them, then the policy's clearest defeats."""
    whole = [row for row in comparisons if isinstance(row.get("prompt"), str)]
    drawn = sorted(whole, key=lambda row: hash_fraction("report", row["prompt"]))[:RANDOM_SAMPLES]

    def lead(row: Row) -> float:
        return (finite(row.get("score_policy")) or 0.0) - (finite(row.get("score_sft")) or 0.0)

    lost = [
        row for row in sorted(whole, key=lead) if row.get("winner") == "sft" and row not in drawn
    ]
    groups = [
        ("Drawn at random", drawn),
        ("Where the policy lost most clearly", lost[:LOST_SAMPLES]),
    ]
    return [(title, rows) for title, rows in groups if rows]


def texts(step: StepView) -> list[Row]:
    """One prompt followed through training: what the model wrote at the first, some and the last steps."""
    rows = read_jsonl(step.work / "samples.jsonl") if step.work else []
    same = [row for row in rows if row.get("prompt") == rows[0].get("prompt")]
    spots = sorted({round(i * (len(same) - 1) / 4) for i in range(5)}) if same else []
    return [{**same[i], "text": same[i].get("text", same[i].get("response"))} for i in spots]


def rankings_by_annotator(step: StepView) -> list[tuple[str, int]]:
    """Rankings by annotator, counted in the exported files."""
    files = sorted((step.work / "artifact").glob("*.jsonl")) if step.work else []
    counts = Counter(
        str(row["annotator"]) for path in files for row in read_jsonl(path) if "annotator" in row
    )
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:20]
