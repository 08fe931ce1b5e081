"""Prompts for the stages that answer them: from an artifact of ours or from the user's files."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError, DataError
from pipeline.job import Input, Out
from pipeline.records import Prompt, Tally, hash_fraction, read_jsonl
from pipeline.settings import Settings
from stages.chat import encode_prompt
from stages.data import read_prompts


class PromptIds(NamedTuple):
    """A prompt and its token ids, the generation prompt included."""

    prompt: Prompt
    ids: list[int]


def load_prompts(
    item: Input, settings: Settings, out: Out, unmarked: str | None = None
) -> list[Prompt]:
    """All prompts with their splits, in the order of the file; says what could not be used.

    unmarked: the split of rows that name none; without it a hash of the prompt decides.
    """
    if item.path is not None:
        return [Prompt.from_row(row) for row in read_jsonl(item.path / "prompts.jsonl")]
    prompts, tally = read_prompts(
        item.sources,
        settings.sample.validation_fraction,
        settings.sample.test_fraction,
        unmarked,
    )
    tally.check("prompts", settings.sample.max_bad_fraction)
    out.say(f"prompts: {tally.summary()}")
    out.derived["prompts_dropped"] = dict(tally.reasons)
    return prompts


def of_split(prompts: list[Prompt], split: str, settings: Settings) -> list[Prompt]:
    """The prompts of one split; where nothing is marked `validation`, a part of train serves.

    In the order of their ids, which are hashes: the first N of a file sorted by topic would be
    judged on its first topic.

    Raises:
        DataError: there is none.
    """
    found = sorted(_of_split(prompts, split, settings), key=lambda prompt: prompt.id)
    if not found:
        part = "training" if split == "train" else split
        raise DataError(
            f"of {len(prompts)} prompts none is a {part} prompt",
            f"Give more prompts, mark some with split: {split}, or change"
            " sample.validation_fraction and sample.test_fraction.",
        )
    return found


def _of_split(prompts: list[Prompt], split: str, settings: Settings) -> list[Prompt]:
    if any(p.split == "validation" for p in prompts):
        return [p for p in prompts if p.split == split]
    fraction = settings.sample.validation_fraction or 0.1

    def split_of(p: Prompt) -> str:
        held_back = p.split == "train" and hash_fraction("validation", p.id) < fraction
        return "validation" if held_back else p.split

    return [p for p in prompts if split_of(p) == split]


def longest_prompt(
    max_prompt_tokens: int, max_response_tokens: int, positions: int | None, out: Out
) -> int:
    """Tokens that a prompt may have: by the setting, and by what the model can read in all.

    Raises:
        ConfigError: a response alone may take all of it.
    """
    # one more: the reward model reads an end token behind a response that was cut
    left = max_prompt_tokens if positions is None else positions - max_response_tokens - 1
    if left < 1:
        raise ConfigError(
            f"{out.step}: max_response_tokens {max_response_tokens} leaves no room for a prompt in"
            f" the {positions} tokens that the model can read",
            "Lower it, or raise model.max_length of a new model.",
        )
    if left < max_prompt_tokens:
        out.say(
            f"prompts of at most {left} tokens: the model can read {positions}, and a response may"
            f" take {max_response_tokens}"
        )
    return min(left, max_prompt_tokens)


def encode_prompts(
    prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, max_tokens: int, out: Out
) -> list[PromptIds]:
    """Token ids of the prompts; longer ones than `max_tokens` are left out, counted and said.

    Raises:
        DataError: none is left.
    """
    tally = Tally()
    encoded = []
    for prompt in prompts:
        ids = encode_prompt(tokenizer, list(prompt.messages))
        if len(ids) > max_tokens:
            tally.drop(f"prompt longer than {max_tokens} tokens", f"{prompt.text[:60]!r}")
            continue
        tally.use()
        encoded.append(PromptIds(prompt, ids))
    if tally.reasons:
        out.say(f"prompts: {tally.summary()}")
        before = out.derived.get("prompts_too_long", 0)
        out.derived["prompts_too_long"] = before + tally.dropped
    if not encoded:
        raise DataError(
            f"{out.step}: no prompt is left: {tally.summary()}",
            "Raise max_prompt_tokens; where the model cannot read more, lower max_response_tokens.",
        )
    return encoded
