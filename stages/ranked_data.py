"""Rankings as token ids: what a reward model is trained on and measured with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.records import Message, Ranking, Tally
from pipeline.settings.reward import RewardSettings
from stages.chat import encode_completion, encode_prompt
from stages.models import positions
from stages.reward_losses import MAX_TIED
from stages.shared_prefix import PromptGroup


class Vote(NamedTuple):
    """One annotator's ranks of the K responses (1 is best, equal numbers are ties), and its weight."""

    ranks: list[int]
    weight: float = 1.0


class EncodedRanking(NamedTuple):
    """The responses of a prompt and who ranked them how: one vote, or several of the same responses."""

    group: PromptGroup
    votes: list[Vote]
    prompt_id: str

    @property
    def weight(self) -> float:
        return sum(vote.weight for vote in self.votes)


def longest_row(settings: RewardSettings, model: PreTrainedModel) -> int:
    """Tokens of prompt and response: by the setting, and by what the model can read."""
    return min(settings.max_length, positions(model) or settings.max_length)


def annotator_weights(rankings: Path, settings: RewardSettings) -> dict[str, float]:
    """Weight of annotators by name: what the rank step found, times what the settings say.

    Args:
        rankings: the folder of the artifact.
    """
    file = rankings / "annotators.json"
    # rankings of a version that weighed nobody have no such file
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    weights = {row["annotator"]: float(row["weight"]) for row in rows}
    for name, weight in settings.annotator_weights.items():
        weights[name] = weights.get(name, 1.0) * weight
    return weights


def encode_group(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], responses: list[str]
) -> PromptGroup:
    """Ids of a conversation and of what was answered, each answer with its end token."""
    return PromptGroup(
        encode_prompt(tokenizer, messages),
        [encode_completion(tokenizer, text, eos=True) for text in responses],
    )


def encode_rankings(
    rankings: list[Ranking], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[EncodedRanking], Tally]:
    """The rankings that have a strict pair, to measure with; what is left out is counted."""
    return _encode(rankings, tokenizer, max_length, {}, ties_count=False, most_tied=None)


def encode_to_train_on(
    rankings: list[Ranking],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    settings: RewardSettings,
    weights: Mapping[str, float],
) -> tuple[list[EncodedRanking], Tally]:
    """The rankings as `settings` merge them and each annotator weighs (1 where none is given); what
    is left out is counted by reason.

    With soft labels, the rankings of the same responses are one, with a vote each.
    """
    most_tied = MAX_TIED if settings.loss == "plackett_luce" else None
    encoded, tally = _encode(
        rankings,
        tokenizer,
        max_length,
        weights,
        ties_count=settings.soft_labels,
        most_tied=most_tied,
    )
    return (_merge(encoded) if settings.soft_labels else encoded), tally


def _encode(
    rankings: list[Ranking],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    weights: Mapping[str, float],
    *,
    ties_count: bool,
    most_tied: int | None,
) -> tuple[list[EncodedRanking], Tally]:
    tally = Tally()
    encoded = []
    for ranking in rankings:
        weight = weights.get(ranking.annotator, 1.0)
        prompt, responses = encode_group(tokenizer, list(ranking.messages), list(ranking.responses))
        fits = [i for i, ids in enumerate(responses) if len(prompt) + len(ids) <= max_length]
        if len(fits) < len(responses):
            lost = len(responses) - len(fits)
            tally.reasons[f"response longer than {max_length} tokens with its prompt"] += lost
        ranks = [ranking.ranks[i] for i in fits]
        if weight == 0:
            tally.drop("annotator of weight 0", ranking.id)
        elif len(fits) < 2:
            tally.drop("fewer than two responses fit", ranking.id)
        elif len(set(ranks)) == 1 and not ties_count:
            tally.drop("all responses tied", ranking.id)
        elif most_tied and _tied_above_others(ranks) > most_tied:
            tally.drop(f"more than {most_tied} responses tied above others", ranking.id)
        else:
            tally.use()
            group = PromptGroup(prompt, [responses[i] for i in fits])
            encoded.append(EncodedRanking(group, [Vote(ranks, weight)], ranking.prompt_id))
    return encoded, tally


def _tied_above_others(ranks: list[int]) -> int:
    last = max(ranks)
    return max((ranks.count(rank) for rank in ranks if rank != last), default=0)


def _merge(rankings: list[EncodedRanking]) -> list[EncodedRanking]:
    """Rankings of the same responses to the same prompt as one, in the order of the first."""
    merged: dict[tuple[str, tuple[tuple[int, ...], ...]], EncodedRanking] = {}
    for ranking in rankings:
        prompt, responses = ranking.group
        order = sorted(range(len(responses)), key=lambda i: responses[i])
        votes = [Vote([v.ranks[i] for i in order], v.weight) for v in ranking.votes]
        key = (ranking.prompt_id, tuple(tuple(responses[i]) for i in order))
        if key in merged:
            merged[key].votes.extend(votes)
        else:
            group = PromptGroup(prompt, [responses[i] for i in order])
            merged[key] = EncodedRanking(group, votes, ranking.prompt_id)
    return list(merged.values())
