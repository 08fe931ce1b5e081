"""The picture of a fitted scaling law: loss over tokens, a line for each size, and what lies beyond."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.ledger import big
from pipeline.scaling_fit import Fitted

# Okabe and Ito: told apart by people who do not see some colours; markers tell them apart as well
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_AHEAD = 10.0


def draw(fitted: Fitted, path: Path) -> None:
    """Write the picture; the suffix of `path` says how (.svg, .png)."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    sizes = sorted({p.parameters for p in fitted.points})
    first, last = (f(p.tokens for p in fitted.points) for f in (min, max))
    tokens = np.geomspace(first / 1.3, last * _AHEAD, 120)
    for number, size in enumerate(sizes):
        look: dict[str, Any] = {"color": _COLOURS[number % 7]}
        own = sorted((p.tokens, p.loss) for p in fitted.points if p.parameters == size)
        axes.plot(tokens, [fitted.law.loss(size, d) for d in tokens], lw=1.2, **look)
        axes.plot(
            *zip(*own, strict=True), _MARKERS[number % 7], ms=6,
            label=f"{big(size)} parameters", **look,
        )  # fmt: skip
    beyond = sizes[-1] * _AHEAD
    found = np.array([fitted.predict(beyond, d) for d in tokens])
    axes.plot(
        tokens, found[:, 0], "--", color="#555555", lw=1.2,
        label=f"{big(beyond)}, extrapolated (95 %)",
    )  # fmt: skip
    axes.fill_between(tokens, found[:, 1], found[:, 2], color="#555555", alpha=0.15, lw=0)
    axes.axvline(last, color="#999999", lw=0.8, ls=":")
    axes.annotate(
        "runs end here", (last, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -12),
        textcoords="offset points", fontsize=8, color="#666666",
    )  # fmt: skip
    losses = [p.loss for p in fitted.points]
    low, high = min([fitted.law.E, found[:, 0].min()]), max(losses)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.08 * (high - low))
    axes.set_xscale("log")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("held-out loss, nats a token")
    law = fitted.law
    axes.set_title(
        f"L = {law.E:.3g} + {law.A:.3g} / N^{law.alpha:.2f} + {law.B:.3g} / D^{law.beta:.2f}",
        fontsize=10,
    )
    axes.grid(True, which="major", color="#dddddd", lw=0.6)
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    # no date in the file: the same runs give the same bytes
    extra: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 150}
    figure.savefig(path, **extra)
