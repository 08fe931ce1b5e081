"""The field's row layouts, read as conversations.

Known: TRL prompt/completion (text or messages), `messages` (content a text or typed parts),
ShareGPT `conversations`, alpaca `instruction/input/output`, `question/answer` (with `context`),
self-instruct `instances`; for prompts also `turns`, `chosen` of hh-rlhf, and columns named prompt,
query, text or input. A row that cannot be read raises `Unusable` with a short reason; the caller counts it.
"""

from __future__ import annotations

import re
from typing import Any

from pipeline.records import Message

_ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_PROMPT_COLUMNS = ("prompt", "query", "text", "input")


class Unusable(ValueError):
    """Why a row cannot be used, in a few words that serve as a counting key."""


def clean_text(value: Any, what: str) -> str:
    """`value` if it is a text with something in it that a tokenizer can read."""
    if not isinstance(value, str):
        raise Unusable(f"{what} is not a text")
    if not value.strip():
        raise Unusable(f"{what} is empty")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise Unusable(f"{what} holds a broken character (lone surrogate)")
    return value


def conversation(value: Any) -> list[Message]:
    """Messages from a list of `{role, content}` or ShareGPT `{from, value}` turns."""
    if not isinstance(value, list) or not value:
        raise Unusable("the conversation is empty or not a list")
    return [_message(turn) for turn in value]


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Unusable("a turn is not an object")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise Unusable(f"unknown role {str(role)[:30]!r}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = _joined_parts(content)
    return {"role": _ROLES[role.lower()], "content": clean_text(content, "a turn")}


def _joined_parts(parts: list[Any]) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise Unusable("a turn has a part that is not text")
        texts.append(clean_text(part.get("text", part.get("value")), "a turn"))
    return "".join(texts)


def prompt_messages(row: Any) -> list[Message]:
    """The prompt of a row: messages up to and with the last user turn.

    Raises:
        Unusable: no prompt, an empty one, or an unknown role.
    """
    if isinstance(row, str):
        return [{"role": "user", "content": clean_text(row, "the prompt")}]
    if not isinstance(row, dict):
        raise Unusable("the row is neither a text nor an object")
    for column in ("messages", "conversations", "chosen_messages"):
        if column in row:
            return up_to_user(conversation(row[column]))
    if isinstance(row.get("chosen"), str) and "\n\nHuman:" in row["chosen"]:
        return up_to_user(hh_turns(row["chosen"]))
    if isinstance(row.get("prompt"), list):
        return up_to_user(conversation(row["prompt"]))
    if isinstance(row.get("prompt"), dict):
        # one turn with its metadata: the root of an OASST tree
        prompt = row["prompt"].get("text", row["prompt"].get("content"))
        return [{"role": "user", "content": clean_text(prompt, "the prompt")}]
    if isinstance(row.get("turns"), list) and row["turns"]:
        # later turns refer to answers that do not exist yet
        return [{"role": "user", "content": clean_text(row["turns"][0], "the prompt")}]
    role = row.get("role")
    if isinstance(role, str) and _ROLES.get(role.lower(), "user") != "user":
        raise Unusable(f"the row is a turn of role {role[:30]!r}, not a prompt")
    if "instruction" in row:
        return [{"role": "user", "content": _instruction(row, row.get("input"))}]
    if "question" in row:
        return [{"role": "user", "content": _question(row)}]
    for column in _PROMPT_COLUMNS:
        if column in row:
            return [{"role": "user", "content": clean_text(row[column], "the prompt")}]
    raise Unusable("no column with a prompt")


def hh_turns(text: str) -> list[Message]:
    """The turns of an hh-rlhf text: `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    before, *parts = _HH_TURN.split(text)
    if before.strip():
        raise Unusable("text before the first turn")
    turns = [(role, content.strip()) for role, content in zip(parts[::2], parts[1::2], strict=True)]
    if turns[-1][1] == "":
        # what is asked for is the answer to the turns before it
        turns = turns[:-1]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": clean_text(text, "a turn")} for role, text in turns]


def up_to_user(messages: list[Message]) -> list[Message]:
    """The conversation without the turns after its last user turn."""
    for end in range(len(messages), 0, -1):
        if messages[end - 1]["role"] == "user":
            return messages[:end]
    raise Unusable("the conversation has no user turn")


def _instruction(row: dict[str, Any], extra: Any) -> str:
    instruction = clean_text(row["instruction"], "the instruction")
    if isinstance(extra, str) and extra.strip():
        return f"{instruction}\n\n{clean_text(extra, 'the input')}"
    return instruction


def _question(row: dict[str, Any]) -> str:
    """A question, after the passage that it is about where there is one (SQuAD, BBQ)."""
    question = clean_text(row["question"], "the question")
    context = row.get("context")
    return f"{context}\n\n{question}" if isinstance(context, str) and context.strip() else question


def demonstrations(row: Any) -> list[list[Message]]:
    """Conversations that end with an assistant turn; a row may hold several (self-instruct).

    Raises:
        Unusable: no demonstration, an empty one, an unknown role, a slot such as `{{name}}`, an
            answer that a KTO-style `label: false` calls bad.
    """
    if not isinstance(row, dict):
        raise Unusable("the row is not an object")
    if row.get("label") is False:
        raise Unusable("the answer is labelled as a bad one")
    found = _raw_demonstrations(row)
    if not found:
        raise Unusable("the list of instances is empty")
    for messages in found:
        if messages[-1]["role"] != "assistant":
            raise Unusable("the conversation does not end with an assistant turn")
        if not any(m["role"] == "user" for m in messages):
            raise Unusable("the conversation has no user turn")
        for message in messages:
            if "{{" in message["content"] and "}}" in message["content"]:
                raise Unusable("an unfilled slot such as {{name}}")
    return found


def _raw_demonstrations(row: dict[str, Any]) -> list[list[Message]]:
    for column in ("messages", "conversations"):
        if column in row:
            return [conversation(row[column])]
    if "prompt" in row and "completion" in row:
        return [_joined(row["prompt"], row["completion"])]
    if "instances" in row and "instruction" in row:
        instances = row["instances"]
        if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
            raise Unusable("the instances are not a list of objects")
        return [_joined(_instruction(row, i.get("input")), i.get("output")) for i in instances]
    if "instruction" in row and ("output" in row or "response" in row):
        answer = row.get("output", row.get("response"))
        return [_joined(_instruction(row, row.get("input")), answer)]
    if "question" in row and "answer" in row:
        return [_joined(_question(row), row["answer"])]
    raise Unusable("no known layout of prompt and answer")


def _joined(prompt: Any, answer: Any) -> list[Message]:
    """One conversation from a prompt and an answer, each a text or a list of messages."""
    before = (
        conversation(prompt)
        if isinstance(prompt, list)
        else [{"role": "user", "content": clean_text(prompt, "the prompt")}]
    )
    after = (
        conversation(answer)
        if isinstance(answer, list)
        else [{"role": "assistant", "content": clean_text(answer, "the answer")}]
    )
    return before + after
