"""Several runs that differ in their seed: one figure for all, with what it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.job import win_rate_metric
from pipeline.report_data import mapping
from pipeline.report_judges import compared, judges
from pipeline.report_plots import Row, finite, interval_bar
from pipeline.statistics import over_seeds, over_seeds_and_prompts


class Evaluated(NamedTuple):
    """Of one run: the metrics of its last evaluation, and the rows of comparisons.jsonl."""

    metrics: Row
    comparisons: list[Row]


def over_runs(runs: Sequence[Evaluated], seed: int = 0) -> list[Row]:
    """A row for each judge and two models that all runs have: rates, mean, and two intervals.

    interval: Student's t over the runs, which speaks of other seeds; None below two runs.
    with_prompts: bootstrap over runs and prompts, which speaks of other prompts too.
    """
    rows = []
    for models in compared(runs[0].metrics):
        for judge, title in judges(runs[0].metrics):
            name = win_rate_metric(*models)
            rates = [finite(run.metrics.get(f"judge_{judge}_{name}")) for run in runs]
            found = [rate for rate in rates if rate is not None]
            if len(found) < len(runs):
                continue
            mean, among = over_seeds(found), _outcomes(runs, judge, name)
            both = over_seeds_and_prompts(among[0], seed, among[1]) if among else None
            value = sum(found) / len(found)
            low, high = (mean.low, mean.high) if mean else (None, None)
            rows.append(
                {
                    "judge": title,
                    "models": models,
                    "rates": found,
                    "mean": value,
                    "interval": (low, high) if mean else None,
                    "with_prompts": (both.low, both.high) if both else None,
                    "bar": interval_bar(value, low, high),
                }
            )
    return rows


def _outcomes(
    runs: Sequence[Evaluated], judge: str, name: str
) -> tuple[list[list[float]], bool] | None:
    """The outcomes of every run, and whether they are of the same prompts in the same order; None
    where a run has none."""
    told = [
        [
            finite(mapping(mapping(row.get("outcomes")).get(judge)).get(name))
            for row in run.comparisons
        ]
        for run in runs
    ]
    prompts = [[row.get("prompt") for row in run.comparisons] for run in runs]
    same = all(asked == prompts[0] for asked in prompts)
    if same:
        # what one run could not tell is left out of all: the others stay paired
        whole = [i for i in range(len(told[0])) if all(row[i] is not None for row in told)]
        told = [[row[i] for i in whole] for row in told]
    found = [[outcome for outcome in row if outcome is not None] for row in told]
    return (found, same) if all(found) else None
