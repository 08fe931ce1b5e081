"""Model and dataset cards: README.md with the front matter of the Hugging Face hub, from manifests alone.

What nobody has measured is said to be not measured. Names that came from outside are made harmless for
markdown; no text of a model or of a person is in a card.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import yaml

import pipeline
from pipeline.manifest import show
from pipeline.pedigree import (
    BIAS,
    HALLUCINATION,
    Made,
    Row,
    base_model,
    comparisons,
    cost_rows,
    data_rows,
    figures,
    label_facts,
    last_of,
    views,
    with_words,
)
from pipeline.report_notes import careful_notes
from pipeline.report_plots import finite, number, percent
from pipeline.settings import Settings

# the hub's list of licence ids, as far as models and data sets commonly use it; others go by name
_LICENCES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m afl-3.0"
    " artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause c-uda cc cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0"
    " cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-4.0"
    " cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0"
    " etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c"
    " ms-pl mpl-2.0 odc-by odbl openrail++ ofl-1.1 postgresql ncsa unlicense zlib pddl llama2 llama3 llama3.1"
    " llama3.2 llama3.3 gemma unknown other"
)
HUB_LICENCES = frozenset(_LICENCES.split())
_METHODS = {
    "ppo": "PPO with a critic, against the reward model",
    "grpo": "GRPO, against the reward model",
    "rloo": "RLOO, against the reward model",
    "dpo": "DPO, on the rankings themselves",
    "kto": "KTO, on the rankings themselves",
}
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))


@dataclass(frozen=True)
class Card:
    """What a card is written from; `line` ends with what is exported."""

    name: str
    what: str
    settings: Settings
    line: list[Made]
    evaluation: Made | None
    problem: str | None
    """Why this result is not what the run's settings ask for now, where it was exported anyway."""
    licence: str | None
    input_licences: dict[str, str]
    adapter: Row | None
    """Rank, base and error of an adapter that was taken out of the weights."""

    @property
    def made(self) -> Made:
        return self.line[-1]

    def with_adapter(self, adapter: Row) -> Card:
        return replace(self, adapter=adapter)

    @property
    def sampling(self) -> Row:
        """How the model was sampled where it was trained and judged: generate() then does the same."""
        stage = self.made.manifest.stage
        tried = [(self.made.manifest.settings, stage)]
        if self.evaluation:
            tried.append((self.evaluation.manifest.settings, "evaluate"))
        for settings, section in tried:
            if f"{section}.max_response_tokens" in settings:
                return {
                    "do_sample": True,
                    "temperature": float(settings[f"{section}.temperature"]),
                    "max_new_tokens": settings[f"{section}.max_response_tokens"],
                }
        own = self.settings.evaluate
        return {
            "do_sample": True,
            "temperature": own.temperature,
            "max_new_tokens": own.max_response_tokens,
        }


def model_card(card: Card) -> str:
    """README.md of a model."""
    data = data_rows(card.line, card.input_licences)
    evaluation = card.evaluation.manifest.metrics if card.evaluation else {}
    made = card.made.manifest
    reward = last_of(card.line, "reward_model")
    notes_line = [*card.line, *([card.evaluation] if card.evaluation else [])]
    view = {
        **_common(card, data),
        "method": _METHODS.get(made.stage),
        "base": base_model(data),
        "adapter": card.adapter,
        "parameters": _parameters(card.line),
        "max_length": made.contract.get("max_length"),
        "sampling": card.sampling,
        "labels": label_facts(card.line),
        "reward": reward.manifest.metrics if reward else None,
        "contract": made.contract,
        "evaluation": evaluation,
        "wins": _wins(evaluation),
        "compared": _compared(evaluation),
        "bias": with_words(evaluation, BIAS),
        "hallucination": with_words(evaluation, HALLUCINATION),
        "figures": figures(evaluation),
        "costs": cost_rows(notes_line),
        "energy": any(words.startswith("energy") for words, _ in cost_rows(notes_line)),
        "devices": sorted({str(m.manifest.environment.get("device")) for m in card.line}),
        "notes": careful_notes(card.settings, views(notes_line), comparisons(card.evaluation)),
    }
    return _page("model_card.md.j2", _front_matter(card, view), view)


def dataset_card(card: Card, counts: Row) -> str:
    """README.md of rankings; `counts` says how many rows each file has and what was left out."""
    data = data_rows(card.line, card.input_licences)
    labels = label_facts(card.line)
    assert labels is not None
    pairs = sum(counts["rows"]["pairs"].values())
    by_people = not labels["simulated"]
    front: Row = {
        **_licence(card),
        "pretty_name": f"Rankings of {card.name}",
        "task_categories": ["text-generation"],
        "annotations_creators": ["other" if by_people else "machine-generated"],
        "size_categories": [next((name for most, name in _SIZES if pairs < most), "n>1M")],
        "tags": ["preference", "rlhf", "trl", "prefline"],
        "configs": [
            {
                "config_name": name,
                **({"default": True} if name == "pairs" else {}),
                "data_files": [
                    {"split": split, "path": f"{name}/{split}.parquet"}
                    for split in counts["rows"][name]
                ],
            }
            for name in counts["rows"]
        ],
    }
    view = {**_common(card, data), "labels": labels, "counts": counts, "by_people": by_people}
    return _page("dataset_card.md.j2", front, view)


# ---- views ---------------------------------------------------------------------------------


def _common(card: Card, data: list[Row]) -> Row:
    return {
        "name": card.name,
        "what": card.what,
        "made": card.made.manifest,
        "problem": card.problem,
        "licence": card.licence,
        "data": data,
        "line": [made.manifest for made in card.line],
        "simulated": card.settings.rank.by == "simulated",
        "version": pipeline.__version__,
    }


def _parameters(line: Sequence[Made]) -> float | None:
    for made in reversed(line):
        found = finite({**made.manifest.derived, **made.manifest.metrics}.get("parameters"))
        if found:
            return found
    return None


def _wins(metrics: Row) -> list[tuple[str, float, tuple[float, float] | None]]:
    """Who it was compared with, the win rate, and its interval where there is one."""
    rows = []
    for key, value in metrics.items():
        rate = finite(value)
        if rate is None or not key.startswith("win_rate_vs_"):
            continue
        against = key.removeprefix("win_rate_vs_")
        stem = "win_rate" if against == "sft" else f"win_rate_vs_{against}"
        low, high = finite(metrics.get(f"{stem}_low")), finite(metrics.get(f"{stem}_high"))
        known = (low, high) if low is not None and high is not None else None
        rows.append((against, rate, known))
    return rows


_COMPARED = {
    "perplexity": "perplexity of held-out text",
    "mean_tokens": "tokens a response",
    "eos_rate": "responses that end by themselves",
    "degenerate_rate": "degenerate responses",
    "duplicate_rate": "responses given to another prompt too",
    "distinct_2": "distinct pairs of words",
    "rubric_score": "rubric score",
}


def _compared(metrics: Row) -> list[tuple[str, list[str]]]:
    """Figures that exist of base, sft and policy, side by side."""
    rows = []
    for key, words in _COMPARED.items():
        values = [metrics.get(f"{prefix}{key}") for prefix in ("base_", "sft_", "")]
        if finite(values[-1]) is not None:
            form = percent if key.endswith("_rate") else number
            rows.append((words, [form(value) or "–" for value in values]))
    return rows


# ---- front matter --------------------------------------------------------------------------


def _front_matter(card: Card, view: Row) -> Row:
    """As huggingface_hub.ModelCardData reads it."""
    reward = card.what == "reward"
    stage = card.made.manifest.stage
    front: Row = {
        **_licence(card),
        "library_name": "peft" if card.adapter else "transformers",
        "pipeline_tag": "text-classification" if reward else "text-generation",
        "tags": ["prefline", *(["reward-model"] if reward else ["rlhf", stage])],
    }
    if view["base"]:
        front["base_model"] = view["base"]
    hub = [row for row in view["data"] if row["kinds"] == {"hub"} and row["key"] != "model.base"]
    models = ("reward_models", "gold")
    sets = [n for row in hub if not row["key"].endswith(models) for n in row["names"]]
    if sets:
        front["datasets"] = list(dict.fromkeys(sets))
    metrics = _index_metrics(card, view)
    if metrics:
        front["model-index"] = [
            {
                "name": card.name,
                "results": [
                    {
                        "task": {"type": front["pipeline_tag"]},
                        "dataset": {
                            "type": "held-out",
                            "name": f"held-out {'rankings' if reward else 'prompts'} of the run",
                        },
                        "metrics": metrics,
                    }
                ],
            }
        ]
    return front


def _index_metrics(card: Card, view: Row) -> list[Row]:
    if card.what == "reward":
        accuracy = finite((view["reward"] or {}).get("heldout_accuracy"))
        named = [("accuracy", accuracy, "held-out accuracy on pairs")]
    else:
        judge = view["evaluation"].get("judge")
        named = [
            (f"win_rate_vs_{against}", rate, f"win rate against {against}, judged by {judge}")
            for against, rate, _ in view["wins"]
        ]
    return [
        {"type": key, "value": round(value, 4), "name": name}
        for key, value, name in named
        if value is not None
    ]


def _licence(card: Card) -> Row:
    given = card.licence
    if given is None:
        return {}
    if given.lower() in HUB_LICENCES:
        return {"license": given.lower()}
    return {"license": "other", "license_name": given}


# ---- the page ------------------------------------------------------------------------------


def _page(template: str, front: Row, view: Row) -> str:
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        # a figure that an older manifest lacks is not measured, and no reason to have no card
        undefined=jinja2.Undefined,
        autoescape=False,  # markdown; `safe` below is for what comes from outside
    )
    environment.filters |= {
        "safe": safe,
        "number": lambda value: number(value) or "not measured",
        "percent": lambda value: percent(value) or "not measured",
        "short": lambda digest: str(digest).removeprefix("sha256:")[:12],
        "show": show,
    }
    body = environment.get_template(template).render(view)
    return f"---\n{head}---\n\n{body.strip()}\n"


_MARKDOWN = re.compile(r"([\\`*_\[\]<>#|~$&])")


def safe(text: Any) -> str:
    """A name from outside as plain text of one line: nothing in it is markdown or HTML."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in str(text))
    return _MARKDOWN.sub(r"\\\1", line)
