"""How each annotator works, and what weight that earns them in reward training.

None of it is a verdict: who differs from the others may be the one who reads. The lead decides.

Shapes: N judgements, K responses of one task, Q pairs of responses, T tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from labeling_ui.judgements import (
    Estimate,
    Floats,
    Ints,
    Judgement,
    blocks,
    codes,
    pair_signs,
    ratio,
    sums_by,
    wilson,
)
from pipeline.errors import DataError

PRIOR_ITEMS = 8.0
"""How many gold items the accuracy of all annotators counts for, where one of them is judged."""


@dataclass(frozen=True)
class AnnotatorQuality:
    """One annotator. None where there is nothing to measure it by."""

    annotator: str
    rankings: int
    """Tasks ranked; repeats are in `self_consistency` and nowhere else."""
    skips: int
    gold_accuracy: Estimate | None
    """Share of the gold items' strict pairs that they order the same way, a tie counting one half.
    `count` pairs; `prompts` is the gold items. The interval is Wilson's with an item, not a pair,
    as one trial, because the pairs of an item hang together."""
    agreement: Estimate | None
    """With every other annotator of the same work, over pairs where both prefer one; no gold items."""
    self_consistency: Estimate | None
    """The same between their first and their repeated answer: the ceiling of their agreement."""
    tie_rate: float | None
    """Of all pairs."""
    median_seconds: float | None
    """Active time per ranking."""
    first_place_wins: Estimate | None
    """How often the response shown first is their best; t responses tied best count 1/t each."""
    first_place_chance: float | None
    """What that is where the place does not matter: the mean of 1/K."""

    @property
    def skip_rate(self) -> float:
        return self.skips / max(1, self.rankings + self.skips)


def quality(judgements: Sequence[Judgement], seed: int = 0) -> list[AnnotatorQuality]:
    """Everybody who has ranked or skipped, by name."""
    parts = _parts(judgements)
    prompt_N, _ = codes([found.task.prompt_id for found in judgements])
    rows_of: dict[str, list[int]] = {}
    for row, judgement in enumerate(judgements):
        rows_of.setdefault(judgement.annotator, []).append(row)
    found = []
    for name in sorted(rows_of):
        rows = np.array(rows_of[name])
        own = _Parts(*(part[rows] for part in parts))
        found.append(_one(name, [judgements[row] for row in rows], own, prompt_N[rows], seed))
    return found


# ---- one annotator -------------------------------------------------------------------------


class _Parts(NamedTuple):
    """What each judgement adds to numerator and denominator of a share, each `[N, 2]`."""

    gold: Floats
    agreement: Floats
    repeats: Floats
    ties: Floats
    first_place: Floats


def _one(
    name: str, judgements: Sequence[Judgement], own: _Parts, prompt_N: Ints, seed: int
) -> AnnotatorQuality:
    _, prompt_N = np.unique(prompt_N, return_inverse=True)

    def share(part: Floats) -> Estimate | None:
        return ratio(sums_by(prompt_N, part, int(prompt_N.max()) + 1), seed)

    answers = [found for found in judgements if not found.repeat]
    ranked = [found for found in answers if found.ranks is not None]
    seconds = [found.active_seconds for found in ranked if found.active_seconds is not None]
    chances = [1 / len(found.shown) for found in ranked if found.shown is not None]
    tied, pairs = own.ties.sum(0)
    return AnnotatorQuality(
        annotator=name,
        rankings=len(ranked),
        skips=len(answers) - len(ranked),
        gold_accuracy=_gold_accuracy(own.gold),
        agreement=share(own.agreement),
        self_consistency=share(own.repeats),
        tie_rate=float(tied / pairs) if pairs else None,
        median_seconds=float(np.median(seconds)) if seconds else None,
        first_place_wins=share(own.first_place),
        first_place_chance=float(np.mean(chances)) if chances else None,
    )


def _gold_accuracy(parts: Floats) -> Estimate | None:
    items = int(np.count_nonzero(parts[:, 1]))
    if not items:
        return None
    right, pairs = parts.sum(0)
    low, high = wilson(float(right / pairs), items)
    return Estimate(float(right / pairs), low, high, round(pairs), items)


def _parts(judgements: Sequence[Judgement]) -> _Parts:
    parts = _Parts(*np.zeros((len(_Parts._fields), len(judgements), 2)))
    first_ranks = {
        (found.annotator, found.task.id): found.ranks for found in judgements if not found.repeat
    }
    for rows_N, ranks_NK in blocks(judgements):
        own = [judgements[row] for row in rows_N]
        signs_NQ = pair_signs(ranks_NK)
        repeat_N1 = np.array([[found.repeat] for found in own])
        size = ranks_NK.shape[1]
        gold_NQ = _signs([found.task.gold for found in own], size)
        is_work_N1 = np.array([[found.task.gold is None] for found in own])
        before = [first_ranks.get((f.annotator, f.task.id)) if f.repeat else None for f in own]
        before_NQ = _signs(before, size)
        parts.gold[rows_N] = _part((1 + signs_NQ * gold_NQ) / 2, (gold_NQ != 0) & ~repeat_N1)
        parts.repeats[rows_N] = _part(signs_NQ == before_NQ, signs_NQ * before_NQ != 0)
        parts.ties[rows_N] = _part(signs_NQ == 0, np.broadcast_to(~repeat_N1, signs_NQ.shape))
        voices = signs_NQ * (is_work_N1 & ~repeat_N1)
        parts.agreement[rows_N] = _with_others([found.task.id for found in own], voices)
        parts.first_place[rows_N] = _first_place(own, ranks_NK)
    return parts


def _signs(ranks: Sequence[tuple[int, ...] | None], size: int) -> NDArray[np.int8]:
    """`pair_signs`, with no opinion where there are no ranks."""
    return pair_signs(np.array([found or (0,) * size for found in ranks], dtype=np.int16))


def _part(value_NQ: NDArray[np.generic], counted_NQ: NDArray[np.bool_]) -> Floats:
    return np.stack([(value_NQ * counted_NQ).sum(1), counted_NQ.sum(1)], axis=1).astype(float)


def _with_others(task_ids: Sequence[str], signs_NQ: NDArray[np.int8]) -> Floats:
    """Comparisons with every other ranking of the same task: those that agree, and all."""
    task_N, tasks = codes(task_ids)
    first_NQ = sums_by(task_N, signs_NQ > 0, tasks)[task_N]
    second_NQ = sums_by(task_N, signs_NQ < 0, tasks)[task_N]
    strict_NQ = signs_NQ != 0
    same_NQ = np.where(signs_NQ > 0, first_NQ, second_NQ) - 1  # but not with oneself
    others_NQ = first_NQ + second_NQ - 1
    return np.stack([(same_NQ * strict_NQ).sum(1), (others_NQ * strict_NQ).sum(1)], axis=1)


def _first_place(judgements: Sequence[Judgement], ranks_NK: NDArray[np.int16]) -> Floats:
    """Its share of the best place, and 1 where the shown order of a first answer is known."""
    known_N = np.array([f.shown is not None and not f.repeat for f in judgements])
    place_N = np.array([f.shown[0] if f.shown is not None else 0 for f in judgements])
    best_NK = ranks_NK == ranks_NK.min(1, keepdims=True)
    credit_N = best_NK[np.arange(len(ranks_NK)), place_N] / best_NK.sum(1)
    return np.stack([credit_N * known_N, known_N], axis=1)


# ---- weights -------------------------------------------------------------------------------


def weights_from_gold(
    qualities: Iterable[AnnotatorQuality], prior_items: float = PRIOR_ITEMS
) -> dict[str, float]:
    """`reward.annotator_weights` by gold accuracy: log-odds, 1 for the accuracy of all together.

    Where everybody errs independently and alike on all items (one coin per annotator, a special
    case of Dawid and Skene 1979), the best vote weighs each by log(p / (1 - p)) (Nitzan and Paroush
    1982; bounds in Li and Yu, arXiv 1411.4086). As a weight of a loss it is a heuristic.

    p is shrunken by a Beta prior: its mean is the accuracy of all annotators (with one item right
    and one wrong added), and it counts for `prior_items` gold items. An item is one observation.
    Below chance the weight is 0. Without a gold item it is exactly 1, the typical annotator's.

    Raises:
        DataError: all together are no better than chance, so that no weight is defined.
    """
    assert prior_items > 0, prior_items
    known, pooled = _with_pool(qualities)
    if pooled <= 0.5:
        raise DataError(
            f"annotators order {pooled:.0%} of the gold pairs as the gold answers do, which is"
            " no better than chance",
            "Check the gold answers: 1 is the best rank.",
        )
    typical = log(pooled / (1 - pooled))
    weights = {}
    for found in known:
        p = _shrunken(found, pooled, prior_items)
        weights[found.annotator] = max(0.0, log(p / (1 - p)) / typical)
    return weights


def exclusions_from_gold(
    qualities: Iterable[AnnotatorQuality], below: float, prior_items: float = PRIOR_ITEMS
) -> dict[str, float]:
    """Weight 0 for annotators whose gold accuracy is less than `below`, 1 for all others.

    The accuracy is shrunken as for `weights_from_gold`, so one unlucky item excludes nobody; whoever
    has no gold items stays.
    """
    known, pooled = _with_pool(qualities)
    return {
        found.annotator: float(
            found.gold_accuracy is None or _shrunken(found, pooled, prior_items) >= below
        )
        for found in known
    }


def _with_pool(qualities: Iterable[AnnotatorQuality]) -> tuple[list[AnnotatorQuality], float]:
    """The annotators, and the accuracy of all of them over all their gold items."""
    known = list(qualities)
    gold = [found.gold_accuracy for found in known if found.gold_accuracy is not None]
    right = sum(found.value * found.prompts for found in gold)
    items = sum(found.prompts for found in gold)
    # without any gold item the pool says nothing, and everybody is typical
    return known, (right + 1) / (items + 2) if items else 0.75


def _shrunken(found: AnnotatorQuality, pooled: float, prior_items: float) -> float:
    gold = found.gold_accuracy
    if gold is None:
        return pooled
    return (gold.value * gold.prompts + pooled * prior_items) / (gold.prompts + prior_items)
