"""Choice, pair and exact match on tiny models, against brute force and hand-worked values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from pipeline.errors import ConfigError, DataError
from pipeline.job import Input
from pipeline.tasks import Task, check_task, fill, read_task
from stages.bbq import Answered, answered, bias_scores
from stages.benchmarks import Asked, choice_row, differences, figures, score_task, shared_places
from stages.likelihood import ask
from stages.models import load_causal_lm, load_tokenizer
from stages.task_data import Item, final_answer, join, read_items
from tests.unit.tiny_policy import make_model

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"


def needs(path: str) -> Path:
    if not (DATA / path).exists():
        pytest.skip(f"{path} is not here")
    return DATA / path


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = make_model(tmp_path_factory.mktemp(request.param) / "m", request.param)
    item = Input("policy", "sha256:1", path=folder)
    model = load_causal_lm(item).eval()
    with torch.no_grad():
        for p in model.parameters():
            # far from uniform, so that an error of one token shows
            p.mul_(3.0)
    return Asked(model, load_tokenizer(item), Accelerator(), 3)


def task_of(**values: Any) -> Task:
    return Task.model_validate({"name": "t", "data": "./x.jsonl", **values})


CHOICE = {"scorer": "choice", "prompt": "Say {a}", "choices": ["{b}", "two please"], "answer": "y"}


def items_of(task: Task, rows: list[dict[str, Any]], tmp_path: Path) -> list[Item]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_items(task.model_copy(update={"data": str(path)}), None)[0]


def slow_logprob(asked: Asked, context: str, target: str) -> list[float]:
    """One forward for each token, on ids that are put together here."""
    tokenizer = asked.tokenizer
    start = [tokenizer.bos_token_id]
    before = tokenizer(context, add_special_tokens=False)["input_ids"] if context else []
    whole = tokenizer(context + target, add_special_tokens=False)["input_ids"]
    found = []
    for at in range(len(before), len(whole)):
        ids = torch.tensor([start + whole[:at]])
        with torch.no_grad():
            logits = asked.model(input_ids=ids).logits[0, -1].double()
        found.append(float(logits.log_softmax(-1)[whole[at]]))
    return found


# ---- choice --------------------------------------------------------------------------------


def test_choices_are_scored_as_by_hand(asked: Asked, tmp_path: Path) -> None:
    task = task_of(**CHOICE)
    rows = [{"a": "red", "b": "one blue", "y": 0}, {"a": "blue 3", "b": "green and red", "y": "B"}]
    items = items_of(task, rows, tmp_path)
    found = score_task(task, items, "", asked)
    for item, row in zip(items, found, strict=True):
        each = [slow_logprob(asked, item.prompt, f" {target}") for target in item.targets]
        sums = [math.fsum(x) for x in each]
        assert row["logprobs"] == pytest.approx(sums, abs=1e-4)
        per_token = [s / len(x) for s, x in zip(sums, each, strict=True)]
        per_byte = [s / len(t) for s, t in zip(sums, item.targets, strict=True)]
        assert row["accuracy"] == item.right[sums.index(max(sums))]
        assert row["accuracy_per_token"] == item.right[per_token.index(max(per_token))]
        assert row["accuracy_per_byte"] == item.right[per_byte.index(max(per_byte))]
        right = item.right.index(True)
        share = math.exp(sums[right]) / sum(map(math.exp, sums))
        assert row["true_probability"] == pytest.approx(share, abs=1e-5)


def test_mc1_and_mc2_of_truthfulqa_by_hand() -> None:
    """Two true answers with odds 4 and 1, two false ones with 3 and 2: MC2 is 5/10."""
    item = Item("i", None, "Q", ("a", "b", "c", "d"), (True, False, False, True), {})
    row = choice_row(item, [[math.log(4)], [math.log(3)], [math.log(2)], [math.log(1)]], "none")
    assert row["true_probability"] == pytest.approx(0.5)
    assert row["accuracy"] is True
    false_best = choice_row(item, [[math.log(2)], [math.log(3)], [0.0], [0.0]], "none")
    assert false_best["accuracy"] is False


def test_length_decides_only_where_it_is_asked_to() -> None:
    """Sums -4 and -3 over 4 and 1 tokens: per token -1 beats -3. Bytes 8 and 1: -0.5 beats -3."""
    item = Item("i", None, "Q", ("long one", "x"), (True, False), {})
    logprobs = [[-1.0] * 4, [-3.0]]
    assert choice_row(item, logprobs, "none")["picked"] == 1
    assert choice_row(item, logprobs, "tokens")["picked"] == 0
    assert choice_row(item, logprobs, "bytes")["picked"] == 0


def test_a_choice_has_the_chance_of_its_number_of_right_answers(
    asked: Asked, tmp_path: Path
) -> None:
    task = task_of(**{**CHOICE, "choices": "c"})
    rows = [
        {"a": "red", "c": ["one", "two"], "y": [1, 0]},
        {"a": "blue", "c": ["one", "two", "three", "blue"], "y": [1, 0, 0, 0]},
    ]
    items = items_of(task, rows, tmp_path)
    found = figures(task, items, score_task(task, items, "", asked), 0)
    assert found["accuracy"]["chance"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert found["accuracy"]["n"] == 2


def test_a_text_longer_than_the_model_reads_loses_its_beginning_and_is_marked(
    asked: Asked, tmp_path: Path
) -> None:
    task = task_of(**CHOICE)
    long = " ".join(["red"] * 100)
    items = items_of(
        task, [{"a": long, "b": "one", "y": 0}, {"a": "red", "b": "one", "y": 0}], tmp_path
    )
    found = {row["item"]: row for row in score_task(task, items, "", asked)}
    cut = [item for item in items if len(item.prompt) > 100]
    assert [("reason" in found[item.id]) for item in items] == [item in cut for item in items]


# ---- pair ----------------------------------------------------------------------------------


def test_pairs_are_scored_as_by_hand(asked: Asked, tmp_path: Path) -> None:
    task = task_of(scorer="pair", more="{m}", less="{l}")
    items = items_of(task, [{"m": "Say red one please", "l": "Say blue one please"}], tmp_path)
    [row] = score_task(task, items, "", asked)
    sums = [math.fsum(slow_logprob(asked, "", text)) for text in items[0].targets]
    assert row["logprobs"] == pytest.approx(sums, abs=1e-4)
    assert row["more_likely"] == float(sums[0] > sums[1])


def test_shared_tokens_leave_out_what_differs(asked: Asked, tmp_path: Path) -> None:
    assert shared_places([1, 2, 3, 4], [1, 9, 9, 3, 4]) == [(0, 0), (2, 3), (3, 4)]
    task = task_of(scorer="pair", more="{m}", less="{l}", tokens="shared")
    items = items_of(task, [{"m": "Say red one please", "l": "Say blue one please"}], tmp_path)
    [row] = score_task(task, items, "", asked)
    whole = [slow_logprob(asked, "", text) for text in items[0].targets]
    ids = [
        asked.tokenizer(text, add_special_tokens=False)["input_ids"] for text in items[0].targets
    ]
    spots = shared_places(*ids)
    assert 0 < len(spots) < len(ids[0])
    by_hand = [math.fsum(whole[side][spot[side]] for spot in spots) for side in (0, 1)]
    assert row["logprobs"] == pytest.approx(by_hand, abs=1e-4)


def test_a_pair_that_is_equal_counts_one_half(asked: Asked, tmp_path: Path) -> None:
    task = task_of(scorer="pair", more="{m}", less="{l}")
    items = items_of(task, [{"m": "Say red", "l": "Say red"}], tmp_path)
    rows = score_task(task, items, "", asked)
    assert figures(task, items, rows, 0)["more_likely"]["value"] == 0.5


# ---- exact ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("so 2 + 2 = <<2+2=4>>4.\n#### 1,234.50", "1234.5"),
        ("#### -0", "0"),
        ("#### $18", "18"),
        ("first 3, then 007", "7"),
        ("#### 5 apples\nQuestion: 9", "5"),
        ("nothing", ""),
        ("#### Blue ", "blue"),
        ("it is .50", "0.5"),
    ],
)
def test_final_answers_are_written_one_way(text: str, final: str) -> None:
    task = task_of(scorer="exact", prompt="{q}", answer="{a}", final="####", stop=["\nQuestion:"])
    assert final_answer(text, task) == final


def test_without_a_mark_the_whole_answer_counts() -> None:
    task = task_of(scorer="exact", prompt="{q}", answer="{a}")
    assert final_answer("  The  Red Fox. ", task) == "the red fox"
    assert final_answer("1,000", task) == "1000"


def test_a_model_that_writes_the_answer_is_right(asked: Asked, tmp_path: Path) -> None:
    """What the model says greedily is made the right answer of one item, and not of the other."""
    task = task_of(scorer="exact", prompt="{q}", answer="{a}", max_response_tokens=6)
    rows = [{"q": "Say red", "a": "?"}, {"q": "Say blue", "a": "?"}]
    said = {r["item"]: r for r in score_task(task, items_of(task, rows, tmp_path), "", asked)}
    items = items_of(task, rows, tmp_path)
    text = said[items[0].id]["response"]
    right = items[0]._replace(targets=(text,))
    found = score_task(task, [right, items[1]], "", asked)
    assert [row["exact_match"] for row in found] == [bool(text.strip()), False]


def test_examples_are_never_scored_and_show_the_way_to_the_answer(tmp_path: Path) -> None:
    rows = [{"q": f"Q{i}", "a": f"because {i}\n#### {i}"} for i in range(6)]
    values = {"scorer": "exact", "prompt": "{q}", "answer": "{a}", "final": "####", "shots": 2}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_of(**values).model_copy(update={"data": str(path)})
    items, shots, _ = read_items(task, None)
    assert len(items) == 4
    shown = [i for i in range(6) if f"Q{i} because {i}\n#### {i}\n\n" in shots]
    assert len(shown) == 2
    assert not {item.prompt for item in items} & {f"Q{i}" for i in shown}
    short = task.model_copy(update={"chain_of_thought": False})
    in_order = sorted(shown, key=lambda i: shots.index(f"Q{i}"))
    assert read_items(short, None)[1] == "".join(f"Q{i} #### {i}\n\n" for i in in_order)


# ---- BBQ -----------------------------------------------------------------------------------


def bbq_row(condition: str, polarity: str) -> dict[str, Any]:
    return {
        "context_condition": condition,
        "question_polarity": polarity,
        "answer_info": {"ans0": ["x", "old"], "ans1": ["y", "nonOld"], "ans2": ["z", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["old"]},
    }


def test_a_biased_answer_is_the_stereotype_or_its_mirror() -> None:
    assert answered(bbq_row("ambig", "neg"), 0, False).is_biased is True
    assert answered(bbq_row("ambig", "neg"), 1, False).is_biased is False
    assert answered(bbq_row("ambig", "nonneg"), 1, False).is_biased is True
    assert answered(bbq_row("ambig", "neg"), 2, True).is_biased is None
    with pytest.raises(DataError, match="bias: bbq needs the columns"):
        answered({"question_polarity": "neg"}, 0, False)


def test_the_bias_scores_are_those_of_the_paper() -> None:
    """Ambiguous: 10 items, 4 unknown (right), 5 biased and 1 counter of 6: 0.6 * (2 * 5/6 - 1) = 0.4.

    Disambiguated: 8 known of 10, 6 of them biased: 2 * 6/8 - 1 = 0.5, whatever the accuracy.
    """
    ambig = [Answered("ambig", True, None)] * 4
    ambig += [Answered("ambig", False, True)] * 5 + [Answered("ambig", False, False)]
    clear = [Answered("disambig", False, None)] * 2
    clear += [Answered("disambig", True, True)] * 6 + [Answered("disambig", True, False)] * 2
    found = bias_scores(ambig + clear, 0)
    assert found["bias_ambig"]["value"] == pytest.approx(0.4)
    assert found["bias_disambig"]["value"] == pytest.approx(0.5)
    assert found["bias_ambig"]["n"] == 6
    assert found["bias_ambig"]["low"] < 0.4 < found["bias_ambig"]["high"]


# ---- task files ----------------------------------------------------------------------------


def test_every_shipped_task_file_is_whole(tmp_path: Path) -> None:
    files = sorted((ROOT / "configs" / "tasks").glob("*.yaml"))
    assert {"bbq", "truthfulqa_mc", "crows_pairs", "gsm8k"} <= {read_task(f).name for f in files}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: t\nscorer: choise\ndata: x.jsonl\n", r"scorer: input should be .*\[.*t\.yaml:2\]"),
        (
            "name: t\nscorer: pair\ndata: x.jsonl\nmroe: a\nless: b\n",
            r"mroe: unknown key; did you mean 'more'\?  \[.*:4\]",
        ),
        ("name: t\nscorer: pair\ndata: x.jsonl\n", r"scorer: pair needs more"),
        (
            "name: t\nscorer: pair\ndata: x.jsonl\nmore: a\nless: b\nshots: 2\n",
            r"shots belongs to scorer: exact",
        ),
        ("name: t\nscorer: pair\nmore: a\nless: b\n", r"data: is required"),
        ("name: t\n  x: [", r"t\.yaml:2: not valid YAML"),
    ],
)
def test_a_broken_task_file_names_the_line_and_the_key(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        check_task(file)


def test_data_that_is_not_there_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text('name: t\nscorer: pair\ndata: ./gone.csv\nmore: "{a}"\nless: "{b}"\n')
    with pytest.raises(DataError, match=r"t\.yaml:3: data: .*gone\.csv does not exist"):
        check_task(file)
    (tmp_path / "gone.csv").write_text("a,c\nx,y\n")
    check_task(file)
    with pytest.raises(
        DataError, match=r"task t: more, less: .*gone\.csv:2: no column 'b'; the row has a, c"
    ):
        read_items(read_task(file), None)


def test_a_row_whose_answer_names_no_choice_is_an_error(tmp_path: Path) -> None:
    task = task_of(**CHOICE)
    with pytest.raises(DataError, match=r"answer: .*rows\.jsonl:1: 7 names none of the 2 choices"):
        items_of(task, [{"a": "x", "b": "z", "y": 7}], tmp_path)


def test_a_limit_takes_the_same_items_whatever_the_order(tmp_path: Path) -> None:
    task = task_of(**CHOICE)
    rows = [{"a": f"r{i}", "b": "z", "y": 0} for i in range(20)]
    whole = items_of(task, rows, tmp_path)
    turned = items_of(task, rows[::-1], tmp_path)
    assert [i.id for i in whole] == [i.id for i in turned]
    path = tmp_path / "rows.jsonl"
    few, _, _ = read_items(task.model_copy(update={"data": str(path)}), 5)
    assert few == whole[:5]


def test_templates_reach_into_columns() -> None:
    assert fill("{a.b} and {c} {not one}", {"a": {"b": 1}, "c": "x"}) == "1 and x {not one}"
    assert join("Q: x\nA:", "yes") == "Q: x\nA: yes"


def test_the_context_ends_where_the_target_begins(asked: Asked) -> None:
    found = ask(asked.tokenizer, "Say red", " one please")
    ids = asked.tokenizer("Say red one please", add_special_tokens=False)["input_ids"]
    assert found.context + found.target == [asked.tokenizer.bos_token_id, *ids]
    assert asked.tokenizer.decode(found.target) == " one please"


def test_differences_are_paired() -> None:
    rows = [{"item": i, "accuracy": i % 2 == 0} for i in range(10)]
    found = differences(rows, rows, 0)["accuracy"]
    assert (found["value"], found["low"], found["high"]) == (0, 0, 0)


# ---- published data ------------------------------------------------------------------------


def test_bbq_items_all_have_a_stereotyped_answer() -> None:
    file = needs("bbq/Age.jsonl")
    task = read_task(ROOT / "configs/tasks/bbq.yaml")
    task = task.model_copy(update={"data": str(file), "subset": None, "split": None})
    items, _, tally = read_items(task, None)
    assert len(items) + tally.merged == 3680
    known = [
        answered(item.row, 0 if item.row["answer_info"]["ans0"][1] != "unknown" else 1, False)
        for item in items
    ]
    assert all(one.is_biased is not None for one in known)
    # the right answer of an ambiguous context is always "unknown"
    for item in items[:200]:
        if item.group == "ambig":
            right = item.right.index(True)
            assert item.row["answer_info"][f"ans{right}"][1] == "unknown"


def test_crows_pairs_and_gsm8k_are_read_as_they_are() -> None:
    pairs = read_task(ROOT / "configs/tasks/crows_pairs.yaml")
    pairs = pairs.model_copy(update={"data": str(needs("crows_pairs/crows_pairs_anonymized.csv"))})
    items, _, tally = read_items(pairs, None)
    assert len(items) + tally.merged == 1508
    sums = read_task(ROOT / "configs/tasks/gsm8k.yaml")
    data = {
        "data": str(needs("gsm8k/train.jsonl")),
        "subset": None,
        "split": None,
        "shots_split": None,
    }
    items, shots, _ = read_items(sums.model_copy(update=data), None)
    assert len(items) == 7473 - 4
    assert shots.count("####") == 4
    assert all(final_answer(item.targets[0], sums) for item in items)
