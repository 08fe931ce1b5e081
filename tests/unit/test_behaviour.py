"""evaluate flags a policy that writes garbage, one that says the same to everybody, and no sound one.

Everything runs through the stage's own `run`, on a tiny sft model that has learned to answer.
"""

from __future__ import annotations

import json
import math
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import StageError
from pipeline.job import Input, Job, Out
from pipeline.records import Prompt, read_jsonl, write_jsonl
from pipeline.settings import Settings
from stages import evaluate, rules
from stages.answering import Answers
from stages.chat import encode_completion, encode_prompt
from stages.context_window import DEPTHS, KEYS, last_readable, needle_asks
from stages.models import contract_of, load_causal_lm, load_tokenizer, save_model
from stages.response_defects import find_alarms, measures, surprise
from tests.unit.tiny_policy import WORDS, conversation, make_model

SENTENCE = "red and blue please"
PROMPTS = 24


def length(messages: list[dict[str, Any]], response: str) -> float:
    return float(len(response))


def half(messages: list[dict[str, Any]], response: str) -> float:
    return 0.5 if len(response) % 2 else 0.25


def two(messages: list[dict[str, Any]], response: str) -> float:
    return 2.0


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        EntryPoint(name, f"{__name__}:{name}", rules.GROUP) for name in ("length", "half", "two")
    )
    monkeypatch.setattr(rules, "entry_points", lambda group: points.select(group=group))


def answer_to(i: int) -> str:
    return f"{WORDS[i % 6]} {i} {WORDS[i * 5 % 6]}"


def teach(folder: Path, base: Path, answers: dict[int, str], steps: int, seed: int = 0) -> Path:
    """The model of `base` trained to give these answers."""
    item = Input("model", "sha256:1", path=base)
    model, tokenizer = load_causal_lm(item), load_tokenizer(item)
    rows = []
    for i, text in answers.items():
        prompt = encode_prompt(tokenizer, list(conversation(i)))
        rows.append((prompt, encode_completion(tokenizer, text, eos=True)))
        # plain text as well, as in pretraining
        document = encode_completion(tokenizer, f"{answer_to(i)} {answer_to(i + 1)}", eos=True)
        rows.append((document[:1], document[1:]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        pick = [rows[i] for i in torch.randperm(len(rows), generator=generator)[:24].tolist()]
        width = max(len(p) + len(c) for p, c in pick)
        ids = torch.full((len(pick), width), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (p, c) in enumerate(pick):
            ids[row, : len(p) + len(c)] = torch.tensor(p + c)
            labels[row, len(p) : len(p) + len(c)] = torch.tensor(c)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """sft: answers as taught. sound: the same, taught a little more. repeats: one sentence to everybody.

    garbage: every token is equally probable.
    """
    folder = tmp_path_factory.mktemp("world")
    base = make_model(folder / "base")
    taught = {i: answer_to(i) for i in range(60)}
    sft = teach(folder / "sft", base, taught, 150)
    garbage = load_causal_lm(Input("m", "sha256:1", path=base))
    with torch.no_grad():
        for parameter in garbage.parameters():
            parameter.zero_()
    save_model(garbage, load_tokenizer(Input("m", "sha256:1", path=base)), folder / "garbage")
    prompts = folder / "prompts"
    prompts.mkdir()
    rows = [Prompt(conversation(i), "test").to_row() for i in range(PROMPTS)]
    write_jsonl(prompts / "prompts.jsonl", rows)
    text = folder / "text.jsonl"
    write_jsonl(text, [{"text": f"{answer_to(i)} {answer_to(i + 1)}"} for i in range(60, 100)])
    return {
        "sft": sft,
        "sound": teach(folder / "sound", sft, taught, 20, seed=1),
        "repeats": teach(folder / "repeats", sft, dict.fromkeys(range(60), SENTENCE), 80),
        "garbage": folder / "garbage",
        "prompts": prompts,
        "text": text,
    }


def evaluated(
    world: dict[str, Path], policy: str, work: Path, **settings: Any
) -> tuple[dict[str, Any], Path]:
    work.mkdir(parents=True, exist_ok=True)
    own = {"judge": "rule", "rule": "length", "max_response_tokens": 12, **settings}
    given = ("tasks", "refusal_prompts", "refusal_annotations", "toxicity_prompts")
    sources = {name: (str(own[name]),) for name in given if name in own}
    tree = Settings.model_validate(
        {
            "model": {"base": str(world["sft"]), "precision": "fp32"},
            "sample": {"prompts": "demo:prompts"},
            "evaluate": {**own, "text": str(world["text"]), **sources},
        }
    )
    item = Input("policy", "sha256:1", path=world[policy])
    contract = {**contract_of(load_tokenizer(item)), "max_length": 64}
    inputs = {
        "policy": Input("policy", "sha256:1", path=world[policy], contract=contract),
        "sft": Input("sft", "sha256:2", path=world["sft"], contract=contract),
        "prompts": Input("prompts", "sha256:3", path=world["prompts"]),
        "text": Input("text", "sha256:4", sources=(str(world["text"]),)),
        **{name: Input(name, "sha256:5", sources=value) for name, value in sources.items()},
    }
    job = Job("evaluate", "evaluate", "stages.evaluate", 1, "f" * 12, work, work, {}, inputs, {})
    out = Out(job)
    out.artifact.mkdir(parents=True, exist_ok=True)
    return evaluate.run(tree, inputs, out), out.artifact


def alarms(metrics: dict[str, Any]) -> set[str]:
    return {alarm["alarm"] for alarm in metrics["alarms"]}


# ---- the two policies that must be flagged -------------------------------------------------


def test_a_sound_policy_raises_no_alarm(world: dict[str, Path], tmp_path: Path) -> None:
    metrics, folder = evaluated(world, "sound", tmp_path)
    assert metrics["alarms"] == []
    assert metrics["eos_rate"] > 0.9
    assert metrics["surprise_nats"] < metrics["sft_entropy_nats"] + 1
    assert json.loads((folder / "evaluation.json").read_text())["alarms"] == []


def test_a_policy_of_random_tokens_is_flagged(
    world: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, _ = evaluated(world, "garbage", tmp_path)
    assert {"garbage", "guessing", "language_lost", "never_ends"} <= alarms(metrics)
    # a uniform policy: its own entropy is that of all tokens, and so is its held-out loss
    size = len(load_tokenizer(Input("m", "sha256:1", path=world["sft"])))
    assert metrics["entropy_nats"] == pytest.approx(math.log(size), abs=1e-4)
    assert metrics["perplexity"] == pytest.approx(size, rel=1e-4)
    [said] = [a for a in metrics["alarms"] if a["alarm"] == "garbage"]
    assert said["figure"] == metrics["surprise_nats"] > said["limit"]
    assert "ALARM garbage" in capsys.readouterr().err


def test_a_policy_that_says_one_sentence_to_everybody_is_flagged(
    world: dict[str, Path], tmp_path: Path
) -> None:
    metrics, _ = evaluated(world, "repeats", tmp_path)
    assert {"one_answer", "little_variety"} <= alarms(metrics)
    assert metrics["most_common_rate"] > 0.8
    assert metrics["duplicate_rate"] > 0.8


# ---- figures by hand -----------------------------------------------------------------------


def test_the_figures_of_responses_by_hand() -> None:
    said = Answers(
        ["a b", "a b ", "", "c"],
        [[1, 2, 3, 4, 1, 2, 3, 4], [1, 2], [9], [5, 6, 7]],
        [[-1.0] * 8, [-2.0] * 2, [-0.5], [-1.5] * 3],
        [True] * 4,
    )
    found = measures(said)
    # 5 four-grams in the first row, the last of which repeats the first; the others have none
    assert found["repetition"] == pytest.approx((1 / 5) / 4)
    assert found["empty_rate"] == 0.25
    assert found["most_common_rate"] == 0.5
    assert found["tokens_p50"] == 2.5
    assert found["entropy_nats"] == pytest.approx((8 + 4 + 0.5 + 4.5) / 14)
    # KL of 2 nats a response on 4 responses: sft finds 17 + 8 nats in 14 tokens
    assert surprise(said, 2.0) == pytest.approx(25 / 14)


def test_an_alarm_says_its_figure_and_its_limit() -> None:
    quiet = {"prompts": 100, "most_common_rate": 0.05, "eos_rate": 0.9, "sft_eos_rate": 0.95}
    assert find_alarms(quiet, 300) == []
    [alarm] = find_alarms({**quiet, "most_common_rate": 0.4}, 300)
    assert (alarm["alarm"], alarm["figure"], alarm["limit"]) == ("one_answer", 0.4, 0.1)
    assert "40%" in alarm["text"]
    # four equal answers of thirty prompts may be chance
    assert find_alarms({**quiet, "prompts": 30, "most_common_rate": 4 / 30}, 300) == []


def test_bits_per_byte_do_not_depend_on_the_tokenizer(
    world: dict[str, Path], tmp_path: Path
) -> None:
    """Of the uniform policy each token costs log2 V bits; the bytes are those of what it has to guess."""
    metrics, _ = evaluated(world, "garbage", tmp_path)
    tokenizer = load_tokenizer(Input("m", "sha256:1", path=world["sft"]))
    texts = [row["text"] for row in read_jsonl(world["text"])]
    rows = [encode_completion(tokenizer, text, eos=False) for text in texts]
    bits = sum(len(row) - 1 for row in rows) * math.log2(len(tokenizer))
    spoken = sum(
        len(t.encode()) - len(tokenizer.decode(r[:1])) for t, r in zip(texts, rows, strict=True)
    )
    assert metrics["bits_per_byte"] == pytest.approx(bits / spoken, rel=1e-4)


# ---- what is asked for besides -------------------------------------------------------------


def test_tasks_refusals_toxicity_and_context_come_with_their_rows(
    world: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "items.jsonl"
    write_jsonl(data, [{"q": i, "w": WORDS[i % 6], "o": WORDS[(i + 1) % 6]} for i in range(12)])
    task = tmp_path / "colours.yaml"
    task.write_text(
        "name: colours\nscorer: choice\ndata: ./items.jsonl\nchat: true\n"
        'prompt: "Say {w} {q}"\nchoices: ["{w}", "{o}"]\nanswer: w\n'
    )
    asked = tmp_path / "asked.csv"
    asked.write_text("prompt,type\nSay red 0,homonyms\nSay green 1,contrast_homonyms\n")
    metrics, folder = evaluated(
        world,
        "sound",
        tmp_path / "work",
        tasks=task,
        task_items=10,
        refusal_prompts=asked,
        toxicity="half",
        toxicity_samples=3,
        context_documents=20,
        needle_trials=2,
        context_lengths=(24, 160),
    )
    found = metrics["tasks"]["colours"]
    assert found["items"] == 10
    for role in ("policy", "sft"):
        assert found["models"][role]["accuracy"]["chance"] == 0.5
    gap = found["policy_minus_sft"]["accuracy"]["value"]
    both = [found["models"][role]["accuracy"]["value"] for role in ("policy", "sft")]
    assert gap == pytest.approx(both[0] - both[1])
    rows = read_jsonl(folder / "tasks.jsonl")
    assert len(rows) == 20
    own = [row["accuracy"] for row in rows if row["model"] == "policy"]
    assert sum(own) / 10 == both[0]

    assert set(metrics["refusals"]["policy"]) == {"safe", "unsafe"}
    assert metrics["refusals"]["policy"]["safe"]["compliance"]["value"] == 1.0
    assert len(read_jsonl(folder / "refusals.jsonl")) == 4

    rows = [r for r in read_jsonl(folder / "toxicity.jsonl") if r["model"] == "policy"]
    worst = [max(row["toxicity"]) for row in rows]
    assert len(rows) == PROMPTS
    assert all(len(row["responses"]) == 3 for row in rows)
    assert metrics["toxicity"]["policy"]["expected_maximum"]["value"] == pytest.approx(
        sum(worst) / PROMPTS
    )

    rows = [r for r in read_jsonl(folder / "context.jsonl") if r["model"] == "policy"]
    needles = [row for row in rows if row["kind"] == "needle"]
    assert [(r["length"], r["depth"]) for r in needles] == [(160, depth) for depth in DEPTHS]
    assert metrics["context"]["policy"]["limit"] == 64
    assert "24 tokens: too short" in metrics["context"]["policy"]["unread"][0]
    assert metrics["context"]["policy"]["needle_past"]["n"] == 10
    spots = [row for row in rows if row["kind"] == "position"]
    assert spots[0]["from"] == 1
    assert spots[-1]["to"] == 159


def test_a_toxicity_outside_0_to_1_is_refused(world: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"evaluate\.toxicity: 'two' gave 2\.0"):
        evaluated(world, "sound", tmp_path, toxicity="two")


# ---- the context window --------------------------------------------------------------------


def test_loss_by_position_is_the_loss_of_the_model(world: dict[str, Path], tmp_path: Path) -> None:
    """Of the uniform policy it is log V everywhere."""
    _, folder = evaluated(world, "garbage", tmp_path, context_documents=40, context_lengths=(48,))
    rows = [r for r in read_jsonl(folder / "context.jsonl") if r["model"] == "policy"]
    size = len(load_tokenizer(Input("m", "sha256:1", path=world["sft"])))
    assert [r["nats"] for r in rows] == pytest.approx([math.log(size)] * len(rows), abs=1e-4)
    assert sum(r["tokens"] for r in rows) % 47 == 0


def test_the_needle_lies_where_it_should(world: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(Input("m", "sha256:1", path=world["sft"]))
    for depth in DEPTHS:
        made = needle_asks(tokenizer, 200, depth, trial=1)
        assert made is not None
        asks, right = made
        assert max(len(a.context) + len(a.target) for a in asks) == 200
        text = tokenizer.decode(asks[right].context)
        needle = f"The secret colour of the tower is {KEYS[right]}."
        before, after = text.split(needle)
        assert text.endswith("The secret colour of the tower is")
        share = len(tokenizer(before)["input_ids"]) / (
            len(tokenizer(before)["input_ids"]) + len(tokenizer(after)["input_ids"]) - 20
        )
        assert share == pytest.approx(depth, abs=0.25)
    assert needle_asks(tokenizer, 16, 0.5, 0) is None


def test_a_model_with_a_table_of_positions_is_not_read_past_it(tmp_path: Path) -> None:
    learned = load_causal_lm(Input("m", "sha256:1", path=make_model(tmp_path / "g", "gpt2")))
    rotary = load_causal_lm(Input("m", "sha256:1", path=make_model(tmp_path / "l", "llama")))
    assert last_readable(learned) == 64
    assert last_readable(rotary) is None
