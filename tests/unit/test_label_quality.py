"""What is said of annotators: hand-worked rows, slow second ways, and weights by closed form."""

from dataclasses import replace
from itertools import combinations
from math import log

import numpy as np
import pytest

from labeling_ui.agreement import pairwise_agreement
from labeling_ui.judgements import Estimate, Judgement, Task, wilson
from labeling_ui.quality import exclusions_from_gold, quality, weights_from_gold
from pipeline.errors import DataError

T = Task("t", "p1")
U = Task("u", "p2")
GOLD = Task("g", "p3", gold=(1, 2, 3, 3))


def of(name, judgements):
    return {found.annotator: found for found in quality(judgements)}[name]


def test_nobody_has_no_quality():
    assert quality([]) == []


def test_one_annotator_by_hand():
    made = [
        Judgement(T, "ann", (1, 2, 2), (2, 0, 1), 10.0),
        Judgement(U, "ann", (1, 2), (0, 1), 50.0),
        Judgement(GOLD, "ann", (2, 1, 3, 3), None, 20.0),
        Judgement(Task("s", "p4"), "ann", None, None, 99.0),
        Judgement(T, "ann", (1, 3, 2), (0, 1, 2), 1.0, repeat=True),
        Judgement(T, "bob", (3, 2, 1)),
        Judgement(T, "cat", (1, 1, 2)),
    ]
    ann = of("ann", made)
    assert (ann.rankings, ann.skips, ann.skip_rate) == (3, 1, 0.25)
    # ties: 1 of 3, 0 of 1, 1 of 6
    assert ann.tie_rate == 2 / 10
    assert ann.median_seconds == 20.0
    # gold pairs without the tie of the last two: 01 wrong, 02 03 12 13 right
    assert (ann.gold_accuracy.value, ann.gold_accuracy.count, ann.gold_accuracy.prompts) == (
        0.8,
        5,
        1,
    )
    assert (ann.gold_accuracy.low, ann.gold_accuracy.high) == wilson(0.8, 1)
    # with bob on 01 and 02: both differ; with cat on 02: the same
    assert (ann.agreement.value, ann.agreement.count) == (1 / 3, 3)
    # the repeat is strict everywhere, the first answer on 01 and 02: the same
    assert (ann.self_consistency.value, ann.self_consistency.count) == (1.0, 2)
    # shown first: the third of t, which is not best; the first of u, which is
    assert (ann.first_place_wins.value, ann.first_place_wins.count) == (1 / 2, 2)
    assert ann.first_place_chance == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_what_was_never_asked_is_none_and_not_zero():
    bob = of("bob", [Judgement(T, "bob", None)])
    assert (bob.rankings, bob.skips, bob.skip_rate) == (0, 1, 1.0)
    rest = (bob.gold_accuracy, bob.agreement, bob.self_consistency, bob.tie_rate)
    assert rest == (None,) * 4
    assert (bob.median_seconds, bob.first_place_wins, bob.first_place_chance) == (None,) * 3


def test_somebody_with_repeats_alone_has_no_skip_rate_to_speak_of():
    found = of("bob", [Judgement(T, "bob", (1, 2, 3), repeat=True)])
    assert (found.rankings, found.skips, found.skip_rate) == (0, 0, 0.0)


def test_a_tie_in_a_gold_answer_counts_one_half():
    assert of("a", [Judgement(GOLD, "a", (1, 1, 1, 1))]).gold_accuracy.value == 0.5
    assert of("a", [Judgement(GOLD, "a", (4, 3, 1, 1))]).gold_accuracy.value == 0.0
    assert of("a", [Judgement(GOLD, "a", (1, 2, 4, 3))]).gold_accuracy.value == 1.0


def test_a_repeat_of_a_gold_item_is_not_scored_again():
    made = [Judgement(GOLD, "a", (1, 2, 3, 3))]
    again = Judgement(GOLD, "a", (4, 3, 1, 1), repeat=True)
    assert of("a", [*made, again]).gold_accuracy == of("a", made).gold_accuracy
    assert of("a", [*made, again]).self_consistency.value == 0.0


def test_gold_items_are_no_part_of_the_agreement_with_others():
    made = [Judgement(GOLD, name, (1, 2, 3, 3)) for name in "ab"]
    assert of("a", made).agreement is None


def test_the_first_place_shares_its_win_among_those_tied_best():
    made = [Judgement(T, "a", ranks, (0, 1, 2)) for ranks in ((1, 1, 2),)]
    assert of("a", made).first_place_wins.value == 0.5
    made = [Judgement(T, "a", (1, 1, 1), (0, 1, 2))]
    assert of("a", made).first_place_wins.value == of("a", made).first_place_chance


def test_agreement_with_others_is_that_of_every_other_annotator():
    rng = np.random.default_rng(0)
    made = []
    for i in range(60):
        size = int(rng.integers(2, 6))
        task = Task(f"t{i}", f"p{i // 2}")
        for name in "abcd"[: rng.integers(1, 5)]:
            made.append(Judgement(task, name, tuple(rng.integers(1, 4, size).tolist())))
    counts = {}
    for one, two in combinations(made, 2):
        if one.task.id != two.task.id:
            continue
        for i, j in combinations(range(len(one.ranks)), 2):
            product = (one.ranks[i] - one.ranks[j]) * (two.ranks[i] - two.ranks[j])
            for name in (one.annotator, two.annotator):
                same, total = counts.get(name, (0, 0))
                counts[name] = (same + (product > 0), total + (product != 0))
    for found in quality(made):
        same, total = counts[found.annotator]
        assert (found.agreement.value, found.agreement.count) == (same / total, total)
        assert found.agreement.low < found.agreement.value < found.agreement.high
        assert found.agreement.prompts > 5
    pooled = sum(same for same, _ in counts.values()) / sum(total for _, total in counts.values())
    assert pairwise_agreement(made).value == pytest.approx(pooled)


def test_a_careless_annotator_stands_out():
    rng = np.random.default_rng(1)
    made = []
    for i in range(150):
        good = rng.normal(size=4)
        gold = tuple((np.argsort(np.argsort(-good)) + 1).tolist())
        task = Task(f"t{i}", f"p{i}", gold=gold if i < 30 else None)
        for name, noise in (("able", 0.3), ("fair", 0.8), ("careless", 50.0)):
            seen = good + noise * rng.normal(size=4)
            ranks = tuple((np.argsort(np.argsort(-seen)) + 1).tolist())
            made.append(Judgement(task, name, ranks))
    able, careless, fair = quality(made)
    assert able.gold_accuracy.low > careless.gold_accuracy.high
    assert careless.agreement.low < 0.5 < careless.agreement.high
    assert fair.agreement.low > careless.agreement.high
    weights = weights_from_gold([able, careless, fair])
    assert weights["able"] > 1 > weights["fair"] > weights["careless"] >= 0
    assert exclusions_from_gold([able, careless, fair], 0.65) == {
        "able": 1.0,
        "careless": 0.0,
        "fair": 1.0,
    }


# ---- weights -------------------------------------------------------------------------------


def graded(name, accuracy, items):
    row = of(name, [Judgement(T, name, (1, 2))])
    gold = Estimate(accuracy, 0, 1, items * 6, items) if items else None
    return replace(row, gold_accuracy=gold)


def test_weights_by_hand():
    # all: (9 + 6 + 1) / (10 + 10 + 2) = 8/11; with 8 items of prior: (9 + 64/11) / 18 = 163/198 and
    # (6 + 64/11) / 18 = 130/198
    weights = weights_from_gold([graded("a", 0.9, 10), graded("b", 0.6, 10), graded("c", 0, 0)])
    typical = log(8 / 3)
    assert weights["a"] == pytest.approx(log(163 / 35) / typical)
    assert weights["b"] == pytest.approx(log(130 / 68) / typical)
    assert weights["c"] == 1.0
    assert weights["a"] > 1 > weights["b"] > 0


def test_without_gold_all_weigh_the_same():
    assert weights_from_gold([graded("a", 0, 0), graded("b", 0, 0)]) == {"a": 1.0, "b": 1.0}
    assert exclusions_from_gold([graded("a", 0, 0)], 0.99) == {"a": 1.0}
    assert weights_from_gold([]) == {}


def test_below_chance_weighs_nothing_and_never_less():
    good = [graded(f"good {i}", 0.95, 50) for i in range(5)]
    assert weights_from_gold([*good, graded("bad", 0.1, 50)])["bad"] == 0.0


def test_more_gold_items_move_a_weight_further():
    others = [graded("others", 0.8, 1000)]
    weights = [weights_from_gold([*others, graded("x", 1.0, n)])["x"] for n in (1, 10, 100)]
    assert 1 < weights[0] < weights[1] < weights[2] < 4
    assert exclusions_from_gold([*others, graded("x", 0.0, 1)], 0.7)["x"] == 1.0
    assert exclusions_from_gold([*others, graded("x", 0.0, 20)], 0.7)["x"] == 0.0


def test_gold_answers_that_contradict_everybody_are_refused():
    with pytest.raises(DataError, match=r"no better than chance.*\n.*Check the gold answers"):
        weights_from_gold([graded("a", 0.3, 20), graded("b", 0.4, 20)])
