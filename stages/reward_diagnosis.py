"""What a reward model gets right, how sure it is of it, and what else it listens to.

All figures come from held-out rankings. Those of one prompt are not independent, so every interval is
a 95 % bootstrap over prompts. Shapes: K responses of one ranking, Q pairs, N prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.job import Metrics
from pipeline.records import Ranking
from pipeline.statistics import ratio_interval
from stages.ranked_data import encode_group
from stages.reward_votes import Judged, agreement, votes_of
from stages.shared_prefix import PromptGroup

Scores = Callable[[list[PromptGroup]], list[list[float]]]
Row = dict[str, Any]
MOST_BINS, LEAST_PAIRS_A_BIN = 10, 10


def judge(
    rankings: Iterable[Ranking],
    score: Scores,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[Judged]:
    """Rankings with the scores of their responses; those longer than max_length are left out, as the
    reward stage counts them. Responses that several people ranked are scored once."""
    encoded: dict[str, tuple[list[str], PromptGroup]] = {}
    found = list(rankings)
    for ranking in found:
        texts = encoded[ranking.prompt_id][0] if ranking.prompt_id in encoded else []
        texts = list(dict.fromkeys([*texts, *ranking.responses]))
        group = encode_group(tokenizer, list(ranking.messages), texts)
        encoded[ranking.prompt_id] = (texts, group)
    whole = _score(encoded, score, max_length, end=True)
    cut = _score(encoded, score, max_length, end=False)
    tokens = {
        (prompt_id, text): len(ids)
        for prompt_id, (texts, group) in encoded.items()
        for text, ids in zip(texts, group.responses, strict=True)
    }
    judged = []
    for ranking in found:
        keys = [(ranking.prompt_id, text) for text in ranking.responses]
        fits = [i for i, key in enumerate(keys) if key in whole]
        part = Ranking(
            ranking.messages,
            tuple(ranking.responses[i] for i in fits),
            tuple(ranking.ranks[i] for i in fits),
            ranking.annotator,
            ranking.split,
            ranking.round,
            ranking.source,
        )
        if len(fits) >= 2:
            own = [keys[i] for i in fits]
            scores = [whole[key] for key in own]
            judged.append(Judged(part, scores, [tokens[k] for k in own], [cut.get(k) for k in own]))
    return judged


def _score(
    encoded: dict[str, tuple[list[str], PromptGroup]], score: Scores, max_length: int, end: bool
) -> dict[tuple[str, str], float]:
    keys, groups = [], []
    for prompt_id, (texts, (prompt, responses)) in encoded.items():
        kept = [
            (text, ids if end else ids[:-1])
            for text, ids in zip(texts, responses, strict=True)
            if len(prompt) + len(ids) <= max_length and (end or len(ids) > 1)
        ]
        if kept:
            groups.append(PromptGroup(prompt, [ids for _, ids in kept]))
            keys.append([(prompt_id, text) for text, _ in kept])
    scores = score(groups) if groups else []
    return {
        key: value
        for row, values in zip(keys, scores, strict=True)
        for key, value in zip(row, values, strict=True)
    }


def diagnose(judged: Sequence[Judged], std: float, seed: int) -> Row:
    """Everything but accuracy, which `reward_measures.measure` has, as rows for a JSON file.

    std: of the raw scores, the unit of what is said of scores.
    """
    return {
        "agreement": agreement(votes_of(judged), seed),
        "calibration": calibration(judged, seed),
        "length": follows(judged, lambda item: item.tokens, seed),
        "position": follows(judged, lambda item: range(1, len(item.scores) + 1), seed),
        "eos": end_token(judged, std, seed),
    }


def metrics_of(found: Row) -> Metrics:
    """The figures of `diagnose` that stand in the manifest."""
    return {
        "human_agreement": found["agreement"]["people"],
        "ece": found["calibration"]["ece"],
        "position_correlation": found["position"]["score"],
        "eos_effect": found["eos"]["effect"],
        "eos_gain": found["eos"]["gain"],
        "eos_preferred": found["eos"]["preferred"],
    }


# ---- how sure --------------------------------------------------------------------------------


def calibration(judged: Sequence[Judged], seed: int) -> Row:
    """Whether pairs are ordered rightly as often as sigma(score difference) says.

    A pair is counted once for each annotator who ordered it. Its confidence is that of the order
    which the model prefers, 0.5 to 1 (Bradley and Terry's model, on raw scores). Bins hold equally many
    pairs; ece is the mean of |accuracy - confidence| over them by size (Guo et al. 2017, arXiv
    1706.04599, eq. 3). Chance alone makes it positive: about 0.4 / sqrt(pairs of a bin).
    """
    differences, prompts = [], []
    for item in judged:
        for better, worse in item.ranking.strict_pairs:
            differences.append(item.scores[better] - item.scores[worse])
            prompts.append(item.ranking.prompt_id)
    difference_Q = np.array(differences)
    if not len(difference_Q):
        return {"ece": None, "pairs": 0, "bins": []}
    confidence_Q = _sigmoid(np.abs(difference_Q))
    right_Q = (difference_Q > 0) + 0.5 * (difference_Q == 0)
    count = max(1, min(MOST_BINS, len(difference_Q) // LEAST_PAIRS_A_BIN))
    bins = []
    for index in np.array_split(np.argsort(confidence_Q, kind="stable"), count):
        sums: dict[str, list[float]] = {}
        for q in index:
            row = sums.setdefault(prompts[q], [0.0, 0.0])
            row[0] += right_Q[q]
            row[1] += 1
        table = np.array([sums[key] for key in sorted(sums)])
        low, high = ratio_interval(table[:, 0], table[:, 1], seed)
        bins.append(
            {
                "confidence": float(confidence_Q[index].mean()),
                "accuracy": float(right_Q[index].mean()),
                "accuracy_low": low,
                "accuracy_high": high,
                "pairs": len(index),
            }
        )
    ece = sum(b["pairs"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(difference_Q)
    return {"ece": float(ece), "pairs": len(difference_Q), "bins": bins}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


# ---- what else it listens to -------------------------------------------------------------------


def follows(
    judged: Sequence[Judged], feature: Callable[[Judged], Iterable[float]], seed: int
) -> Row:
    """Pearson's correlation of scores with a feature of responses, and of people's ranks with it.

    Both sides are centred within each ranking. A model that follows the feature no more than people do
    may just have learnt what they like. 0 where one side does not vary.
    """
    sums: dict[str, np.ndarray] = {}
    for item in judged:
        values = np.array(list(feature(item)), dtype=float)
        sides = (values, np.array(item.scores), -np.array(item.ranking.ranks, dtype=float))
        x, score, liking = (side - side.mean() for side in sides)
        row = np.array([x @ score, score @ score, x @ liking, liking @ liking, x @ x])
        sums[item.ranking.prompt_id] = sums.get(item.ranking.prompt_id, np.zeros(5)) + row
    table = np.stack([sums[key] for key in sorted(sums)])
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(table), size=(2000, len(table)))
    found: Row = {}
    for name, at in (("score", 0), ("people", 2)):
        sides_3 = table[:, [at, at + 1, 4]]
        low, high = np.percentile(_pearson(sides_3[draws].sum(1)), [2.5, 97.5])
        found[name] = float(_pearson(sides_3.sum(0)))
        found[f"{name}_low"], found[f"{name}_high"] = float(low), float(high)
    return found


def _pearson(sums: np.ndarray) -> np.ndarray:
    """Of `[..., (xy, yy, xx)]`."""
    scale = np.sqrt(sums[..., 1] * sums[..., 2])
    return np.where(scale > 0, sums[..., 0] / np.where(scale > 0, scale, 1.0), 0.0)


def end_token(judged: Sequence[Judged], std: float, seed: int) -> Row:
    """What the end token does to the score of a response, in standard deviations of scores.

    gain: mean of the score with it minus the score without. preferred: share of responses whose
    finished form scores higher. effect: mean of the difference without its sign; near 0 the model does
    not see the end token, and a policy may stop to write it.
    """
    by_prompt: dict[str, dict[str, float]] = {}
    for item in judged:
        rows = zip(item.ranking.responses, item.scores, item.cut_scores, strict=True)
        for text, score, cut in rows:
            if cut is not None:
                by_prompt.setdefault(item.ranking.prompt_id, {})[text] = (score - cut) / std
    if not by_prompt:
        return {"responses": 0, "effect": None, "gain": None, "preferred": None}
    differences = [np.array(list(by_prompt[key].values())) for key in sorted(by_prompt)]
    count_N = np.array([len(row) for row in differences], dtype=float)
    found: Row = {"responses": int(count_N.sum())}
    for name, of in (
        ("effect", np.abs),
        ("gain", np.asarray),
        ("preferred", lambda row: (row > 0) + 0.5 * (row == 0)),
    ):
        sum_N = np.array([of(row).sum() for row in differences])
        found[name] = float(sum_N.sum() / count_N.sum())
        low, high = ratio_interval(sum_N, count_N, seed)
        found[f"{name}_low"], found[f"{name}_high"] = low, high
    return found
