"""The report's section on over-optimisation: score and gold over the way from the reference.

Distance is the square root of the KL, as in Gao et al. 2022, arXiv 2210.10760.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from pipeline.files import read_json
from pipeline.report_data import StepView, mapping
from pipeline.report_plots import Mark, Point, Row, Series, chart, finite, number, percent

_GOLD = {
    "reward_model": "a reward model that is not optimised",
    "rule": "a rule that is not optimised",
    "rubric": "the demo\u2019s hidden rubric",
}
_X = "distance from the reference: \u221aKL, \u221anats per response"


def frontier_views(steps: Sequence[StepView]) -> list[Row]:
    """One for each policy step that watched a gold and came to its end."""
    found = [(step, _read(step)) for step in steps]
    return [_view(step, row) for step, row in found if row.get("validations")]


def _read(step: StepView) -> Row:
    row = mapping(read_json(step.work / "frontier.json")) if step.work else {}
    rows = row.get("validations")
    return {**row, "validations": [mapping(r) for r in rows] if isinstance(rows, list) else []}


def _view(step: StepView, row: Row) -> Row:
    peak = mapping(row.get("peak"))
    return {
        "name": step.name,
        "charts": [plot for plot in (_plot(row, "score"), _plot(row, "gold")) if plot],
        "fell": peak.get("fell") is True,
        "sentence": _sentence(row, peak),
        "baseline": _baseline(row),
        "gold": _GOLD.get(str(row.get("gold")), "gold"),
        "gold_accuracy": percent(row.get("gold_accuracy")),
    }


def _plot(row: Row, side: str) -> Markup | None:
    """PPO's validations and the best of n, with the update where gold was highest."""
    best = row.get("best_of_n")
    rows = [mapping(r) for r in best] if isinstance(best, list) else []
    ppo, bars = _curve(row["validations"], side)
    best_of_n, best_bars = _curve(rows, side)
    return chart(
        "What is optimised" if side == "score" else "Gold, which is only watched",
        "score with all penalties" if side == "score" else "mean, with 95 % intervals",
        _X,
        [
            Series(
                f"best of 1 to {number(rows[-1].get('n'))}" if rows else "best of n",
                best_of_n,
                "blue",
                "thin",
                best_bars,
            ),
            Series("PPO, in order of its updates", ppo, "orange", "dotted", bars),
        ],
        _mark(row, side),
    )


def _curve(rows: Sequence[Row], side: str) -> tuple[list[Point], tuple[Point, ...]]:
    spots, bars = [], []
    for row in rows:
        at, low, high = _spot(row, side), finite(row.get("gold_low")), finite(row.get("gold_high"))
        if at is None:
            continue
        spots.append(at)
        if side == "gold" and low is not None and high is not None:
            bars.append((low, high))
    return spots, tuple(bars)


def _spot(row: Row, side: str) -> Point | None:
    kl, value = finite(row.get("kl")), finite(row.get(side))
    # an estimate from few responses can lie below 0
    return None if kl is None or value is None else (math.sqrt(max(0.0, kl)), value)


def _mark(row: Row, side: str) -> Mark | None:
    update = finite(mapping(row.get("peak")).get("update"))
    at = next((r for r in row["validations"] if finite(r.get("update")) == update), None)
    spot = _spot(at, side) if at is not None and update is not None else None
    return Mark(*spot, f"update {number(update)}") if spot else None


def _sentence(row: Row, peak: Row) -> str:
    update, low, high = (number(peak.get(key)) for key in ("update", "update_low", "update_high"))
    if update is None:
        return "Where gold was highest is not known."
    first = f"Gold was highest at update {update} (95\u202f% interval {low} to {high})"
    last = number(max((finite(r.get("update")) or 0.0 for r in row["validations"]), default=0.0))
    if peak.get("fell") is True:
        text = (
            f"{first}. From there to update {last} it fell by {number(peak.get('drop'))}"
            f" ({number(peak.get('drop_low'))} to {number(peak.get('drop_high'))}) while the score rose by"
            f" {number(peak.get('proxy_gain'))}: beyond the ring the policy learned what pleases the reward"
            " and not what it stands for."
        )
    elif update == last:
        text = f"{first}, the last one: nothing says yet that optimising went too far."
    else:
        text = f"{first}; that it fell until update {last} is not shown."
    kept = number(row.get("kept_update"))
    if row.get("keep") == "best_gold":
        return f"{text} The policy of update {kept} is published (ppo.keep: best_gold)."
    if kept == update:
        return f"{text} The policy of that update is published."
    return (
        f"{text} Published is that of update {kept}, of the best validation reward;"
        " ppo.keep=best_gold publishes the one of the ring."
    )


def _baseline(row: Row) -> str | None:
    """Whether PPO beats what needs no training, where the two can be compared."""
    best = row.get("best_of_n")
    update = row.get("kept_update")
    kept = next((r for r in row["validations"] if r.get("update") == update), None)
    own, kl, low, high = (
        finite((kept or {}).get(key)) for key in ("gold", "kl", "gold_low", "gold_high")
    )
    # update 0 is the reference itself, the best of one
    if not isinstance(best, list) or not best or own is None or kl is None or not update:
        return None

    def compared_with(other: float | None) -> str:
        if other is not None and low is not None and low > other:
            return "more than"
        if other is not None and high is not None and high < other:
            return "less than"
        return "about as much as"

    said = f"{number(own)} ({number(low)} to {number(high)})"
    same = finite(row.get("best_of_n_gold_at_kept_kl"))
    if same is not None:
        return (
            f"The published policy has gold {said}, {compared_with(same)} the best of n at the same KL of"
            f" {number(max(0.0, kl))} nats ({number(same)})."
        )
    end = mapping(best[-1])
    return (
        f"The published policy, {number(kl)} nats away, has gold {said},"
        f" {compared_with(finite(end.get('gold')))} the best of {number(end.get('n'))}"
        f" ({number(end.get('gold'))}), which is at most {number(end.get('kl'))} nats away and needs no training."
    )
