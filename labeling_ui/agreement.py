"""Do annotators agree, and does the place or the length of a response decide for them?

All functions measure the judgements they are given. Gold items are chosen to be clear, so agreement
on them says little of the work: leave them out. Skips and repeats count in no agreement.

Shapes: N judgements, K responses of one task, Q pairs of responses, T tasks, P prompts, V values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from labeling_ui.judgements import (
    Block,
    Estimate,
    Floats,
    Ints,
    Judgement,
    blocks,
    bootstrap,
    codes,
    pair_signs,
    ratio,
    sums_by,
)


@dataclass(frozen=True)
class Agreement:
    """Three views of the agreement of annotators on the same responses; None without overlap.

    Random annotators give 0.5, 0 and 0; usual for people are 0.65-0.78, 0.3-0.55 and 0.35-0.6
    (labelers of InstructGPT: 0.73, arXiv 2203.02155). Kendall's W is not here: it is not corrected
    for chance (random annotators give 1 / their number).
    """

    pairwise: Estimate | None
    tau: Estimate | None
    alpha: Estimate | None
    tasks: int
    """Tasks that two annotators or more have ranked."""
    annotators: int
    """Annotators who have ranked one of them."""
    all_tied: int
    """Rankings of these that call all responses equal: tau-b is not defined for them."""


@dataclass(frozen=True)
class PositionBias:
    """Whether what is shown earlier wins; the order is shuffled, so without bias it does half the time."""

    earlier_wins: Estimate | None
    """P(the response shown earlier is better), over strict pairs."""
    rank_by_place: tuple[Estimate, ...]
    """Mean rank of what was shown first, second, ...: 0 is best of its task, 1 worst, 0.5 no bias."""


def agreement(judgements: Sequence[Judgement], seed: int = 0) -> Agreement:
    """All three measures, with intervals over prompts."""
    voices = _overlapping(judgements)
    return Agreement(
        pairwise=_pairwise(voices, seed),
        tau=_tau(voices, seed),
        alpha=_ranks_alpha(voices, seed),
        tasks=voices.tasks,
        annotators=voices.annotators,
        all_tied=sum(int((np.ptp(block.ranks_NK, axis=1) == 0).sum()) for block in voices.blocks),
    )


def pairwise_agreement(judgements: Sequence[Judgement], seed: int = 0) -> Estimate | None:
    """How often two annotators prefer the same of two responses, where both prefer one.

    Chance is 0.5. `count` is the number of comparisons. None where there is none.
    """
    return _pairwise(_overlapping(judgements), seed)


def kendall_tau(judgements: Sequence[Judgement], seed: int = 0) -> Estimate | None:
    """Kendall's tau-b of two annotators' rank vectors, the mean over all two of each task.

    tau-b is the cosine of two vectors with a sign for every pair of responses, so the sum over all
    pairs of annotators follows from the sum of their unit vectors. `count` is the number of pairs of
    rankings. Rankings that tie everything have no tau-b and are left out (`Agreement.all_tied`).
    """
    return _tau(_overlapping(judgements), seed)


def ranks_alpha(judgements: Sequence[Judgement], seed: int = 0) -> Estimate | None:
    """Krippendorff's ordinal alpha: units are responses, values their ranks within the task.

    A rank is (mean place among equals - 1/2) / K. So a tie stands in the middle of its places, and
    tasks with 2 and with 9 responses have the same mean rank: with bare numbers, random annotators
    of such a mixture would seem to agree.
    """
    return _ranks_alpha(_overlapping(judgements), seed)


def ordinal_alpha(values_N: Floats, unit_N: Ints, prompt_N: Ints, seed: int = 0) -> Estimate | None:
    """Krippendorff's ordinal alpha of values that several annotators gave to the same units.

    The ordinal difference of two values (Krippendorff 2011, Computing Krippendorff's
    Alpha-Reliability, section E) is the square of how far apart their mean places in the sorted list
    of all values are, so alpha is 1 - mean variance within units / variance of all, of these places.
    Units with one value only are left out. Draws of the bootstrap keep the places of the whole data;
    Krippendorff's own bootstrap fixes all of the expected disagreement.

    Args:
        prompt_N: what is resampled; a unit belongs to one prompt.

    Returns None where no unit has two values, or all values are equal.
    """
    _, unit_N, times_U = np.unique(unit_N, return_inverse=True, return_counts=True)
    paired_N = times_U[unit_N] > 1
    values_N, unit_N, prompt_N = values_N[paired_N], unit_N[paired_N], prompt_N[paired_N]
    if len(np.unique(values_N)) < 2:
        return None
    _, prompt_N = np.unique(prompt_N, return_inverse=True)
    # centred: the variance below is a difference of sums
    place_N = rankdata(values_N) / len(values_N)
    place_N -= place_N.mean()
    mean_U = np.bincount(unit_N, place_N, len(times_U)) / times_U
    times_N = times_U[unit_N]
    within_N = (place_N - mean_U[unit_N]) ** 2 * times_N / (times_N - 1)
    columns = np.stack([within_N, np.ones_like(place_N), place_N, place_N**2], axis=1)
    sums_PC = sums_by(prompt_N, columns, int(prompt_N.max()) + 1)
    return bootstrap(sums_PC, _alpha, len(values_N), seed)


def position_bias(judgements: Sequence[Judgement], seed: int = 0) -> PositionBias:
    """Over all rankings whose shown order is known. About 4900 strict pairs show a bias of 2 points."""
    known = [found for found in judgements if found.shown is not None]
    prompt_N, prompts = codes([found.task.prompt_id for found in known])
    wins_PC = np.zeros((prompts, 2))
    most = max((len(found.ranks) for found in known if found.ranks is not None), default=0)
    places = np.zeros((most, prompts, 2))
    for block in blocks(known):
        shown_NK = np.array([known[row].shown for row in block.rows_N])
        ranks_NK = np.take_along_axis(block.ranks_NK, shown_NK, axis=1)
        prompt = prompt_N[block.rows_N]
        wins_PC += sums_by(prompt, _wins(pair_signs(ranks_NK)), prompts)
        size = ranks_NK.shape[1]
        relative_NK = (rankdata(ranks_NK, axis=1) - 1) / (size - 1)
        for place in range(size):
            column = np.stack([relative_NK[:, place], np.ones(len(prompt))], axis=1)
            places[place] += sums_by(prompt, column, prompts)
    by_place = [ratio(sums_PC, seed) for sums_PC in places]
    return PositionBias(ratio(wins_PC, seed), tuple(found for found in by_place if found))


def length_preference(judgements: Sequence[Judgement], seed: int = 0) -> Estimate | None:
    """P(the longer response is better), over strict pairs of different length. Not a bias by itself:
    longer may be better; far above 0.5 tells that a reward model can win by counting."""
    known = [found for found in judgements if found.task.lengths]
    prompt_N, prompts = codes([found.task.prompt_id for found in known])
    wins_PC = np.zeros((prompts, 2))
    for block in blocks(known):
        lengths_NK = np.array([known[row].task.lengths for row in block.rows_N])
        # the first of a pair has the smaller rank and the larger length: the longer one wins
        signs_NQ = pair_signs(block.ranks_NK) * pair_signs(-lengths_NK)
        wins_PC += sums_by(prompt_N[block.rows_N], _wins(signs_NQ), prompts)
    return ratio(wins_PC, seed)


# ---- parts ---------------------------------------------------------------------------------


class _Voices(NamedTuple):
    """The rankings of tasks that two different annotators or more have ranked."""

    blocks: list[Block]
    task_N: Ints
    tasks: int
    prompt_T: Ints
    prompts: int
    annotators: int


def _overlapping(judgements: Sequence[Judgement]) -> _Voices:
    voices = [found for found in judgements if found.ranks is not None and not found.repeat]
    heard: dict[str, set[str]] = {}
    for voice in voices:
        annotators = heard.setdefault(voice.task.id, set())
        assert voice.annotator not in annotators, f"{voice.annotator} twice in {voice.task.id}"
        annotators.add(voice.annotator)
    shared = [voice for voice in voices if len(heard[voice.task.id]) > 1]
    # sums of floats depend on the order in their last digit
    shared.sort(key=lambda voice: (voice.task.id, voice.annotator))
    task_N, tasks = codes([voice.task.id for voice in shared])
    prompt_N, prompts = codes([voice.task.prompt_id for voice in shared])
    prompt_T = np.zeros(tasks, dtype=np.int64)
    prompt_T[task_N] = prompt_N
    people = len({voice.annotator for voice in shared})
    return _Voices(list(blocks(shared)), task_N, tasks, prompt_T, prompts, people)


def _pairwise(voices: _Voices, seed: int) -> Estimate | None:
    sums_TC = np.zeros((voices.tasks, 2))
    for block in voices.blocks:
        task_N = voices.task_N[block.rows_N]
        signs_NQ = pair_signs(block.ranks_NK)
        first_TQ = sums_by(task_N, signs_NQ > 0, voices.tasks)
        second_TQ = sums_by(task_N, signs_NQ < 0, voices.tasks)
        same_T = (_twos(first_TQ) + _twos(second_TQ)).sum(1)
        sums_TC += np.stack([same_T, _twos(first_TQ + second_TQ).sum(1)], axis=1)
    return ratio(sums_by(voices.prompt_T, sums_TC, voices.prompts), seed)


def _tau(voices: _Voices, seed: int) -> Estimate | None:
    sums_TC = np.zeros((voices.tasks, 2))
    for block in voices.blocks:
        task_N = voices.task_N[block.rows_N]
        signs_NQ = pair_signs(block.ranks_NK)
        strict_N = np.count_nonzero(signs_NQ, axis=1)
        unit_NQ = signs_NQ / np.sqrt(np.maximum(strict_N, 1))[:, None]
        total_TQ = sums_by(task_N, unit_NQ, voices.tasks)
        defined_T = sums_by(task_N, (strict_N > 0)[:, None], voices.tasks)[:, 0]
        tau_T = ((total_TQ**2).sum(1) - defined_T) / 2
        sums_TC += np.stack([tau_T, _twos(defined_T)], axis=1)
    return ratio(sums_by(voices.prompt_T, sums_TC, voices.prompts), seed)


def _ranks_alpha(voices: _Voices, seed: int) -> Estimate | None:
    values, units, prompts = [], [], []
    unit_start = 0
    for block in voices.blocks:
        size = block.ranks_NK.shape[1]
        task_N = voices.task_N[block.rows_N]
        values.append((rankdata(block.ranks_NK, axis=1) - 0.5).ravel() / size)
        first_unit_N = unit_start + task_N * size
        units.append((first_unit_N[:, None] + np.arange(size)).ravel())
        prompts.append(np.repeat(voices.prompt_T[task_N], size))
        unit_start += voices.tasks * size
    if not values:
        return None
    return ordinal_alpha(
        np.concatenate(values), np.concatenate(units), np.concatenate(prompts), seed
    )


def _twos(count: Floats) -> Floats:
    """How many pairs can be made of `count` things."""
    return count * (count - 1) / 2


def _wins(signs_NQ: NDArray[np.int8]) -> Ints:
    """Pairs that the first wins, and strict pairs, of each judgement: `[N, 2]`."""
    return np.stack([(signs_NQ > 0).sum(1), np.count_nonzero(signs_NQ, axis=1)], axis=1)


def _alpha(sums: Floats) -> Floats:
    within, count, total, squares = sums.T
    between = (squares - total**2 / count) / (count - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(between > 0, 1 - within / count / between, np.nan)
