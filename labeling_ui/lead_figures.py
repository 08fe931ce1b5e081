"""Which pictures the lead's page draws, and the words around them."""

from __future__ import annotations

import time
from collections.abc import Callable

from labeling_ui import lead_charts
from labeling_ui.attention import USUAL_AGREEMENT
from labeling_ui.dashboard import Overview, Statistics
from labeling_ui.judgements import Estimate
from labeling_ui.lead_charts import Row
from labeling_ui.quality import AnnotatorQuality

_DAY = 86400.0


def as_of(found: Overview) -> str:
    """When the numbers were made."""
    form = "%H:%M:%S"
    said = f"Numbers of {time.strftime(form, time.gmtime(found.at))} UTC"
    if found.statistics.at < found.at:
        said += f", statistics of {time.strftime(form, time.gmtime(found.statistics.at))}"
    return said


def tiles(found: Overview) -> list[tuple[str, str, str]]:
    """(what, number, a word more)"""
    counts, pairwise = found.counts, found.statistics.agreement.pairwise
    is_open = [queue for queue in counts.queues if queue.open]
    have, need = sum(q.rankings for q in is_open), sum(q.needed for q in is_open)
    size = counts.pace.bucket_seconds
    recent = sum(
        labels
        for start, labels in zip(counts.pace.starts, counts.pace.labels, strict=True)
        if start > found.at - _DAY - size
    )
    median = f"{counts.times.active[2]:.0f} s" if counts.times.active else "–"
    agreement = "–" if pairwise is None else f"{pairwise.value:.0%}"
    interval = (
        "no prompt ranked twice yet"
        if pairwise is None
        else f"{pairwise.low:.0%} to {pairwise.high:.0%}; usual 65% to 78%"
    )
    done = f"{have / need:.0%} of {need:,} wanted" if need else "no open queue"
    return [
        ("Rankings in", f"{have:,}", done),
        ("Prompts finished", f"{sum(q.finished for q in is_open):,}",
         f"of {sum(q.tasks for q in is_open):,}"),
        ("Labels, last day", f"{recent:,}", f"{len(counts.leases)} at work now"),
        ("Median time", median, "active, per prompt"),
        ("Agreement", agreement, interval),
        ("Known answers", f"{counts.gold_items:,}", "in use"),
    ]  # fmt: skip


def agreement(found: Statistics) -> str:
    """Three views of agreement, each with what it means."""
    whole = found.agreement
    basis = (
        f" {whole.tasks} prompts were ranked by two people or more, by {whole.annotators} people."
    )
    return lead_charts.intervals(
        "Pairwise agreement: two people prefer the same of two responses",
        [Row("same choice", whole.pairwise, "comparisons")],
        (0.0, 1.0),
        0.5,
        USUAL_AGREEMENT,
        basis,
    ) + lead_charts.intervals(
        "Corrected for chance: 0 is what random annotators give, 1 is perfect",
        [
            Row("Kendall τ-b", whole.tau, "pairs of rankings"),
            Row("Krippendorff α", whole.alpha, "ranks"),
        ],
        (-0.25, 1.0),
        0.0,
        (0.3, 0.6),
        f"{whole.all_tied} rankings call all responses equal: τ-b is not defined for them."
        if whole.all_tied
        else "",
    )


def biases(found: Statistics) -> str:
    """Do place and length decide?"""
    places = [
        Row(f"place {i}", value, "rankings")
        for i, value in enumerate(found.position.rank_by_place, 1)
    ]
    return (
        lead_charts.intervals(
            "Position: what is shown earlier is preferred",
            [Row("earlier wins", found.position.earlier_wins, "pairs")],
            reference=0.5,
            note="The order is shuffled for each person, so without bias it is one half.",
        )
        + lead_charts.intervals(
            "Mean rank by place: 0 is always best, 1 always worst", places, reference=0.5
        )
        + lead_charts.intervals(
            "Length: the longer response is preferred",
            [Row("longer wins", found.longer_wins, "pairs")],
            reference=0.5,
            note="No fault by itself, longer may be better; far above one half, a reward model can"
            " win by counting.",
        )
    )


def people(found: Overview) -> str:
    """The same measure of everybody, side by side."""
    names = {person.id: person.name for person in found.counts.people}
    own = sorted(found.statistics.people.items(), key=lambda item: -item[1].rankings)

    def rows(of: Callable[[AnnotatorQuality], Estimate | None], unit: str) -> list[Row]:
        return [Row(names.get(key, "?"), of(quality), unit) for key, quality in own]

    first = [
        Row(names.get(key, "?"), quality.first_place_wins, "rankings", quality.first_place_chance)
        for key, quality in own
    ]
    return (
        lead_charts.intervals(
            "Gold accuracy: known pairs ordered right",
            rows(lambda one: one.gold_accuracy, "pairs"),
            reference=0.5,
        )
        + lead_charts.intervals(
            "Agreement with the others", rows(lambda one: one.agreement, "comparisons"),
            reference=0.5, usual=USUAL_AGREEMENT,
        )
        + lead_charts.intervals(
            "Self-consistency: the same choice when asked again",
            rows(lambda one: one.self_consistency, "pairs"),
            reference=0.5,
        )
        + lead_charts.intervals(
            "What is shown first is called best", first,
            note="The dashes are what chance gives for the prompts that this person had.",
        )
    )  # fmt: skip
