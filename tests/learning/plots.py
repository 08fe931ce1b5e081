"""The pictures of docs/results.md, drawn from what was measured.

python -m tests.learning.plots policies OUT/results.jsonl docs/images/policies.png
python -m tests.learning.plots sources RUN docs/images/reviews.png lexicon classifier
python -m tests.learning.plots labels OUT/results.jsonl docs/images/labels.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def policies(results: Path, picture: Path) -> None:
    """Win rate against KL: a dot for each seed, a large one for the mean of a variant."""
    rows = rows_of(results)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, name in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        own = [row for row in rows if row["variant"] == name]
        x, y = [row["kl_nats"] for row in own], [row["win_rate_vs_sft"] for row in own]
        color = f"C{number}"
        axes.scatter(x, y, s=14, color=color, alpha=0.6)
        axes.scatter([fmean(x)], [fmean(y)], s=90, color=color, label=name, edgecolor="black")
    axes.axhline(0.5, color="gray", linewidth=1, linestyle=":")
    axes.set_xlabel("KL from sft, nats a response")
    axes.set_ylabel("win rate against sft, hidden rubric")
    axes.legend(fontsize=8)
    _save(figure, picture)


def sources(run: Path, picture: Path, proxy: str, gold: str) -> None:
    """Two sources of one ppo step, what is optimised and what watches: by update, and by KL."""
    artifact = run / "ppo" / (run / "ppo" / "latest").read_text().strip()
    rows = [row for row in rows_of(artifact / "metrics.jsonl") if f"score/{proxy}" in row]
    steps = [row["step"] for row in rows]
    kl = _smooth([row["kl"] for row in rows])
    # each has a scale of its own: they are compared in shape, not in size
    figure, axes = plt.subplots(2, 2, figsize=(9, 5), sharex="col", layout="constrained")
    for (left, right), name, color in zip(axes, (proxy, gold), ("C1", "C0"), strict=True):
        values = _smooth([row[f"score/{name}"] for row in rows])
        left.plot(steps, values, color=color)
        right.plot(kl, values, color=color)
        left.set_ylabel(f"{name}, mean score")
    axes[1, 0].set_xlabel("update")
    axes[1, 1].set_xlabel("KL from sft, nats a response")
    _save(figure, picture)


def labels(results: Path, picture: Path) -> None:
    """Held-out accuracy against the number of labels: a dot for each reward model, a line of means."""
    rows = rows_of(results)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, way in enumerate(dict.fromkeys(row["way"] for row in rows)):
        own = [row for row in rows if row["way"] == way]
        counts = sorted({row["labels"] for row in own})
        # beside each other, not on top of each other
        x = [row["labels"] * 1.02 ** (number - 1) for row in own]
        axes.scatter(
            x, [row["heldout_accuracy"] for row in own], s=14, color=f"C{number}", alpha=0.6
        )
        means = [fmean(r["heldout_accuracy"] for r in own if r["labels"] == n) for n in counts]
        axes.plot(counts, means, color=f"C{number}", marker="o", label=way)
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.set_xlabel("ranked prompts")
    axes.set_ylabel("held-out accuracy, hidden rubric")
    axes.legend(fontsize=8)
    _save(figure, picture)


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean over the last `width` values."""
    return [fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _save(figure: Any, picture: Path) -> None:
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "policies":
        policies(Path(rest[0]), Path(rest[1]))
    elif kind == "labels":
        labels(Path(rest[0]), Path(rest[1]))
    else:
        sources(Path(rest[0]), Path(rest[1]), rest[2], rest[3])
