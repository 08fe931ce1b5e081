"""How likely a model finds a text after another one: the ground of choices, pairs and needles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.chat import encode_completion, encode_prompt
from stages.rollout import all_logprobs, make_sequences


class Ask(NamedTuple):
    """Token ids of a context and of what follows it; both have at least one."""

    context: list[int]
    target: list[int]


def ask(tokenizer: PreTrainedTokenizerBase, context: str, target: str) -> Ask:
    """Plain text: the two are encoded as one text and parted where the context ends.

    A token that lies over the seam counts to the target. Without a context the model begins behind
    the token that begins a document, or that ends the one before.
    """
    if not context:
        return Ask(start_ids(tokenizer), encode_completion(tokenizer, target, eos=False))
    before = encode_completion(tokenizer, context, eos=False)
    whole = encode_completion(tokenizer, context + target, eos=False)
    same = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
        min(len(before), len(whole) - 1),
    )
    start = _written_start(tokenizer) or ([] if same else start_ids(tokenizer))
    return Ask(start + whole[:same], whole[same:])


def ask_in_chat(tokenizer: PreTrainedTokenizerBase, question: str, target: str) -> Ask:
    """The question as a user's turn, the target as the beginning of the assistant's."""
    context = encode_prompt(tokenizer, [{"role": "user", "content": question}])
    return Ask(context, encode_completion(tokenizer, target, eos=False))


def context_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text that a model goes on from."""
    ids = encode_completion(tokenizer, text, eos=False)
    return [*(_written_start(tokenizer) if ids else start_ids(tokenizer)), *ids]


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before the first token of a text."""
    written = _written_start(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return written or [bos if bos is not None else eos]


def _written_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer itself writes before every text."""
    ids = list(tokenizer("")["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def target_logprobs(
    model: PreTrainedModel,
    asks: list[Ask],
    pad_id: int,
    device: torch.device,
    rows_at_once: int,
) -> tuple[list[list[float]], list[bool]]:
    """Logprob of each target token, in nats, and of which asks the beginning had to be cut.

    What is longer than the model can read loses tokens from its front, as in a window that moves on.
    """
    if not asks:
        return [], []
    limit = positions_of(model)
    kept = [_cut(one, limit) for one in asks]
    batch = make_sequences([k.context for k in kept], [k.target for k in kept], pad_id, device)
    found = batch.as_lists(all_logprobs(model, batch, 1.0, rows_at_once))
    return found, [a != b for a, b in zip(asks, kept, strict=True)]


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model was made to read; None where its configuration does not say."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _cut(one: Ask, limit: int | None) -> Ask:
    if limit is None or len(one.context) + len(one.target) <= limit:
        return one
    target = one.target[: limit - 1]
    return Ask(one.context[-(limit - len(target)) :], target)
