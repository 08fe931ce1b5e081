"""Which prompts to label next: what 100 random labels and then chosen ones are worth to a reward model.

    python -m tests.learning.labels OUT RUN [RUN ...] [--repeats 2] [--labels 100 200 400]

RUN: finished runs of configs/demo.yaml, of different seeds; they are read only. Of the prompts of each, some
are kept to measure with and ranked by the hidden rubric without an annotator's error; the others are
candidates, whose labels are the run's own. Every way begins with the same random labels and reward model, and
a reward model is trained from sft, by the reward stage, whenever labels were added. A repeat has other
measured prompts, other first labels and another seed. What is there already (OUT/results.jsonl, a line for
each reward model) is not done again; the table compares with random within a run and repeat.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from labeling_ui.simulate import noisy_ranks
from pipeline.config import load_settings
from pipeline.job import Input, Job, Out
from pipeline.records import (
    Prompt,
    Ranking,
    Response,
    SampleGroup,
    content_id,
    read_jsonl,
    write_jsonl,
)
from pipeline.settings import Settings
from stages import reward
from stages.common import start
from stages.models import load_tokenizer
from stages.selection import priorities, select
from tests.learning.policies import interval

WAYS = ("random", "disagreement", "margin")
_RANDOM_SHARE = 0.3


class World(NamedTuple):
    """One repeat of one run. labels: of the candidates, by prompt; measured: without error."""

    name: str
    model: Input
    settings: Settings
    labels: dict[str, Ranking]
    measured: list[Ranking]


def world(run: Path, repeat: int, measured: int, heads: int) -> World:
    """The labels of a run, divided for this repeat."""
    settings = load_settings(Settings, run / "config.yaml")
    # no checkpoints and no measuring before the end
    ends_only = {"eval_every_steps": 10**6, "checkpoint_every_steps": 10**6, "normalise_on": 64}
    changes = {
        "run": settings.run.model_copy(update={"seed": settings.run.seed + 1000 * repeat}),
        "reward": settings.reward.model_copy(update={"heads": heads, **ends_only}),
    }
    rows = read_jsonl(_artifact(run, "rank") / "rankings.jsonl")
    rankings = [replace(Ranking.from_row(row), split="train") for row in rows]
    rankings.sort(key=lambda ranking: content_id("measured", repeat, ranking.prompt_id))
    exact = settings.rank.model_copy(update={"noise": 0.0, "tie_margin": 0.0})
    kept = [
        replace(
            ranking,
            ranks=tuple(
                noisy_ranks(ranking.messages[-1]["content"], ranking.responses, "rubric", exact, 0)
            ),
            split="heldout",
        )
        for ranking in rankings[:measured]
    ]
    return World(
        f"{settings.run.seed}/{repeat}",
        Input("model", "", path=_artifact(run, "sft")),
        settings.model_copy(update=changes),
        {ranking.prompt_id: ranking for ranking in rankings[measured:]},
        kept,
    )


def _artifact(run: Path, step: str) -> Path:
    return run / step / (run / step / "latest").read_text().strip() / "artifact"


def train(own: World, labelled: list[str], work: Path) -> tuple[dict[str, Any], Out]:
    """The reward stage on the labels of these prompts: its metrics, and where its model lies."""
    data = work / "rankings"
    data.mkdir(parents=True)
    rankings = [own.labels[prompt_id] for prompt_id in sorted(labelled)] + own.measured
    write_jsonl(data / "rankings.jsonl", (ranking.to_row() for ranking in rankings))
    inputs = {"model": own.model, "rankings": Input("rankings", "", path=data)}
    out = Out(Job("reward", "reward", "stages.reward", 1, "", work, work, {}, inputs, {}))
    out.artifact.mkdir()
    return reward.run(own.settings, inputs, out), out


def choose(own: World, way: str, labelled: list[str], count: int, out: Out) -> list[str]:
    """The next `count` prompts to label, by the code of the sample stage."""
    left = [ranking for prompt_id, ranking in own.labels.items() if prompt_id not in labelled]
    groups = [SampleGroup(Prompt(r.messages), tuple(map(Response, r.responses))) for r in left]
    ids = [group.prompt.id for group in groups]
    wanted, share = [0.0] * len(ids), 1.0
    if way != "random":
        model = Input("reward_model", "", path=out.artifact)
        accelerator = start(own.settings, out)
        wanted = priorities(way, model, load_tokenizer(own.model), groups, accelerator, out)
        share = _RANDOM_SHARE
    seed = own.settings.run.seed + len(labelled)
    return [ids[i] for i in select(ids, wanted, [False] * len(ids), count, share, seed).chosen]


def study(own: World, ways: list[str], budgets: list[int], results: Path) -> None:
    """Appends a row for each way and number of labels."""
    known = {(row["world"], row["way"], row["labels"]) for row in rows_of(results)}
    with tempfile.TemporaryDirectory() as folder:
        todo = [w for w in ways if not known >= {(own.name, w, labels) for labels in budgets}]
        if not todo:
            return
        first = sorted(own.labels, key=lambda prompt_id: content_id("first", own.name, prompt_id))
        first = first[: budgets[0]]
        begun = train(own, first, Path(folder) / "first")
        for way in todo:
            labelled, (metrics, out) = list(first), begun
            for labels in budgets:
                if labels > len(labelled):
                    labelled += choose(own, way, labelled, labels - len(labelled), out)
                    metrics, out = train(own, labelled, Path(folder) / f"{way}-{labels}")
                keys = ("heldout_accuracy", "kendall_tau", "train_accuracy", "heldout_disagreement")
                row = {"world": own.name, "way": way, "labels": labels}
                row |= {key: metrics[key] for key in (*keys, "disagreement_error_correlation")}
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{own.name} {way} {labels}: {row['heldout_accuracy']:.3f}", flush=True)


def rows_of(results: Path) -> list[dict[str, Any]]:
    """The rows so far, each once."""
    if not results.exists():
        return []
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return list({(row["world"], row["way"], row["labels"]): row for row in rows}.values())


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each way and number of labels: accuracy, its gain over random, and what that is in labels.

    Only worlds in which every way was measured at every number.
    """
    found = {(row["world"], row["way"], row["labels"]): row["heldout_accuracy"] for row in rows}
    ways = list(dict.fromkeys(row["way"] for row in rows))
    budgets = sorted({row["labels"] for row in rows})
    worlds = [
        world
        for world in dict.fromkeys(row["world"] for row in rows)
        if all((world, way, labels) in found for way in ways for labels in budgets)
    ]
    curve = {n: fmean(found[world, "random", n] for world in worlds) for n in budgets}
    lines = []
    for way in ways:
        for labels in budgets:
            own = [found[world, way, labels] for world in worlds]
            gains = [
                x - found[world, "random", labels] for x, world in zip(own, worlds, strict=True)
            ]
            gain, half = interval(gains)
            line = {"way": way, "labels": labels, "accuracy": fmean(own), "gain": gain}
            line |= {"half": half, "worth": random_labels(curve, fmean(own)), "each": own}
            lines.append(line)
    return lines


def random_labels(curve: dict[int, float], accuracy: float) -> float | None:
    """How many random labels reach this accuracy, on straight lines over log(labels); None beyond."""
    points = sorted(curve.items())
    for (n, low), (more, high) in pairwise(points):
        if low <= accuracy <= high and low < high:
            part = (accuracy - low) / (high - low)
            return math.exp(math.log(n) + part * (math.log(more) - math.log(n)))
    return None


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table of a summary, a line for each way and number of labels."""
    text = ["| labels | chosen by | held-out accuracy | gain over random | as many random labels |"]
    text.append("|--:|---|--:|--:|--:|")
    for line in sorted(lines, key=lambda line: line["labels"]):
        gain = "-" if line["way"] == "random" else f"{line['gain']:+.3f} ± {line['half']:.3f}"
        worth = "outside" if line["worth"] is None else f"{line['worth']:.0f}"
        text.append(
            f"| {line['labels']} | {line['way']} | {line['accuracy']:.3f} | {gain} | {worth} |"
        )
    return "\n".join(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--measured", type=int, default=200, help="prompts to measure with")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    # the runs' own figures are of one thread; two on a busy machine wait for each other
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    for repeat in range(options.repeats):
        for run in options.runs:
            own = world(run, repeat, options.measured, options.heads)
            study(own, options.ways, options.labels, path)
    lines = summary(rows_of(path))
    print(table(lines))
    print(json.dumps(lines))
