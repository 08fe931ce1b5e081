"""What people said of two responses beside what a reward model says: agreement, and worst mistakes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from pipeline.records import Ranking
from pipeline.statistics import ratio_interval

Row = dict[str, Any]
MOST_MISTAKES = 20


@dataclass(frozen=True)
class Judged:
    """One annotator's ranking beside the raw scores of its responses.

    tokens: of each response, with the end token. cut_scores: without the end token; None where
    nothing else is there.
    """

    ranking: Ranking
    scores: list[float]
    tokens: list[int]
    cut_scores: list[float | None]


class Votes(NamedTuple):
    """What annotators said of two responses to a prompt: `first` better, `second` better, equal."""

    prompt_id: str
    first: str
    second: str
    for_first: int
    for_second: int
    ties: int
    difference: float
    """Raw score of the first minus that of the second."""


def votes_of(judged: Sequence[Judged]) -> list[Votes]:
    """Every two responses of a prompt that somebody compared; an annotator's last ranking counts."""
    last = {(item.ranking.prompt_id, item.ranking.annotator): item for item in judged}
    counts: dict[tuple[str, str, str], list[int]] = {}
    differences: dict[tuple[str, str, str], float] = {}
    for (prompt_id, _), item in last.items():
        ranking = item.ranking
        for i, j in combinations(range(len(ranking.responses)), 2):
            if ranking.responses[j] < ranking.responses[i]:
                i, j = j, i
            key = (prompt_id, ranking.responses[i], ranking.responses[j])
            difference = ranking.ranks[i] - ranking.ranks[j]
            place = 2 if difference == 0 else 0 if difference < 0 else 1
            counts.setdefault(key, [0, 0, 0])[place] += 1
            differences[key] = item.scores[i] - item.scores[j]
    return [
        Votes(*key, counts[key][0], counts[key][1], counts[key][2], differences[key])
        for key in sorted(counts)
    ]


def agreement(votes: Sequence[Votes], seed: int) -> Row:
    """How far people agree where several ordered the same pair strictly, and the model with them there.

    people: the chance that two of them order a pair alike: what one person reaches in predicting
    another. best: votes that the majority of each pair gets: no model reaches more. model: its own
    accuracy on the very same votes. All None where no pair has two votes.
    """
    sums: dict[str, np.ndarray] = {}
    for vote in votes:
        a, b = vote.for_first, vote.for_second
        if a + b < 2:
            continue
        right = a if vote.difference > 0 else b if vote.difference < 0 else (a + b) / 2
        alike, couples = math.comb(a, 2) + math.comb(b, 2), math.comb(a + b, 2)
        row = np.array([alike, couples, max(a, b), right, a + b], dtype=float)
        sums[vote.prompt_id] = sums.get(vote.prompt_id, np.zeros(5)) + row
    names = {"people": (0, 1), "best": (2, 4), "model": (3, 4)}
    if not sums:
        return {"pairs": 0, **dict.fromkeys(names), "people_low": None, "people_high": None}
    table = np.stack([sums[key] for key in sorted(sums)])
    found: Row = {
        "pairs": sum(v.for_first + v.for_second >= 2 for v in votes),
        "prompts": len(table),
    }
    for name, (over, under) in names.items():
        found[name] = float(table[:, over].sum() / table[:, under].sum())
        low, high = ratio_interval(table[:, over], table[:, under], seed)
        found[f"{name}_low"], found[f"{name}_high"] = low, high
    return found


def worst_mistakes(
    judged: Sequence[Judged], std: float, mean: float, most: int = MOST_MISTAKES
) -> list[Row]:
    """Where most people preferred one response and the model most clearly the other, one pair a prompt.

    Scores are normalised; `probability` is what the model gave to the choice that people did not make.
    """
    scores = {
        (item.ranking.prompt_id, text): score
        for item in judged
        for text, score in zip(item.ranking.responses, item.scores, strict=True)
    }
    prompts = {item.ranking.prompt_id: list(item.ranking.messages) for item in judged}
    rows: dict[str, Row] = {}
    for vote in votes_of(judged):
        texts, counts = (vote.first, vote.second), (vote.for_first, vote.for_second)
        if counts[0] == counts[1]:
            continue
        chosen = 0 if counts[0] > counts[1] else 1
        better, worse = texts[chosen], texts[1 - chosen]
        wrong_by = scores[vote.prompt_id, worse] - scores[vote.prompt_id, better]
        if wrong_by > 0 and wrong_by > rows.get(vote.prompt_id, {"wrong_by": 0.0})["wrong_by"]:
            rows[vote.prompt_id] = {
                "prompt_id": vote.prompt_id,
                "messages": prompts[vote.prompt_id],
                "preferred_by_people": better,
                "preferred_by_model": worse,
                "score_of_people_s": (scores[vote.prompt_id, better] - mean) / std,
                "score_of_model_s": (scores[vote.prompt_id, worse] - mean) / std,
                "probability": 1 / (1 + math.exp(-wrong_by)),
                "votes_for_people_s": counts[chosen],
                "votes_for_model_s": counts[1 - chosen],
                "ties": vote.ties,
                "wrong_by": wrong_by,
            }
    ordered = sorted(rows.values(), key=lambda row: (-row["wrong_by"], row["prompt_id"]))
    return [{k: v for k, v in row.items() if k != "wrong_by"} for row in ordered[:most]]
