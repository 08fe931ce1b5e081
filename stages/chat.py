"""Text to token ids and back, the same way in every stage: sample, reward, ppo, evaluate, sft.

A prompt is encoded by the tokenizer's chat template up to where the assistant begins; a completion
is encoded on its own, as the model wrote it, and ends with the end token. Control tokens come from
the template only: `<|user|>` inside somebody's text stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.records import Message

BOS, EOS, PAD, MASK = "<|bos|>", "<|eos|>", "<|pad|>", "<|mask|>"
TURN_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '<|user|>' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] == 'system' %}"
    "{{ '<|system|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Our template. The assistant's turn ends with the end token, so that one token means "I am done"."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Ids of a conversation up to the point where the assistant begins to write.

    Raises:
        DataError: the model's template refuses the conversation (an unknown role, two user turns
            in a row, a system turn that it does not have).
    """
    from jinja2 import TemplateError

    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            # control tokens inside the messages become plain text
            sanitize_control_tokens=True,
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses a conversation: {error}") from None
    return list(ids)


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str, eos: bool) -> list[int]:
    """Ids of an assistant's text, with the end token if `eos`."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if eos else list(ids)


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a response: up to the first end token, without control tokens."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class TrainingRow(NamedTuple):
    """Ids of a conversation and, for each, whether the model is trained to write it."""

    ids: list[int]
    trained: list[bool]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> list[TrainingRow]:
    """A conversation as rows to train on: every assistant turn, its end token included.

    One row, where the template writes the earlier turns just as they were trained. Some templates
    do not (they drop earlier thoughts, trim spaces, merge tokens over the seam): then each
    assistant turn is a row of its own, so that training sees what generation will see.
    """
    row = TrainingRow([], [])
    alone: list[TrainingRow] = []
    one_row = True
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_prompt(tokenizer, messages[:at])
        completion = encode_completion(tokenizer, message["content"], eos=True)
        alone.append(_row(prompt, completion))
        before = len(row.ids)
        one_row = one_row and prompt[:before] == row.ids
        if one_row:
            tail = _row(prompt[before:], completion)
            row = TrainingRow(row.ids + tail.ids, row.trained + tail.trained)
    return [row] if one_row and row.ids else alone


def _row(prompt: list[int], completion: list[int]) -> TrainingRow:
    return TrainingRow(prompt + completion, [False] * len(prompt) + [True] * len(completion))
