"""Rows of the field's layouts become conversations, or say why not."""

import pytest

from pipeline.formats import Unusable, demonstrations, hh_turns, prompt_messages

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "A"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [USER, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "Q"}]}, ANSWER]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "response": "A"},
        {"question": "Q", "answer": "A"},
        {"instruction": "Q", "instances": [{"input": "", "output": "A"}]},
        {"messages": [USER, ANSWER], "label": True},
    ],
)
def test_every_layout_of_demonstrations_reads_as_the_same_conversation(row):
    assert demonstrations(row) == [[USER, ANSWER]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("only text", "not an object"),
        ({"prompt": "Q", "completion": ""}, "the answer is empty"),
        ({"prompt": "Q", "completion": None}, "the answer is not a text"),
        ({"prompt": " \n", "completion": "A"}, "the prompt is empty"),
        ({"prompt": "Q", "completion": "a\ud800b"}, "lone surrogate"),
        ({"messages": []}, "empty"),
        ({"messages": [USER]}, "does not end with an assistant turn"),
        ({"messages": [ANSWER]}, "no user turn"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "unknown role 'tool'"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "not text"),
        ({"instruction": "Q", "output": "I am {{name}}"}, "unfilled slot"),
        ({"messages": [USER, ANSWER], "label": False}, "bad one"),
        ({"instruction": "Q", "instances": []}, "instances is empty"),
        ({"chosen": "A", "rejected": "B"}, "no known layout"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row, reason):
    with pytest.raises(Unusable, match=reason):
        demonstrations(row)


def test_an_input_follows_the_instruction_after_a_blank_line():
    [conversation] = demonstrations({"instruction": "Add", "input": "1 2", "output": "3"})
    assert conversation[0]["content"] == "Add\n\n1 2"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("Q", "Q"),
        ({"prompt": "Q", "split": "test"}, "Q"),
        ({"prompt": {"text": "Q", "role": "prompter"}}, "Q"),
        ({"turns": ["Q", "and then?"]}, "Q"),
        ({"question": "Q", "context": "C"}, "C\n\nQ"),
        ({"text": "Q", "role": "prompter"}, "Q"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "bad"}, "Q"),
    ],
)
def test_every_layout_of_prompts_ends_with_the_user(row, text):
    messages = prompt_messages(row)
    assert messages[-1] == {"role": "user", "content": text}


def test_a_prompt_keeps_the_turns_before_it_and_drops_the_answer():
    messages = [USER, ANSWER, {"role": "user", "content": "more"}, ANSWER]
    assert prompt_messages({"messages": messages}) == messages[:3]


def test_an_answer_is_not_taken_for_a_prompt():
    with pytest.raises(Unusable, match="role 'assistant'"):
        prompt_messages({"text": "A", "role": "assistant"})


def test_an_hh_text_that_waits_for_an_answer_ends_with_its_user_turn():
    turns = hh_turns("\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:")
    assert [t["role"] for t in turns] == ["user", "assistant", "user"]
