"""Rankings made elsewhere: every layout, every piece of dirt, and the same again."""

import json
from pathlib import Path

import pytest

from labeling_ui.exporting import snapshot
from labeling_ui.importing import import_rankings
from labeling_ui.store import Store
from pipeline.errors import DataError
from pipeline.records import Ranking

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ASK = {"role": "user", "content": "Say something."}


def turn(text):
    return {"role": "assistant", "content": text}


def load(tmp_path, rows, max_bad_fraction=0.0, name="rows.jsonl", **more):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    store = Store(tmp_path / "labels.db")
    return store, import_rankings(store, [str(path)], max_bad_fraction, **more)


def orders(store):
    """Each ranking as (prompt, [responses from best to worst, equals together])."""
    found = []
    for ranking in snapshot(store, 0.15):
        tiers = [
            sorted(t for t, r in zip(ranking.responses, ranking.ranks, strict=True) if r == rank)
            for rank in sorted(set(ranking.ranks))
        ]
        found.append(([m["content"] for m in ranking.messages], tiers))
    return sorted(found)


PAIR_ROWS = {
    "trl text": {"prompt": "Say something.", "chosen": "good", "rejected": "bad"},
    "trl answers as messages": {
        "prompt": [ASK],
        "chosen": [turn("good")],
        "rejected": [turn("bad")],
    },
    "trl whole conversations": {"chosen": [ASK, turn("good")], "rejected": [ASK, turn("bad")]},
    "ultrafeedback": {
        "prompt": "Say something.",
        "chosen": [ASK, turn("good")],
        "rejected": [ASK, turn("bad")],
    },
    "trl implicit prompt": {"chosen": "Say something. good", "rejected": "Say something. bad"},
    "hh-rlhf": {
        "chosen": "\n\nHuman: Say something.\n\nAssistant: good",
        "rejected": "\n\nHuman: Say something.\n\nAssistant: bad\n",
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Say something."}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "typed parts": {
        "chosen_messages": [
            {"role": "user", "content": [{"type": "text", "value": "Say something."}]},
            {"role": "assistant", "content": [{"type": "text", "value": "good"}]},
        ],
        "rejected_messages": [
            {"role": "user", "content": [{"type": "text", "value": "Say something."}]},
            {"role": "assistant", "content": [{"type": "text", "value": "bad"}]},
        ],
    },
    "llmbar": {"input": "Say something.", "output_1": "bad", "output_2": "good", "label": 2},
    "group": {
        "prompt": [ASK],
        "responses": [{"text": "bad", "rank": 7}, {"text": "good", "rank": 0}],
    },
    "group of texts": {"prompt": "Say something.", "responses": ["bad", "good"], "ranks": [2, 1]},
}


@pytest.mark.parametrize("row", PAIR_ROWS.values(), ids=PAIR_ROWS.keys())
def test_each_layout_says_the_same_thing(tmp_path, row):
    store, report = load(tmp_path, [row])
    assert orders(store) == [(["Say something."], [["good"], ["bad"]])]
    assert (report.tally.used, report.tally.dropped, report.stored) == (1, 0, 1)


def test_all_layouts_of_one_ranking_are_one_ranking(tmp_path):
    store, report = load(tmp_path, list(PAIR_ROWS.values()))
    assert len(orders(store)) == 1
    assert report.notes["duplicate rankings merged"] == len(PAIR_ROWS) - 1


UNUSABLE = {
    "a response is empty": {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"},
    "the conversations differ before their last turn": {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: c\n\nAssistant: d",
    },
    "chosen is empty": {"prompt": "a", "chosen": " \n", "rejected": "b"},
    "rejected is not a text": {"prompt": "a", "chosen": "b", "rejected": 5},
    "the prompt is empty": {"prompt": "", "chosen": "b", "rejected": "c"},
    "fewer than 2 different responses": {"prompt": "a", "chosen": "same", "rejected": "same"},
    "a response has no whole number as rank": {"prompt": "a", "responses": [{"text": "x", "rank": True}]},
    "the same response has two ranks": {"prompt": "a", "responses": ["x", "y", "x"], "ranks": [1, 2, 3]},
    "the prompt does not end with a user turn": {"prompt": [ASK, turn("x")], "chosen": "a", "rejected": "b"},
    "the label is neither 1 nor 2": {"input": "a", "output_1": "b", "output_2": "c", "label": 0},
    "no known layout of rankings or pairs": {"text": "hello"},
    "the row is not an object": ["a", "b"],
    "chosen holds a broken character (lone surrogate)": {"prompt": "a", "chosen": "\ud800", "rejected": "b"},
    "no prompt: chosen and rejected have no beginning in common": {"chosen": "abc", "rejected": "xyz"},
    "unknown role 'tool'": {"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"},
}  # fmt: skip


@pytest.mark.parametrize(("reason", "row"), UNUSABLE.items(), ids=UNUSABLE.keys())
def test_what_cannot_be_used_is_counted_by_its_reason(tmp_path, reason, row):
    store, report = load(tmp_path, [row, PAIR_ROWS["trl text"]], max_bad_fraction=0.5)
    assert report.tally.reasons == {reason: 1}
    assert len(orders(store)) == 1


def test_one_response_of_a_group_for_itself_is_no_ranking(tmp_path):
    row = {"prompt": "a", "responses": [{"text": "x", "rank": 1}]}
    with pytest.raises(DataError, match="fewer than 2 different responses"):
        load(tmp_path, [row])


def test_a_group_survives_the_loss_of_an_empty_response(tmp_path):
    row = {"prompt": "a", "responses": ["", "good", "bad"], "ranks": [1, 2, 3]}
    store, report = load(tmp_path, [row])
    assert orders(store) == [(["a"], [["good"], ["bad"]])]
    assert sum(report.notes.values()) == 1


def test_equal_responses_with_equal_ranks_are_merged(tmp_path):
    row = {"prompt": "a", "responses": ["x", "y", "x"], "ranks": [1, 2, 1]}
    store, report = load(tmp_path, [row])
    assert orders(store) == [(["a"], [["x"], ["y"]])]
    assert report.notes["equal responses merged"] == 1


def test_a_ranking_with_all_responses_tied_is_kept_and_counted(tmp_path):
    row = {"prompt": "a", "responses": ["x", "y"], "ranks": [3, 3]}
    store, report = load(tmp_path, [row])
    assert orders(store) == [(["a"], [["x", "y"]])]
    assert report.notes["rankings with all responses tied"] == 1


def test_unpaired_labels_are_refused_with_the_reason(tmp_path):
    row = {"messages": [ASK, turn("x")], "label": True}
    with pytest.raises(DataError, match=r"no usable row in 2\. 2 x an unpaired label \(kto\)"):
        load(tmp_path, [row, row])


def test_too_many_unusable_rows_store_nothing(tmp_path):
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used.*rows\.jsonl:2"):
        load(tmp_path, [PAIR_ROWS["trl text"], {"x": 1}], max_bad_fraction=0.4)
    assert orders(Store(tmp_path / "labels.db")) == []


def test_opposite_opinions_of_nobody_in_particular_are_both_kept(tmp_path):
    there, back = (
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "a", "chosen": "y", "rejected": "x"},
    )
    store, _ = load(tmp_path, [there, back, there])
    assert orders(store) == [(["a"], [["x"], ["y"]]), (["a"], [["y"], ["x"]])]
    _, again = load(tmp_path, [back, there])
    assert again.stored == 0


def test_importing_the_same_again_changes_nothing(tmp_path):
    store, first = load(tmp_path, list(PAIR_ROWS.values()))
    before = snapshot(store, 0.15)
    store, second = load(tmp_path, list(PAIR_ROWS.values()))
    assert snapshot(store, 0.15) == before
    assert second.stored == 0
    assert second.kept == first.kept


def test_our_own_export_comes_back_as_it_left(tmp_path):
    rankings = [
        Ranking((ASK,), ("a", "b", "c"), (2, 1, 2), annotator, round=round, source="app")
        for annotator, round in (("p-1", 1), ("p-2", 1), ("p-1", 2))
    ]
    store, _ = load(tmp_path, [ranking.to_row() for ranking in rankings])
    assert {r.id for r in snapshot(store, 0.15)} == {r.id for r in rankings}


def test_a_missing_file_and_a_demo_name_are_refused(tmp_path):
    store = Store(tmp_path / "labels.db")
    with pytest.raises(DataError, match="does not exist"):
        import_rankings(store, ["./nothing.jsonl"], 0.1)
    with pytest.raises(DataError, match="holds no rankings"):
        import_rankings(store, ["demo:prompts"], 0.1)


REAL = {
    # file: rows used, left out, distinct rankings, strict pairs
    "oasst/rank_groups.jsonl": (107, 0, 107, 356),
    "hh-rlhf/harmless-base_test_first200.jsonl": (199, 1, 199, 199),
    "llamafactory/dpo_en_demo.json": (300, 0, 295, 295),
    "llamafactory/v1_dpo_demo.jsonl": (10, 0, 10, 10),
    "llmbar/Processed/FairEval/dataset.json": (66, 0, 66, 66),
}


@pytest.mark.parametrize(("file", "expected"), REAL.items(), ids=REAL.keys())
def test_real_rankings_are_read_whole(tmp_path, file, expected):
    if not (DATA / file).exists():
        pytest.skip(f"needs {DATA / file}")
    store = Store(tmp_path / "labels.db")
    report = import_rankings(store, [str(DATA / file)], 0.1)
    rankings = snapshot(store, 0.15)
    pairs = sum(len(ranking.strict_pairs) for ranking in rankings)
    assert (report.tally.used, report.tally.dropped, len(rankings), pairs) == expected


def test_real_unpaired_labels_are_refused(tmp_path):
    file = DATA / "llamafactory" / "kto_en_demo.json"
    if not file.exists():
        pytest.skip(f"needs {file}")
    with pytest.raises(DataError, match="unpaired label"):
        import_rankings(Store(tmp_path / "labels.db"), [str(file)], 0.1)


# ---- message trees of Open Assistant -------------------------------------------------------


def message(key, parent, text, role="assistant", rank=None, **more):
    return {
        "message_id": key,
        "parent_id": parent,
        "text": text,
        "role": role,
        "rank": rank,
        **more,
    }


FLAT = [
    message("b", "root", "good", rank=0.0),
    message("root", None, "Say something.", "prompter"),
    message("a", "root", "bad", rank=1.0),
    message("gone", "root", "deleted", rank=2.0, deleted=True),
    message("unranked", "root", "late"),
    message("follow", "b", "And more?", "prompter", rank=0),
    message("other", "b", "Thanks.", "prompter", rank=1),
    message("c", "follow", "more", rank=1),
    message("d", "follow", "less", rank=0),
    message("e", "other", "welcome"),
]
EXPECTED = [
    (["Say something."], [["good"], ["bad"]]),
    (["Say something.", "good", "And more?"], [["less"], ["more"]]),
]


def nested(key=None):
    for row in FLAT:
        if row["parent_id"] == key:
            yield {**row, "replies": list(nested(row["message_id"]))}


def test_messages_of_a_tree_become_groups_wherever_they_stand(tmp_path):
    store, report = load(tmp_path, FLAT)
    assert orders(store) == EXPECTED
    assert report.notes == {
        "deleted messages": 1,
        "replies without a rank": 1,
        "messages whose replies are not ranked": 1,
    }
    (tree,) = nested()
    (tmp_path / "other").mkdir()
    other, _ = load(tmp_path / "other", [{"message_tree_id": "t", "prompt": tree}])
    assert {r.id for r in snapshot(other, 0.15)} == {r.id for r in snapshot(store, 0.15)}


def test_a_message_without_its_parent_is_counted(tmp_path):
    store, report = load(tmp_path, [*FLAT, message("x", "nobody", "lost")], max_bad_fraction=0.5)
    assert report.tally.reasons == {"its parent message is not in the file": 1}
    assert orders(store) == EXPECTED


def test_real_trees_hold_the_groups_that_were_made_from_them(tmp_path):
    files = DATA / "oasst" / "en_trees_50.jsonl", DATA / "oasst" / "rank_groups.jsonl"
    if not all(file.exists() for file in files):
        pytest.skip(f"needs {files[0]}")
    found = []
    for number, file in enumerate(files):
        store = Store(tmp_path / f"{number}.db")
        import_rankings(store, [str(file)], 0.0)
        found.append(orders(store))
    assert len(found[0]) == 107
    assert found[0] == found[1]
