"""How well a model uses its context: loss by position, and a needle hidden at a depth of a long text.

Both go up to and past the number of positions that the model was made for. A model with learned
positions cannot read past them, which is said; one with rotary positions can, and mostly fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.records import hash_fraction
from stages.chat import encode_completion
from stages.common import gather_list, own_share
from stages.intervals import share
from stages.likelihood import Ask, positions_of, start_ids
from stages.rollout import make_sequences, response_logprobs

Row = dict[str, Any]
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
BUCKETS = 16
_PAST = 1.5
_MOST_ROWS = 64
_LOGITS = 2**27
# made sentences, with nothing in them that a key could be guessed from
_HAY = (
    "The road went on along the river and past the old mill. ",
    "In the evening the people sat before their houses and talked. ",
    "A cart stood at the gate, and nobody knew whose it was. ",
    "The rain came late that year, and the fields were dry. ",
    "Two boys carried water from the well to the kitchen. ",
    "At the market they sold bread, apples and cloth. ",
    "The bell rang once, and then it was quiet again. ",
    "Far away a dog barked, and the wind turned. ",
)
KEYS = ("red", "green", "blue", "black", "white", "brown", "gold", "grey")
_NEEDLE = "The secret colour of the tower is {key}. "
_QUESTION = "The secret colour of the tower is"


def last_readable(model: PreTrainedModel) -> int | None:
    """The most positions that the model can read at all: those of a learned table, else no bound."""
    tables = [
        layer.num_embeddings
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Embedding)
        and any(word in name.lower() for word in ("wpe", "position"))
    ]
    # a table of OPT holds two rows that are no positions, so the configuration's word counts, too
    limit = positions_of(model)
    return min([*tables, limit] if limit else tables) if tables else None


def lengths_to_try(model: PreTrainedModel, asked: Sequence[int] | None) -> list[int]:
    """Lengths in tokens, rising: the user's, or 1/4, 1/2, 1 and 3/2 of the model's limit."""
    limit = positions_of(model)
    if asked is not None:
        return sorted(set(asked))
    return [] if limit is None else sorted({limit // 4, limit // 2, limit, int(limit * _PAST)})


# ---- loss by position ----------------------------------------------------------------------


@torch.no_grad()
def loss_by_position(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    longest: int,
    accelerator: Accelerator,
) -> tuple[list[Row], str | None]:
    """Mean loss in nats a token by position, as rows {from, to, nats, tokens}, and what could not be read.

    The documents stand one after the other with an end token behind each, cut into windows: beyond the
    end of a short document the model reads an unrelated one, as it did in training.
    """
    readable = last_readable(model)
    length = longest if readable is None else min(longest, readable)
    said = None if length == longest else f"it has a table of {readable} positions and no more"
    stream: list[int] = []
    for text in texts:
        stream += encode_completion(tokenizer, text, eos=True)
    begin = start_ids(tokenizer)
    step = length - len(begin)
    windows = [begin + stream[at : at + step] for at in range(0, len(stream) - step + 1, step)]
    windows = windows[:_MOST_ROWS]
    if not windows:
        return [], f"the held-out text has {len(stream)} tokens, too few for one window of {length}"
    own = [windows[i] for i in own_share(len(windows), accelerator)]
    losses = gather_list([_losses(model, row, accelerator.device) for row in own], accelerator)
    limit = positions_of(model) or length
    width = max(1, limit // BUCKETS)
    rows = []
    for start in range(1, length, width):
        stop = min(start + width, length)
        part = [x for row in losses for x in row[start - 1 : stop - 1]]
        nats = math.fsum(part) / len(part)
        rows.append({"from": start, "to": stop - 1, "nats": nats, "tokens": len(part)})
    return rows, said


def _losses(model: PreTrainedModel, row: list[int], device: torch.device) -> list[float]:
    """Loss of each token behind the first, in nats; a long row in parts, or its logits fill the memory."""
    found: list[float] = []
    part = max(1, _LOGITS // int(model.config.vocab_size))
    for at in range(1, len(row), part):
        batch = make_sequences([row[:at]], [row[at : at + part]], 0, device)
        logprobs_BR, _ = response_logprobs(model, batch, 1.0)
        found += [-x for x in logprobs_BR[0].tolist()]
    return found


# ---- the needle ----------------------------------------------------------------------------


@torch.no_grad()
def needle_test(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    trials: int,
    accelerator: Accelerator,
) -> tuple[list[Row], str | None]:
    """How often the hidden key is the likeliest of eight, by length and depth; and what was not read.

    Rows {length, depth, value, low, high, n}; chance is 1/8. A trial asks for the words behind "The
    secret colour of the tower is" at the end of a text in which that sentence was said with its key.
    """
    readable = last_readable(model)
    said: list[str] = []
    rows: list[Row] = []
    for length in lengths:
        if readable is not None and length > readable:
            said.append(f"{length} tokens: it has a table of {readable} positions and no more")
            continue
        if needle_asks(tokenizer, length, 0.0, 0) is None:
            said.append(f"{length} tokens: too short for the needle and the question")
            continue
        spots = [(depth, trial) for depth in DEPTHS for trial in range(trials)]
        own = [spots[i] for i in own_share(len(spots), accelerator)]
        hits = gather_list(
            [_finds(model, tokenizer, length, *spot, accelerator.device) for spot in own],
            accelerator,
        )
        for depth in DEPTHS:
            part = [hit for (at, _), hit in zip(spots, hits, strict=True) if at == depth]
            rows.append({"length": length, "depth": depth, **share(part)})
    return rows, "; ".join(said) or None


def _finds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depth: float,
    trial: int,
    device: torch.device,
) -> bool:
    made = needle_asks(tokenizer, length, depth, trial)
    assert made is not None
    asks, right = made
    totals = _totals(model, asks, device)
    # a tie is no find: a broken model that scores all alike must not look good
    return all(totals[right] > total for i, total in enumerate(totals) if i != right)


def _totals(model: PreTrainedModel, asks: list[Ask], device: torch.device) -> list[float]:
    """Summed logprob of each target behind the context that they all share."""
    context, targets = asks[0].context, [one.target for one in asks]
    if all(len(target) == 1 for target in targets):
        # one reading of a long text answers for all keys
        tokens_BT = torch.tensor([context], device=device)
        logits_V = model(input_ids=tokens_BT, use_cache=False, logits_to_keep=1).logits[0, -1]
        logprobs_V = logits_V.float().log_softmax(-1)
        return [float(logprobs_V[target[0]]) for target in targets]
    batch = make_sequences([context] * len(asks), targets, 0, device)
    logprobs_BR, _ = response_logprobs(model, batch, 1.0)
    return [math.fsum(row) for row in batch.as_lists(logprobs_BR)]


def needle_asks(
    tokenizer: PreTrainedTokenizerBase, length: int, depth: float, trial: int
) -> tuple[list[Ask], int] | None:
    """One needle of `length` tokens at most: a context with each of the keys behind it, and which is right.

    depth: 0 hides it at the beginning, 1 right before the question. The trial decides the key and where
    the hay begins. None where the length is too small.
    """
    right = int(hash_fraction("needle", length, depth, trial) * len(KEYS))
    needle = encode_completion(tokenizer, _NEEDLE.format(key=KEYS[right]), eos=False)
    question = encode_completion(tokenizer, _QUESTION, eos=False)
    targets = [encode_completion(tokenizer, f" {key}", eos=False) for key in KEYS]
    begin = start_ids(tokenizer)
    room = length - sum(map(len, (begin, needle, question))) - max(map(len, targets))
    if room < 0:
        return None
    first = int(hash_fraction("hay", trial) * len(_HAY))
    text = "".join(_HAY[first:] + _HAY[:first])
    hay = encode_completion(tokenizer, text, eos=False)
    hay = (hay * (room // len(hay) + 1))[:room]
    at = round(depth * room)
    context = [*begin, *hay[:at], *needle, *hay[at:], *question]
    return [Ask(context, target) for target in targets], right
