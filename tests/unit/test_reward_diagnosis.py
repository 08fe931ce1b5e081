"""The figures that a reward model is judged by, against numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from pipeline.records import Ranking
from stages import tokenizer as tokenizer_stage
from stages.reward_diagnosis import calibration, diagnose, end_token, follows, judge, metrics_of
from stages.reward_votes import Judged, agreement, votes_of, worst_mistakes
from stages.shared_prefix import PromptGroup


def judged(
    prompt: str,
    ranks: tuple[int, ...],
    scores: list[float],
    annotator: str = "ann",
    tokens: list[int] | None = None,
    cut: list[float | None] | None = None,
    texts: str = "abcdef",
) -> Judged:
    ranking = Ranking(
        ({"role": "user", "content": prompt},), tuple(texts[: len(ranks)]), ranks, annotator
    )
    return Judged(ranking, scores, tokens or [1] * len(ranks), cut or [None] * len(ranks))


def test_people_s_agreement_and_the_most_that_a_model_could_reach() -> None:
    """Prompt one, a against b: two for a, one for b. Prompt two: two for a, none for b; c with nobody twice."""
    items = [
        judged("one", (1, 2), [1.0, 0.0], "x"),
        judged("one", (1, 2), [1.0, 0.0], "y"),
        judged("one", (2, 1), [1.0, 0.0], "z"),
        judged("two", (1, 2, 3), [0.0, 1.0, 2.0], "x"),
        judged("two", (1, 2, 2), [0.0, 1.0, 2.0], "y"),
    ]
    found = agreement(votes_of(items), seed=0)
    # couples of voters who agree: 1 of 3 on the first pair; 1 of 1 on a-b and on a-c of the second
    assert found["people"] == pytest.approx(3 / 5)
    # b-c of the second has one strict vote and is left out; the majority gets 2 of 3, 2 of 2 and 2 of 2
    assert found["best"] == pytest.approx(6 / 7)
    # the model is right in 2 of 3, then 0 of 2 and 0 of 2
    assert found["model"] == pytest.approx(2 / 7)
    assert found["pairs"] == 3
    # two prompts: a bootstrap has the ratios of (1,1), (1,2), (2,2)
    assert (found["people_low"], found["people_high"]) == pytest.approx((1 / 3, 1.0))


def test_who_ranked_alone_says_nothing_of_agreement_and_nobody_agrees_with_himself() -> None:
    assert agreement(votes_of([judged("one", (1, 2), [1, 0])]), 0)["people"] is None
    again = [judged("one", (1, 2), [1, 0]), judged("one", (2, 1), [1, 0])]
    found = votes_of(again)
    assert agreement(found, 0)["people"] is None
    assert (found[0].for_first, found[0].for_second) == (0, 1)


def test_the_order_in_which_responses_are_listed_does_not_matter_for_votes() -> None:
    there = judged("one", (1, 2), [1.0, 0.0], "x", texts="ab")
    back = judged("one", (2, 1), [0.0, 1.0], "y", texts="ba")
    [vote] = votes_of([there, back])
    assert (vote.for_first, vote.for_second, vote.difference) == (2, 0, 1.0)


def test_bins_hold_equally_many_pairs_and_ece_is_their_mean_gap() -> None:
    """Ten pairs at sigma = 0.6 of which 7 are right, ten at 0.9 of which all are: gaps 0.1 and 0.1."""
    at = {p: math.log(p / (1 - p)) for p in (0.6, 0.9)}
    items = [
        judged(f"{p} {i}", (1, 2), [at[p] if right else -at[p], 0.0])
        for p, good in ((0.6, 7), (0.9, 10))
        for i in range(10)
        for right in [i < good]
    ]
    found = calibration(items, seed=1)
    assert [b["pairs"] for b in found["bins"]] == [10, 10]
    assert [b["confidence"] for b in found["bins"]] == pytest.approx([0.6, 0.9])
    assert [b["accuracy"] for b in found["bins"]] == pytest.approx([0.7, 1.0])
    assert found["ece"] == pytest.approx(0.1)
    first = found["bins"][0]
    assert first["accuracy_low"] < 0.7 < first["accuracy_high"]
    # 0.7 +- 1.96 * sqrt(0.21 / 10), which a bootstrap of ten prompts rounds to tenths
    assert (first["accuracy_low"], first["accuracy_high"]) == pytest.approx((0.4, 1.0), abs=0.1)


def test_a_model_that_is_as_sure_as_it_is_right_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    items = []
    for n in range(4000):
        difference = rng.normal(0, 1.5)
        first_is_better = rng.random() < 1 / (1 + math.exp(-difference))
        items.append(judged(str(n), (1, 2) if first_is_better else (2, 1), [difference, 0.0]))
    assert calibration(items, 0)["ece"] < 0.03
    twice = [
        judged(i.ranking.messages[0]["content"], i.ranking.ranks, [2 * i.scores[0], 0.0])
        for i in items
    ]
    found = calibration(twice, 0)
    assert found["ece"] > 0.06
    # overconfident: accuracy below confidence in the upper bins
    assert all(b["accuracy"] < b["confidence"] for b in found["bins"][-4:])
    assert all(a["confidence"] <= b["confidence"] for a, b in pairwise(found["bins"]))


def test_equal_scores_are_half_right() -> None:
    found = calibration([judged("one", (1, 2), [2.0, 2.0])], 0)
    assert (found["bins"][0]["confidence"], found["bins"][0]["accuracy"]) == (0.5, 0.5)


def test_what_scores_follow_is_measured_within_rankings_beside_what_people_follow() -> None:
    """Lengths 1 2 3: scores 1 2 3 and 3 1 2, so products 2 and -1; sums of squares 2 and 2 each side."""
    items = [
        judged("one", (3, 2, 1), [1.0, 2.0, 3.0], tokens=[1, 2, 3]),
        judged("two", (3, 2, 1), [103.0, 101.0, 102.0], tokens=[51, 52, 53]),
    ]
    found = follows(items, lambda item: item.tokens, 0)
    assert found["score"] == pytest.approx((2 - 1) / 4)
    assert found["people"] == pytest.approx(1.0)
    assert (found["score_low"], found["score_high"]) == pytest.approx((-0.5, 1.0))
    level = follows([judged("one", (1, 2), [1.0, 0.0], tokens=[5, 5])], lambda item: item.tokens, 0)
    assert level["score"] == 0


def test_the_end_token_is_seen_by_what_its_absence_does_to_the_score() -> None:
    items = [
        judged("one", (1, 2, 3), [2.0, 1.0, 0.0], cut=[1.0, 1.5, None]),
        # a second annotator does not make a response count twice
        judged("one", (1, 2, 3), [2.0, 1.0, 0.0], "other", cut=[1.0, 1.5, None]),
        judged("two", (1, 2), [4.0, 0.0], cut=[2.0, 0.0]),
    ]
    found = end_token(items, std=2.0, seed=0)
    # differences 1, -0.5, 2, 0, each over 2
    assert found["responses"] == 4
    assert found["gain"] == pytest.approx(2.5 / 4 / 2)
    assert found["effect"] == pytest.approx(3.5 / 4 / 2)
    assert found["preferred"] == pytest.approx(2.5 / 4)
    assert end_token([judged("one", (1, 2), [1, 0])], 1.0, 0)["effect"] is None


def test_the_worst_mistakes_are_the_clearest_first_with_their_votes() -> None:
    items = [
        judged("one", (1, 2, 3), [0.0, 1.0, 3.0], "x"),
        judged("one", (1, 3, 2), [0.0, 1.0, 3.0], "y"),
        judged("one", (2, 2, 1), [0.0, 1.0, 3.0], "z"),
        judged("two", (1, 2), [0.0, 0.5]),
        judged("right", (1, 2), [1.0, 0.0]),
        judged("split", (1, 2), [0.0, 9.0], "x"),
        judged("split", (2, 1), [0.0, 9.0], "y"),
    ]
    first, second = worst_mistakes(items, std=2.0, mean=1.0, most=5)
    # of `one` the pair a-c, two votes against one, three apart: one pair for each prompt
    assert first["messages"][0]["content"] == "one"
    assert (first["preferred_by_people"], first["preferred_by_model"]) == ("a", "c")
    assert (first["score_of_people_s"], first["score_of_model_s"]) == (-0.5, 1.0)
    assert (first["votes_for_people_s"], first["votes_for_model_s"], first["ties"]) == (2, 1, 0)
    assert first["probability"] == pytest.approx(1 / (1 + math.exp(-3)))
    assert second["messages"][0]["content"] == "two"
    assert len(worst_mistakes(items, 2.0, 1.0, most=1)) == 1


def test_responses_are_scored_once_with_and_without_their_end_token() -> None:
    tokenizer = tokenizer_stage.train(iter(["one two three"] * 9), 300, 2)
    asked: list[PromptGroup] = []

    def score(groups: list[PromptGroup]) -> list[list[float]]:
        """The last token decides, so that only the end token's presence can be seen."""
        asked.extend(groups)
        return [[float(ids[-1]) for ids in group.responses] for group in groups]

    messages = ({"role": "user", "content": "one"},)
    rankings = [
        Ranking(messages, ("one", "two", ""), (1, 2, 3), "x"),
        Ranking(messages, ("two", "three"), (1, 2), "y"),
        Ranking(messages, ("one", "one two three " * 40), (1, 2), "z"),
    ]
    found = judge(rankings, score, tokenizer, 64)
    # what is longer than 64 tokens is left out, and a ranking of one response with it
    assert [item.ranking.annotator for item in found] == ["x", "y"]
    assert sum(len(group.responses) for group in asked) == 4 + 3
    eos = float(tokenizer.eos_token_id)
    assert found[0].scores == [eos] * 3
    assert found[0].tokens[2] == 1
    assert found[0].cut_scores[2] is None
    assert all(cut != eos for cut in found[0].cut_scores)
    assert found[1].cut_scores[0] == found[0].cut_scores[1]
    row = metrics_of(diagnose(found, 1.0, 0))
    assert row["eos_effect"] > 0
    assert set(row) >= {"ece", "human_agreement", "position_correlation"}
