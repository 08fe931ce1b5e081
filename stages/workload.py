"""What there is to do: texts, demonstrations, prompts and rankings of a configuration, counted and sampled.

The same readers as in the stages; of what they read, only a sample becomes tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.formats import Unusable, prompt_messages
from pipeline.job import Input
from pipeline.records import Prompt
from pipeline.settings import Settings
from pipeline.sources import kind
from stages.chat import encode_completion, encode_conversation, encode_prompt
from stages.data import is_heldout, read_demonstrations, read_prompts, read_texts, rows_of
from stages.models import load_tokenizer
from stages.probes import Seconds, clock
from stages.prompts import of_split
from stages.tokenizer import train

# more than this is not read: the rest is like it
_DOCUMENTS, _RANKINGS = 20_000, 20_000
_SAMPLED = 256
_TOKENIZER_DOCUMENTS = 2_000
_CPU = torch.device("cpu")
Row = tuple[list[int], list[bool]]


@dataclass
class Workload:
    """Counts are of the whole, lengths (in tokens) and ids of a sample.

    responses: lengths to expect, the end token included; `responses_from` says how they are known.
    """

    tokenizer: PreTrainedTokenizerBase
    documents: int = 0
    document_lengths: list[int] = field(default_factory=list)
    heldout_documents: int = 0
    demonstrations: int = 0
    rows: list[Row] = field(default_factory=list)
    prompts: dict[str, int] = field(default_factory=dict)
    prompt_ids: list[list[int]] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)
    responses_from: str = ""
    rankings: int = 0
    responses_per_ranking: float = 0.0
    read_texts: Seconds = field(default_factory=Seconds)
    """To read all documents."""
    pack_texts: Seconds = field(default_factory=Seconds)
    """To tokenise them all."""
    train_tokenizer: Seconds = field(default_factory=Seconds)
    read_demonstrations: Seconds = field(default_factory=Seconds)
    read_prompts: Seconds = field(default_factory=Seconds)

    def expected(self, most: int) -> list[int]:
        """Lengths of responses, cut at `most` tokens."""
        return [min(length, most) for length in self.responses] or [most]


def look_at(settings: Settings) -> Workload:
    """Read the data of a configuration, as far as that takes seconds."""
    texts: list[str] = []
    read = Seconds()
    if settings.pretrain.data:
        with clock(_CPU) as read:
            found, _ = read_texts(
                settings.pretrain.data,
                settings.pretrain.text_field,
                settings.pretrain.max_documents,
            )
            texts = list(islice(found, _DOCUMENTS))
    tokenizer, trained = _tokenizer(settings, texts)
    work = Workload(tokenizer, train_tokenizer=trained)
    if texts:
        _documents(work, settings, texts, read)
    if settings.sft.data:
        _demonstrations(work, settings)
    _prompts(work, settings)
    if not work.responses:
        longest = max(settings.ppo.max_response_tokens, settings.sample.max_response_tokens)
        work.responses, work.responses_from = (
            [longest],
            "max_response_tokens, as nothing tells more",
        )
    return work


def _sample(items: Sequence[Any], count: int = _SAMPLED) -> list[Any]:
    """Evenly over the whole, so that a sorted file is seen from end to end."""
    return (
        [items[i * len(items) // count] for i in range(count)] if len(items) > count else [*items]
    )


def _tokenizer(settings: Settings, texts: list[str]) -> tuple[PreTrainedTokenizerBase, Seconds]:
    if settings.model.base:
        return load_tokenizer(Input("model", "", sources=(settings.model.base,))), Seconds()
    own = settings.tokenizer
    source = own.data or settings.pretrain.data or ()
    with clock(_CPU) as seconds:
        found, _ = read_texts(source, own.text_field, own.max_documents)
        some = list(islice(found, _TOKENIZER_DOCUMENTS))
        tokenizer = train(iter(some), own.vocab_size, own.min_frequency)
    with clock(_CPU) as measured:
        # the stage measures itself on 1,000 documents, there and back
        for text in some[:50]:
            tokenizer.decode(encode_completion(tokenizer, text, eos=False))
    total = min(own.max_documents or max(len(texts), len(some)), max(len(texts), len(some)))
    counted = seconds * (total / len(some)) + measured * (min(1000, total) / max(1, len(some[:50])))
    return tokenizer, counted


def _documents(work: Workload, settings: Settings, texts: list[str], read: Seconds) -> None:
    some = _sample(texts)
    with clock(_CPU) as encoded:
        work.document_lengths = [
            len(encode_completion(work.tokenizer, text, eos=True)) for text in some
        ]
    fraction = settings.pretrain.heldout_fraction
    work.documents = len(texts)
    work.heldout_documents = sum(is_heldout(text, fraction) for text in texts)
    work.read_texts, work.pack_texts = read, encoded * (len(texts) / len(some))


def _demonstrations(work: Workload, settings: Settings) -> None:
    own = settings.sft
    assert own.data is not None
    with clock(_CPU) as read:
        found, _ = read_demonstrations(own.data, own.max_examples)
    some = _sample(found)
    with clock(_CPU) as encoded:
        rows = [row for talk in some for row in encode_conversation(work.tokenizer, talk)]
    kept = [row for row in rows if len(row.ids) <= own.max_length] or rows[:1]
    work.rows = [(row.ids, row.trained) for row in kept]
    share = len(kept) / max(1, len(some)) * (1 - own.heldout_fraction)
    work.demonstrations = max(1, round(len(found) * share))
    work.responses = [sum(row.trained) for row in kept]
    work.responses_from = "the answers of sft.data"
    work.read_demonstrations = read + encoded * (len(found) / max(1, len(some)))


def _prompts(work: Workload, settings: Settings) -> None:
    own = getattr(settings, settings.run.policy)
    given = settings.sample.prompts or getattr(own, "prompts", None) or settings.evaluate.prompts
    prompts: list[Prompt] = []
    if given:
        with clock(_CPU) as work.read_prompts:
            prompts, _ = read_prompts(
                given, settings.sample.validation_fraction, settings.sample.test_fraction
            )
    elif settings.rank.data:
        prompts = _ranked(work, settings)
    if not prompts:
        return
    for split in ("train", "validation", "test"):
        # `of_split` refuses an empty one, which the stage would
        work.prompts[split] = _count(prompts, split, settings)
    some = _sample(prompts)
    ids = [encode_prompt(work.tokenizer, list(p.messages)) for p in some]
    most = getattr(own, "max_prompt_tokens", settings.sample.max_prompt_tokens)
    work.prompt_ids = [one for one in ids if len(one) <= most] or [one[:most] for one in ids]
    if settings.sample.prompts:
        sampled = min(settings.sample.max_prompts or work.prompts["train"], work.prompts["train"])
        work.rankings = sampled * settings.rank.overlap
        work.responses_per_ranking = float(settings.sample.responses_per_prompt)


def _count(prompts: list[Prompt], split: str, settings: Settings) -> int:
    try:
        return len(of_split(prompts, split, settings))
    except DataError:  # there is none
        return 0


def _ranked(work: Workload, settings: Settings) -> list[Prompt]:
    """Prompts of rankings that were made elsewhere, whose responses tell how long responses are."""
    found: dict[str, Prompt] = {}
    texts: list[str] = []
    count = responses = 0
    for source in settings.rank.data or ():
        if kind(source) == "demo":
            continue
        for _, row in islice(rows_of(source), _RANKINGS):
            try:
                messages = tuple(prompt_messages(row))
            except Unusable:
                continue
            answers = _answers(row)
            count += 1
            responses += max(2, len(answers))
            texts += answers
            prompt = Prompt(messages, "train")
            test = is_heldout(
                [*messages, {"role": "assistant", "content": ""}], settings.rank.heldout_fraction
            )
            found.setdefault(prompt.id, Prompt(messages, "test" if test else "train"))
    if count:
        work.rankings, work.responses_per_ranking = count, responses / count
        some = [encode_completion(work.tokenizer, text, eos=True) for text in _sample(texts, 64)]
        if some and not work.responses:
            work.responses = [len(ids) for ids in some]
            work.responses_from = "the responses of rank.data"
    return list(found.values())


def _answers(row: Any) -> list[str]:
    """The response texts of a ranking row, whatever its layout."""
    if not isinstance(row, dict):
        return []
    given = row.get("responses") or [row.get("chosen"), row.get("rejected")]
    found = []
    for item in given if isinstance(given, list) else []:
        while isinstance(item, list) and item:
            item = item[-1]
        if isinstance(item, dict):
            item = item.get("text") or item.get("content") or item.get("response")
        if isinstance(item, str) and item:
            found.append(item.rsplit("\n\nAssistant:", 1)[-1])
    return found
