"""Several annotators' rankings of the same responses, as groups and as pairs to train on.

Disagreement is mostly not noise, so rankings are never merged in the store: how they are merged is
chosen at the export (MODES), and what a mode leaves out is counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from labeling_ui.judgements import Judgement, Task
from pipeline.records import Message, Ranking, content_id, response_id

MODES = ("all", "soft", "majority", "unanimous")
Rows = tuple[list[dict[str, Any]], Counter[str]]


@dataclass(frozen=True)
class Group:
    """All rankings of the same responses to the same prompt, one an annotator."""

    prompt_id: str
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    """In the order of their ids, which tells nothing of them."""
    ranks: tuple[tuple[int, ...], ...]
    """One rank vector an annotator: 1 is best, equal numbers are ties."""
    annotators: tuple[str, ...]
    ranking_ids: tuple[str, ...]
    split: str

    @cached_property
    def id(self) -> str:
        return content_id("group", self.prompt_id, list(self.responses))

    def to_row(self) -> dict[str, Any]:
        return {
            "group_id": self.id,
            "prompt_id": self.prompt_id,
            "prompt": list(self.messages),
            "responses": list(self.responses),
            "annotators": list(self.annotators),
            "ranks": [list(ranks) for ranks in self.ranks],
            "ranking_ids": list(self.ranking_ids),
            "split": self.split,
        }

    def judgements(self) -> list[Judgement]:
        """For agreement.py. Rankings do not say in which order the responses were shown."""
        lengths = tuple(len(text) for text in self.responses)
        task = Task(self.id, self.prompt_id, lengths)
        return [
            Judgement(task, name, ranks)
            for name, ranks in zip(self.annotators, self.ranks, strict=True)
        ]


def group_rankings(rankings: Iterable[Ranking]) -> tuple[list[Group], Counter[str]]:
    """The groups in the order of their ids, and what was left out by reason.

    Who ranked the same responses in several rounds is one voice: their last word counts.
    """
    found: dict[tuple[str, tuple[str, ...]], dict[str, Ranking]] = defaultdict(dict)
    dropped: Counter[str] = Counter()
    for ranking in sorted(rankings, key=lambda ranking: (ranking.round, ranking.id)):
        voices = found[ranking.prompt_id, tuple(sorted(ranking.responses))]
        dropped["rankings that their annotator made again later"] += ranking.annotator in voices
        voices[ranking.annotator] = ranking
    groups = [_group(prompt_id, voices) for (prompt_id, _), voices in found.items()]
    return sorted(groups, key=lambda group: group.id), +dropped


def _group(prompt_id: str, voices: dict[str, Ranking]) -> Group:
    rankings = [voices[name] for name in sorted(voices)]
    texts = sorted(rankings[0].responses, key=lambda text: response_id(prompt_id, text))
    rank_of = [dict(zip(r.responses, r.ranks, strict=True)) for r in rankings]
    return Group(
        prompt_id=prompt_id,
        messages=rankings[0].messages,
        responses=tuple(texts),
        ranks=tuple(tuple(ranks[text] for text in texts) for ranks in rank_of),
        annotators=tuple(sorted(voices)),
        ranking_ids=tuple(ranking.id for ranking in rankings),
        split=rankings[0].split,
    )


def group_rows(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """One row per group, with the rank vector of every annotator."""
    return [group.to_row() for group in groups]


def pair_rows(groups: Iterable[Group], mode: str) -> Rows:
    """Rows in TRL's conversational preference format, and how many were left out by reason.

    Of m annotators of a group, by `mode`:

    - all: each annotator's strict pairs, each of weight 1/m; their ties are left out.
    - soft: every two responses once, with `label` the share of votes for `chosen`, a tie being half
      a vote for both. `chosen` is what more prefer (label >= 0.5); at exactly 0.5 the lesser id.
      Summed over a pair, `all` has the same loss as binary cross-entropy with this label
      where nobody ties; ties add the same term with label 0.5, which `all` lacks.
    - majority: every two of which more than half of the annotators prefer the same.
    - unanimous: every two of which all prefer the same.

    Each row has group_id, prompt_id, split, label (probability that `chosen` is better), weight and
    votes (m); `annotator` and `ranking_id` are None except in `all`. Pairs of a group are strongly
    correlated: keep them in one batch.
    """
    assert mode in MODES, mode
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for group in groups:
        m = len(group.ranks)
        same = {
            "prompt": list(group.messages),
            "split": group.split,
            "votes": m,
            "annotator": None,
            "ranking_id": None,
            "group_id": group.id,
            "prompt_id": group.prompt_id,
        }
        turns = [[{"role": "assistant", "content": text}] for text in group.responses]
        for i, j in combinations(range(len(group.responses)), 2):
            signs = [(ranks[j] > ranks[i]) - (ranks[j] < ranks[i]) for ranks in group.ranks]
            if mode == "all":
                dropped["ties"] += signs.count(0)
                for k, sign in enumerate(signs):
                    if sign:
                        better, worse = (i, j) if sign > 0 else (j, i)
                        row = {**same, "chosen": turns[better], "rejected": turns[worse]}
                        who = {"annotator": group.annotators[k]}
                        who["ranking_id"] = group.ranking_ids[k]
                        rows.append({**row, "label": 1.0, "weight": 1 / m, **who})
                continue
            better, worse = (i, j) if sum(signs) >= 0 else (j, i)
            votes = max(signs.count(1), signs.count(-1))
            if mode == "soft":
                label = 0.5 + abs(sum(signs)) / (2 * m)
            else:
                label = 1.0
                if reason := _left_out(mode, signs, votes, m):
                    dropped[reason] += 1
                    continue
            row = {**same, "chosen": turns[better], "rejected": turns[worse]}
            rows.append({**row, "label": label, "weight": 1.0})
    return rows, +dropped


def _left_out(mode: str, signs: list[int], votes: int, m: int) -> str | None:
    """Why this pair gives no row, if so."""
    if not any(signs):
        return "pairs that all annotators tie"
    if mode == "unanimous":
        return None if votes == m else "pairs that are not unanimous"
    return None if votes > m / 2 else "pairs without a majority"
