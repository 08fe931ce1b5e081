"""The costs of the report: what each step took, and what had been predicted."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline import ledger, planner
from pipeline.manifest import Manifest
from pipeline.report_data import StepView
from pipeline.report_plots import Row, finite, share_bar
from pipeline.settings.cost import CostSettings
from pipeline.workspace import Run

# columns that a run may not have
_OPTIONAL = (
    "busy_seconds",
    "utilisation",
    "device_peak_memory_bytes",
    "energy_joules",
    "money",
    "human_minutes",
)


def cost_rows(steps: Iterable[StepView], settings: CostSettings) -> Row:
    """Every result with its cost and its share of the time; their sums; the columns that there are."""
    costs = [
        (step, {key: value for key in step.cost if (value := finite(step.cost[key])) is not None})
        for step in steps
        if step.manifest
    ]
    total = ledger.total(cost for _, cost in costs)
    seconds = total.get("seconds", 0.0)
    rows = [
        (step, cost, share_bar(cost.get("seconds", 0.0) / seconds if seconds else 0.0))
        for step, cost in costs
    ]
    return {
        "rows": rows,
        "total": total,
        "has": {key for key in _OPTIONAL if total.get(key)},
        "currency": settings.currency,
        "energy_source": ledger.source(total),
        "grams_per_kwh": settings.grams_per_kwh,
    }


def plan_rows(run: Run, steps: Iterable[StepView]) -> list[Row]:
    """Predicted and actual, where `prefline plan RUN` was asked; as `planner.compare` gives them."""
    found = planner.saved(run.path)
    if found is None:
        return []
    made = {
        step.name: Manifest.model_validate(step.manifest) for step in steps if step.state == "done"
    }
    try:
        return planner.compare(found, made)
    except (KeyError, TypeError):
        # a file that somebody has changed must not cost the whole page
        return []
