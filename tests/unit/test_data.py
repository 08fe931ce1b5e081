"""Texts, demonstrations and prompts from files, and documents packed into rows."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from stages.data import is_heldout, read_demonstrations, read_prompts, read_texts, split_text
from stages.packing import PackedRows, pack_documents
from stages.tokenizer import train

DATA = Path(__file__).parents[3] / "shared" / "data"
DOCUMENTS = [f"Document {i} says: {'so ' * (i % 7)}it is {i * i}." for i in range(200)]


def real(name: str) -> str:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return str(path)


# ---- texts


@given(st.text(alphabet="ab .\n\t", max_size=9000))
def test_a_split_text_loses_nothing(text):
    assert "".join(split_text(text)) == text


def test_a_long_text_is_cut_at_blank_lines_only():
    paragraphs = [f"{'word ' * 100}{i}\n\n" for i in range(20)]
    documents = split_text("".join(paragraphs))
    assert len(documents) > 1
    assert all(document.endswith("\n\n") for document in documents)
    assert all(len(document) >= 2000 for document in documents[:-1])


def test_long_lines_without_blank_lines_are_documents():
    lines = [f"{'long ' * 500}{i}\n" for i in range(3)] + ["short\n", f"{'long ' * 500}\n"]
    assert split_text("".join(lines)) == lines


def test_a_column_that_is_missing_or_not_text_is_counted(tmp_path):
    rows = [{"text": "fine"}, {"text": None}, {"other": "x"}, {"text": "  "}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts, tally = read_texts([str(tmp_path / "a.jsonl")])
    assert list(texts) == ["fine"]
    assert sorted(tally.reasons) == [
        "no column 'text'",
        "the document is empty",
        "the document is not a text",
    ]
    assert tally.first["no column 'text'"].endswith("a.jsonl:3")


def test_at_most_max_documents_are_read_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(9))
    )
    texts, tally = read_texts([str(tmp_path / "a.jsonl")], max_documents=4)
    assert (list(texts), tally.used) == (["t0", "t1", "t2", "t3"], 4)


def test_a_saved_hf_dataset_gives_its_train_part_to_training_and_its_splits_to_prompts(tmp_path):
    import datasets

    parts = {
        "train": datasets.Dataset.from_dict({"text": ["a", "b"]}),
        "test": datasets.Dataset.from_dict({"text": ["c"]}),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "d")
    texts, _ = read_texts([str(tmp_path / "d")])
    assert list(texts) == ["a", "b"]
    prompts, _ = read_prompts([str(tmp_path / "d")], 0.0, 0.0)
    assert [(p.text, p.split) for p in prompts] == [("a", "train"), ("b", "train"), ("c", "test")]


def test_the_demo_gives_what_each_stage_reads_and_refuses_the_rest():
    texts, _ = read_texts(["demo:stories"], max_documents=3)
    assert len(list(texts)) == 3
    conversations, _ = read_demonstrations(["demo:demonstrations"], 3)
    assert [m["role"] for m in conversations[0]] == ["user", "assistant"]
    prompts, _ = read_prompts(["demo:prompts"], 0.1, 0.2)
    assert {p.split for p in prompts} == {"train", "validation", "test"}
    with pytest.raises(DataError, match="demo:prompts cannot be used here"):
        list(read_texts(["demo:prompts"])[0])


def test_a_dataset_that_the_hub_does_not_give_is_an_error_for_people(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="nobody/nothing-here") as caught:
        list(read_texts(["nobody/nothing-here"])[0])
    assert caught.value.exit_code == 2


# ---- prompts


def prompts_file(tmp_path: Path, rows: list[dict]) -> list[str]:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "p.jsonl")]


def test_a_prompt_has_one_split_whatever_its_place_in_the_file(tmp_path):
    rows = [{"prompt": f"prompt {i}"} for i in range(300)]
    forward, _ = read_prompts(prompts_file(tmp_path, rows), 0.1, 0.2)
    backward, _ = read_prompts(prompts_file(tmp_path, rows[::-1]), 0.1, 0.2)
    assert {p.id: p.split for p in forward} == {p.id: p.split for p in backward}
    shares = {
        split: sum(p.split == split for p in forward) / 300 for split in ("test", "validation")
    }
    assert 0.1 < shares["test"] < 0.3
    assert 0.03 < shares["validation"] < 0.2


def test_repeats_are_merged_and_the_held_out_split_wins(tmp_path):
    rows = [{"prompt": "a", "split": s} for s in ("train", "test", "validation")]
    prompts, tally = read_prompts(
        prompts_file(tmp_path, [*rows, {"prompt": "b", "split": "train"}]), 0, 0
    )
    assert [(p.text, p.split) for p in prompts] == [("a", "test"), ("b", "train")]
    assert (tally.used, tally.merged, tally.dropped) == (2, 2, 0)


def test_a_question_stays_in_one_split_under_every_system_turn(tmp_path):
    for i in range(40):
        user = {"role": "user", "content": f"q{i}"}
        rows = [
            {"messages": [{"role": "system", "content": s}, user]} for s in ("one", "two", "three")
        ]
        prompts, _ = read_prompts(prompts_file(tmp_path, rows), 0.3, 0.3)
        assert len(prompts) == 3
        assert len({p.split for p in prompts}) == 1


def test_a_text_file_of_prompts_has_one_on_each_line(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    prompts, _tally = read_prompts([str(tmp_path / "p.txt")], 0, 0)
    assert [p.text for p in prompts] == ["one", "two"]


def test_two_answers_to_one_question_are_held_out_together():
    for i in range(50):
        ask = {"role": "user", "content": f"q{i}"}
        answers = [[ask, {"role": "assistant", "content": text}] for text in ("yes", "no")]
        assert is_heldout(answers[0], 0.5) == is_heldout(answers[1], 0.5)


# ---- packing


@pytest.fixture(scope="module")
def tokenizer():
    return train(iter(DOCUMENTS), 300, 2)


def test_packed_rows_hold_every_document_whole_and_in_order(tmp_path, tokenizer):
    counts = pack_documents(DOCUMENTS, tokenizer, tmp_path, 0.2)
    assert counts is not None
    for part, held in (("train", False), ("heldout", True)):
        own = [text for text in DOCUMENTS if is_heldout(text, 0.2) == held]
        rows = PackedRows(tmp_path, part, 16)
        ids = rows.rows(list(range(len(rows)))).flatten().tolist()
        expected: list[int] = []
        for text in own:
            expected += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert ids == expected[: len(ids)]
        assert len(expected) - len(ids) == rows.left_over < 16
        assert counts[part]["text_bytes"] == sum(len(text.encode()) for text in own)
        assert rows.documents == len(own)


def test_a_packed_row_reads_back_as_text(tmp_path, tokenizer):
    pack_documents(["naïve 字 text"], tokenizer, tmp_path, 0.0)
    rows = PackedRows(tmp_path, "train", 4)
    ids = torch.cat([rows.rows([i]) for i in range(len(rows))]).flatten().tolist()
    assert "naïve 字 text".startswith(
        tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
    )


def test_control_tokens_in_a_document_stay_text(tmp_path, tokenizer):
    pack_documents(["a <|eos|> b <|user|>"], tokenizer, tmp_path, 0.0)
    ids = PackedRows(tmp_path, "train", 1).tokens.tolist()
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.convert_tokens_to_ids("<|user|>") not in ids


def test_finished_token_files_are_used_again_without_reading_the_text(tmp_path, tokenizer):
    def unread():
        raise AssertionError("the text was read again")
        yield ""

    pack_documents(DOCUMENTS, tokenizer, tmp_path, 0.2)
    assert pack_documents(unread(), tokenizer, tmp_path, 0.2) is None


def test_packing_killed_half_way_starts_over(tmp_path, tokenizer):
    def torn():
        yield from DOCUMENTS[:150]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_documents(torn(), tokenizer, tmp_path, 0.2)
    assert pack_documents(DOCUMENTS, tokenizer, tmp_path, 0.2) is not None
    whole = PackedRows(tmp_path, "train", 16).tokens.tolist()
    pack_documents(DOCUMENTS, tokenizer, tmp_path / "again", 0.2)
    assert PackedRows(tmp_path / "again", "train", 16).tokens.tolist() == whole


# ---- real files

REAL_TEXTS = {
    "tinyshakespeare/input.txt": (400, 0),
    "llamafactory/wiki_demo.txt": (30, 0),
    "nltk/movie_reviews.zip": (2000, 1),
    "potato/sst2_500.json": (500, 0),
}
REAL_DEMONSTRATIONS = {
    "llamafactory/alpaca_en_demo.json": (999, 0),
    "llamafactory/identity.json": (6, 85),
    "llamafactory/v1_sft_demo.jsonl": (450, 50),
    "llamafactory/glaive_toolcall_en_demo.json": (147, 153),
    "llamafactory/kto_en_demo.json": (148, 152),
    "llamafactory/dpo_en_demo.json": (0, 300),
    "self-instruct/seed_tasks.jsonl": (175, 0),
    "fastchat/dummy_conversation.json": (500, 0),
    "tinker/conversations.jsonl": (128, 0),
    "gsm8k/train.jsonl": (7473, 0),
    "oasst/rank_groups.jsonl": (0, 107),
}
REAL_PROMPTS = {
    "llamafactory/alpaca_en_demo.json": (985, 14, 0),
    "llamafactory/dpo_en_demo.json": (295, 5, 0),
    "hh-rlhf/harmless-base_test_first200.jsonl": (200, 0, 0),
    "oasst/en_trees_50.jsonl": (50, 0, 0),
    "oasst/prompt_lottery_en_250_text.jsonl": (250, 0, 0),
    "oasst/realistic_seed_data.json": (177, 2, 265),
    "oasst/rank_groups.jsonl": (107, 0, 0),
    "mt_bench/question.jsonl": (80, 0, 0),
    "mt_bench/vicuna_question.jsonl": (80, 0, 0),
    "xstest/xstest_prompts.csv": (450, 0, 0),
    "bbq/Age.jsonl": (3680, 0, 0),
    "crows_pairs/crows_pairs_anonymized.csv": (0, 0, 1508),
}


@pytest.mark.parametrize(("name", "expected"), REAL_TEXTS.items())
def test_real_texts_are_used_or_counted(name, expected):
    texts, tally = read_texts([real(name)])
    documents = list(texts)
    least, dropped = expected
    assert len(documents) >= least
    assert (tally.used, tally.dropped) == (len(documents), dropped)
    if name.endswith(".txt"):
        assert "".join(documents) == Path(real(name)).read_text()


@pytest.mark.parametrize(("name", "expected"), REAL_DEMONSTRATIONS.items())
def test_real_demonstrations_are_used_or_counted(name, expected):
    conversations, tally = read_demonstrations([real(name)])
    assert (len(conversations), tally.dropped) == expected
    assert all(conversation[-1]["role"] == "assistant" for conversation in conversations)


@pytest.mark.parametrize(("name", "expected"), REAL_PROMPTS.items())
def test_real_prompts_are_used_merged_or_counted(name, expected):
    prompts, tally = read_prompts([real(name)], 0.1, 0.2)
    assert (len(prompts), tally.merged, tally.dropped) == expected
    assert len({p.id for p in prompts}) == len(prompts)
    assert all(p.messages[-1]["role"] == "user" for p in prompts)


def test_a_real_file_of_another_kind_is_refused_with_its_reason():
    texts, tally = read_texts([real("nltk/sentence_polarity.zip")])
    list(texts)
    with pytest.raises(DataError, match=r"file of unknown kind '\.neg'"):
        tally.check("pretrain.data", 0.05)
