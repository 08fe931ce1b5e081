"""Prompts for the stages that answer them: from an artifact of ours or from the user's files."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.job import Input, Out
from pipeline.records import Prompt, Tally, hash_fraction, read_jsonl
from pipeline.settings import Settings
from stages.chat import encode_prompt
from stages.data import read_prompts


class PromptIds(NamedTuple):
    """A prompt and its token ids, the generation prompt included."""

    prompt: Prompt
    ids: list[int]


def load_prompts(item: Input, settings: Settings, out: Out) -> list[Prompt]:
    """All prompts with their splits, in the order of the file; says what could not be used."""
    if item.path is not None:
        return [Prompt.from_row(row) for row in read_jsonl(item.path / "prompts.jsonl")]
    prompts, tally = read_prompts(
        item.sources, settings.sample.validation_fraction, settings.sample.test_fraction
    )
    tally.check("prompts", settings.sample.max_bad_fraction)
    out.say(f"prompts: {tally.summary()}")
    out.derived["prompts_dropped"] = dict(tally.reasons)
    return prompts


def of_split(prompts: list[Prompt], split: str, settings: Settings) -> list[Prompt]:
    """The prompts of one split; where nothing is marked `validation`, a part of train serves."""
    if any(p.split == "validation" for p in prompts):
        return [p for p in prompts if p.split == split]
    fraction = settings.sample.validation_fraction or 0.1

    def split_of(p: Prompt) -> str:
        held_back = p.split == "train" and hash_fraction("validation", p.id) < fraction
        return "validation" if held_back else p.split

    return [p for p in prompts if split_of(p) == split]


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
        out.derived["prompts_too_long"] = tally.dropped
    if not encoded:
        raise DataError(
            f"{out.step}: no prompt is left: {tally.summary()}", "Raise max_prompt_tokens."
        )
    return encoded
