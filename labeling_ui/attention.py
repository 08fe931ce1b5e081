"""What a lead should look at first. Hints, no verdicts: each stands only where its whole interval is on
the wrong side, or where enough was counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from labeling_ui.dashboard import Overview, Statistics
from labeling_ui.judgements import Estimate
from labeling_ui.quality import AnnotatorQuality

FEW_ITEMS, FEW_RANKINGS = 5, 20
"""Gold items and rankings below which nothing is said of a person."""
_PLACE_MARGIN, _EARLIER_MARGIN = 0.05, 0.02
_LOW_CONSISTENCY = 0.75
_MANY_TIES, _MANY_SKIPS = 0.7, 0.3
_HURRY = 1 / 3
USUAL_AGREEMENT = (0.65, 0.78)
"""Of people about a strict pair (see agreement.Agreement)."""
_SUSPICIOUS_AGREEMENT = 0.95
_LENGTH_DECIDES = 0.65


@dataclass(frozen=True)
class Hint:
    about: str
    """A name, or `all`."""
    text: str
    """Words and numbers of ours only, without names."""


def hints(found: Overview) -> list[Hint]:
    """The most general first."""
    people = [
        Hint(person.name, text)
        for person in found.counts.people
        if (quality := found.statistics.people.get(person.id)) is not None
        for text in _about(quality, found.statistics)
    ]
    return [Hint("all", text) for text in _about_all(found)] + people


def _about_all(found: Overview) -> Iterator[str]:
    statistics, counts = found.statistics, found.counts
    pairwise = statistics.agreement.pairwise
    if pairwise is not None and pairwise.high < USUAL_AGREEMENT[0]:
        yield (
            f"Annotators agree on {_share(pairwise)} of the pairs; {USUAL_AGREEMENT[0]:.0%} to"
            f" {USUAL_AGREEMENT[1]:.0%} is usual. Are the guidelines clear? Who differs?"
        )
    if pairwise is not None and pairwise.low > _SUSPICIOUS_AGREEMENT:
        yield f"Annotators agree on {_share(pairwise)}: do they work independently?"
    earlier = statistics.position.earlier_wins
    margin = _EARLIER_MARGIN
    if earlier is not None and (earlier.low > 0.5 + margin or earlier.high < 0.5 - margin):
        side = "earlier" if earlier.value > 0.5 else "later"
        share = _share(earlier)
        yield f"The place decides: what is shown earlier wins {share}, so {side} places are favoured."
    if statistics.longer_wins is not None and statistics.longer_wins.low > _LENGTH_DECIDES:
        yield (
            f"The longer response wins {_share(statistics.longer_wins)}: a reward model may learn"
            " length. Are longer ones really better?"
        )
    is_open = [queue for queue in counts.queues if queue.open and queue.tasks]
    if any(queue.gold_rate > 0 for queue in is_open) and not counts.gold_items:
        yield "There is no known answer (gold) yet, so nobody's accuracy can be measured."
    for queue in is_open:
        if queue.frozen and queue.rankings < queue.needed:
            yield f"A queue is frozen with {queue.needed - queue.rankings} rankings missing."


def _about(own: AnnotatorQuality, all_: Statistics) -> Iterator[str]:
    gold, pooled = own.gold_accuracy, _pooled_gold(all_)
    if gold is not None and gold.prompts >= FEW_ITEMS and pooled and gold.high < pooled:
        yield f"orders {_share(gold)} of the known pairs right; all together {pooled:.0%}."
    typical = all_.agreement.pairwise
    if own.rankings >= FEW_RANKINGS:
        if own.agreement is not None and typical is not None and own.agreement.high < typical.low:
            yield f"agrees with the others on {_share(own.agreement)}; all {typical.value:.0%}."
        yield from _place(own)
        yield from _hurry(own, all_)
        if own.tie_rate is not None and own.tie_rate > _MANY_TIES:
            yield f"calls {own.tie_rate:.0%} of all pairs equal."
    same = own.self_consistency
    if same is not None and same.prompts >= FEW_ITEMS and same.high < _LOW_CONSISTENCY:
        yield f"repeats only {_share(same)} of their own choices."
    if own.rankings + own.skips >= FEW_RANKINGS and own.skip_rate > _MANY_SKIPS:
        yield f"skips {own.skip_rate:.0%} of the prompts."


def _place(own: AnnotatorQuality) -> Iterator[str]:
    first, chance = own.first_place_wins, own.first_place_chance
    if first is None or chance is None:
        return
    if first.low > chance + _PLACE_MARGIN or first.high < chance - _PLACE_MARGIN:
        side = "prefers" if first.value > chance else "avoids"
        share = _share(first)
        yield f"{side} what is shown first: best {share} of the time, {chance:.0%} by chance."


def _hurry(own: AnnotatorQuality, all_: Statistics) -> Iterator[str]:
    others = [
        other.median_seconds
        for other in all_.people.values()
        if other.annotator != own.annotator
        and other.median_seconds is not None
        and other.rankings >= FEW_RANKINGS
    ]
    if own.median_seconds is not None and others and own.median_seconds < _HURRY * median(others):
        yield f"takes {own.median_seconds:.0f} s for a prompt; the others {median(others):.0f} s."


def _pooled_gold(all_: Statistics) -> float | None:
    """The accuracy of all over all their gold items."""
    gold = [own.gold_accuracy for own in all_.people.values() if own.gold_accuracy is not None]
    items = sum(found.prompts for found in gold)
    return sum(found.value * found.prompts for found in gold) / items if items else None


def _share(found: Estimate) -> str:
    return f"{found.value:.0%} ({found.low:.0%}–{found.high:.0%})"
