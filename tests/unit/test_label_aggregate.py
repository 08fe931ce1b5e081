"""Merging annotators: every mode by hand, and the loss that `all` and `soft` have in common."""

import json
from math import exp, log

import pytest

from labeling_ui.aggregate import MODES, group_rankings, group_rows, pair_rows
from pipeline.records import Ranking, content_id

ASK = ({"role": "user", "content": "q"},)
# in the order of their ids, so that the places below are those of a group
A, B, C = sorted("abc", key=lambda t: content_id("response", content_id("prompt", list(ASK)), t))


def ranking(name, order, **more):
    """`order` maps a response to its rank."""
    return Ranking(ASK, tuple(order), tuple(order.values()), name, **more)


def pairs(rankings, mode):
    rows, dropped = pair_rows(group_rankings(rankings)[0], mode)
    shown = [
        (r["chosen"][0]["content"], r["rejected"][0]["content"], r["label"], r["weight"])
        for r in rows
    ]
    return shown, dict(dropped)


# ab: two for a, one tie. ac: two for a, one for c. bc: one each, one tie
THREE = [
    ranking("ann", {A: 1, B: 2, C: 3}),
    ranking("bob", {C: 2, A: 1, B: 2}),
    ranking("cat", {B: 2, C: 1, A: 2}),
]


def test_all_keeps_every_strict_pair_with_a_share_of_the_weight():
    found, dropped = pairs(THREE, "all")
    third = 1 / 3
    expected = [(A, B), (A, B), (A, C), (A, C), (C, A), (B, C), (C, B)]
    assert found == [(*pair, 1.0, third) for pair in expected]
    assert dropped == {"ties": 2}
    flat = ranking("ann", {A: 1, B: 1, C: 1})
    assert pairs([flat], "all") == ([], {"ties": 3})


def test_soft_has_one_row_for_every_two_responses():
    found, dropped = pairs(THREE, "soft")
    assert found == [
        (A, B, pytest.approx(2.5 / 3), 1.0),
        (A, C, pytest.approx(2 / 3), 1.0),
        (B, C, 0.5, 1.0),
    ]
    assert dropped == {}


def test_majority_is_more_than_half_of_all_annotators():
    found, dropped = pairs(THREE, "majority")
    assert found == [(A, B, 1.0, 1.0), (A, C, 1.0, 1.0)]
    assert dropped == {"pairs without a majority": 1}
    # one for a, one tie: half is not more than half
    assert pairs([THREE[0], ranking("bob", {A: 1, B: 1, C: 2})], "majority")[0] == [
        (A, C, 1.0, 1.0),
        (B, C, 1.0, 1.0),
    ]


def test_unanimous_allows_no_tie():
    found, dropped = pairs(THREE, "unanimous")
    assert found == []
    assert dropped == {"pairs that are not unanimous": 3}
    both = [ranking("ann", {A: 2, B: 1, C: 1}), ranking("bob", {A: 3, B: 1, C: 1})]
    found, dropped = pairs(both, "unanimous")
    assert found == [(B, A, 1.0, 1.0), (C, A, 1.0, 1.0)]
    assert dropped == {"pairs that all annotators tie": 1}


def test_with_one_annotator_all_modes_give_the_same_strict_pairs():
    results = [pairs([THREE[0]], mode) for mode in MODES]
    assert results == [([(A, B, 1.0, 1.0), (A, C, 1.0, 1.0), (B, C, 1.0, 1.0)], {})] * 4


def loss(rows, scores):
    total = 0.0
    for chosen, rejected, label, weight in rows:
        p = 1 / (1 + exp(scores[rejected] - scores[chosen]))
        total -= weight * (label * log(p) + (1 - label) * log(1 - p))
    return total


def test_all_has_the_loss_of_soft_labels_and_ties_are_the_difference():
    scores = {A: 0.3, B: -0.9, C: 1.7}
    strict = [
        THREE[0],
        ranking("bob", {A: 3, B: 1, C: 2}),
        ranking("cat", {A: 2, B: 3, C: 1}),
    ]
    all_loss, soft_loss = (loss(pairs(strict, mode)[0], scores) for mode in ("all", "soft"))
    assert all_loss == pytest.approx(soft_loss, abs=1e-12)
    all_loss, soft_loss = (loss(pairs(THREE, mode)[0], scores) for mode in ("all", "soft"))
    tied = [(A, B, 0.5, 1 / 3), (B, C, 0.5, 1 / 3)]
    assert soft_loss - all_loss == pytest.approx(loss(tied, scores), abs=1e-12)


def test_rows_say_where_they_come_from():
    (group,), _ = group_rankings(THREE)
    rows, _ = pair_rows([group], "all")
    assert [row["annotator"] for row in rows] == ["ann", "bob", "ann", "bob", "cat", "ann", "cat"]
    ids = {found.annotator: found.id for found in THREE}
    assert all(row["ranking_id"] == ids[row["annotator"]] for row in rows)
    for mode in MODES:
        for row in pair_rows([group], mode)[0]:
            assert row.keys() == rows[0].keys()
            assert row["prompt"] == list(ASK)
            assert row["chosen"][0]["role"] == "assistant"
            assert (row["group_id"], row["prompt_id"]) == (group.id, THREE[0].prompt_id)
            assert (row["votes"], row["split"]) == (3, "train")
            assert (row["annotator"] is None) == (row["ranking_id"] is None) == (mode != "all")


def test_groups_hold_every_rank_vector_in_one_order():
    (row,) = group_rows(group_rankings(THREE[::-1])[0])
    assert row["responses"] == [A, B, C]
    assert row["annotators"] == ["ann", "bob", "cat"]
    assert row["ranks"] == [[1, 2, 3], [1, 2, 2], [2, 2, 1]]
    assert row["ranking_ids"] == [found.id for found in THREE]
    assert json.loads(json.dumps(row)) == row


def test_the_order_of_the_input_changes_nothing():
    other = [
        Ranking(({"role": "user", "content": f"q{i}"},), ("x", "y"), (1, 2), "ann", "heldout")
        for i in range(5)
    ]
    for mode in MODES:
        one = pair_rows(group_rankings(THREE + other)[0], mode)
        assert one == pair_rows(group_rankings((THREE + other)[::-1])[0], mode)
    groups, _ = group_rankings(THREE + other)
    assert [group.id for group in groups] == sorted(group.id for group in groups)
    assert sorted(group.split for group in groups) == ["heldout"] * 5 + ["train"]


def test_other_responses_of_the_same_prompt_are_another_group():
    groups, _ = group_rankings([THREE[0], ranking("bob", {A: 1, B: 2})])
    assert sorted(len(group.responses) for group in groups) == [2, 3]
    assert all(len(group.ranks) == 1 for group in groups)


def test_the_last_word_of_an_annotator_counts_and_the_others_are_counted():
    later = ranking("ann", {A: 3, B: 2, C: 1}, round=2)
    (group,), dropped = group_rankings([later, *THREE])
    assert dict(dropped) == {"rankings that their annotator made again later": 1}
    assert group.ranks[0] == (3, 2, 1)
    assert group.ranking_ids[0] == later.id


def test_a_group_is_a_task_for_the_measures():
    (group,), _ = group_rankings(THREE)
    voices = group.judgements()
    assert [voice.annotator for voice in voices] == ["ann", "bob", "cat"]
    assert voices[2].ranks == (2, 2, 1)
    assert {voice.task.id for voice in voices} == {group.id}
    assert voices[0].task.lengths == (1, 1, 1)
    assert voices[0].shown is None
