"""How often a judge agrees with people, and how often people agree with each other (its ceiling).

Both are shares of strict pairs: two responses to one prompt of which an annotator prefers one. A tie
of the judge counts one half. Intervals draw whole prompts: pairs of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

from pipeline.job import Input
from pipeline.records import Prompt, Ranking, read_jsonl
from pipeline.statistics import Estimate, mean_with_interval

Score = Callable[[list[Prompt], list[str]], list[float]]


class Pair(NamedTuple):
    """Two responses to a prompt, of which an annotator prefers the first."""

    prompt: Prompt
    better: str
    worse: str


class Labels(NamedTuple):
    """The rankings that judges are compared with. by: `people`, or `simulated` annotators."""

    rankings: list[Ranking]
    by: str

    @property
    def heldout(self) -> list[Ranking]:
        return [ranking for ranking in self.rankings if ranking.split == "heldout"]


def read_labels(rankings: Input) -> Labels | None:
    """The rankings of people in an artifact; those of simulated annotators where there are no others."""
    assert rankings.path is not None, f"{rankings.role} is an artifact of a step"
    found = [Ranking.from_row(row) for row in read_jsonl(rankings.path / "rankings.jsonl")]
    people = [ranking for ranking in found if ranking.source != "simulated"]
    if people:
        return Labels(people, "people")
    return Labels(found, "simulated") if found else None


def strict_pairs(rankings: list[Ranking]) -> list[Pair]:
    """Every pair that is no tie, once for each annotator who said so."""
    return [
        Pair(Prompt(ranking.messages), ranking.responses[i], ranking.responses[j])
        for ranking in rankings
        for i, j in ranking.strict_pairs
    ]


def agreement_of_scores(rankings: list[Ranking], score: Score, seed: int) -> Estimate | None:
    """Of a judge that scores each response by itself."""
    pairs = strict_pairs(rankings)
    said = {(p.prompt.id, text): p.prompt for p in pairs for text in (p.better, p.worse)}
    values = score(list(said.values()), [text for _, text in said])
    of = dict(zip(said, values, strict=True))
    outcomes = []
    for pair in pairs:
        better, worse = (of[pair.prompt.id, text] for text in (pair.better, pair.worse))
        outcomes.append(float(better > worse) + 0.5 * float(better == worse))
    return agreement(pairs, outcomes, seed)


def agreement(pairs: list[Pair], outcomes: list[float], seed: int) -> Estimate | None:
    """outcomes: 1 where the judge prefers the same, 0 the other, 0.5 neither; None without a pair."""
    if not pairs:
        return None
    return mean_with_interval(outcomes, seed, clusters=[pair.prompt.id for pair in pairs])


def annotator_agreement(rankings: list[Ranking], seed: int) -> Estimate | None:
    """Of two annotators about pairs on which both prefer one; None without overlap.

    Who ranked the same responses again in a later round is one voice: the last word counts.
    """
    voices: dict[tuple[str, frozenset[str]], dict[str, dict[str, int]]] = {}
    for ranking in sorted(rankings, key=lambda ranking: (ranking.round, ranking.id)):
        heard = voices.setdefault((ranking.prompt_id, frozenset(ranking.responses)), {})
        heard[ranking.annotator] = dict(zip(ranking.responses, ranking.ranks, strict=True))
    same, prompts = [], []
    for (prompt_id, _), heard in voices.items():
        for (_, one), (_, other) in combinations(sorted(heard.items()), 2):
            for first, second in combinations(sorted(one), 2):
                signs = [ranks[first] - ranks[second] for ranks in (one, other)]
                if all(signs):
                    same.append(float(signs[0] * signs[1] > 0))
                    prompts.append(prompt_id)
    return mean_with_interval(same, seed, clusters=prompts) if same else None
