"""Benchmarks by three scorers: choice by likelihood, pair by likelihood, exact match of an answer.

Each gives, for every item, a row to look at, and figures with their intervals beside what chance gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.tasks import Task
from stages.bbq import Answered, answered, bias_scores
from stages.chat import decode_response, encode_prompt
from stages.common import own_share
from stages.generation import generate
from stages.intervals import Figure, difference, mean
from stages.likelihood import Ask, ask, ask_in_chat, context_ids, positions_of, target_logprobs
from stages.task_data import Item, Row, final_answer, gap, question

# the figures of an item that a table shows, in order; those of a scorer are a subset
_MEANS = (
    "accuracy",
    "accuracy_per_token",
    "accuracy_per_byte",
    "true_probability",
    "more_likely",
    "exact_match",
    "answered",
)


class Asked(NamedTuple):
    """A model as the scorers need it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    rows_at_once: int


def score_task(task: Task, items: list[Item], shots: str, asked: Asked) -> list[Row]:
    """One row for each item of this rank's share; rows hold what `figures` needs.

    `tokens` of a row is how many the model read and wrote for it.
    """
    share = [items[i] for i in own_share(len(items), asked.accelerator)]
    score: Callable[[Task, list[Item], str, Asked], list[Row]] = {
        "choice": _choice,
        "pair": _pair,
        "exact": _exact,
    }[task.scorer]
    with torch.no_grad():
        rows = score(task, share, shots, asked) if share else []
    return [
        {"item": item.id, **({"group": item.group} if item.group else {}), **row}
        for item, row in zip(share, rows, strict=True)
    ]


def figures(task: Task, items: list[Item], rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Every figure of a task with its 95 % interval and the chance level: {name: {value, ...}}."""
    found: dict[str, Any] = {}
    chances = _chances(task, items)
    for name in _MEANS:
        if rows and name in rows[0]:
            values = [float(row[name]) for row in rows]
            found[name] = {**mean(values, seed), "chance": chances.get(name)}
    if task.bias == "bbq":
        found |= {
            name: {**figure, "chance": 0.0}
            for name, figure in bias_scores(_answered(task, items, rows), seed).items()
        }
    if task.group is not None:
        found["groups"] = _by_group(task, items, rows, seed)
    return found


def differences(rows: Sequence[Row], other: Sequence[Row], seed: int) -> dict[str, Figure]:
    """Of two models on the same items, every mean's difference with its paired interval."""
    assert [row["item"] for row in rows] == [row["item"] for row in other]
    return {
        name: difference([float(r[name]) for r in rows], [float(r[name]) for r in other], seed)
        for name in _MEANS
        if rows and name in rows[0]
    }


def _by_group(
    task: Task, items: list[Item], rows: Sequence[Row], seed: int
) -> dict[str, dict[str, Any]]:
    groups = sorted({item.group or "" for item in items})
    found = {}
    for group in groups:
        at = [i for i, item in enumerate(items) if (item.group or "") == group]
        whole = task.model_copy(update={"group": None, "bias": None})
        found[group] = figures(whole, [items[i] for i in at], [rows[i] for i in at], seed)
    return found


def _chances(task: Task, items: list[Item]) -> dict[str, float]:
    """What a model that guesses would reach."""
    if task.scorer == "pair":
        return {"more_likely": 0.5}
    if task.scorer == "exact":
        return {"exact_match": 0.0}
    rate = sum(sum(item.right) / len(item.right) for item in items) / max(1, len(items))
    return dict.fromkeys(
        ("accuracy", "accuracy_per_token", "accuracy_per_byte", "true_probability"), rate
    )


# ---- choice --------------------------------------------------------------------------------


def _choice(task: Task, items: list[Item], shots: str, asked: Asked) -> list[Row]:
    asks = [
        _ask(task, asked.tokenizer, question(task, item, shots), target)
        for item in items
        for target in item.targets
    ]
    found, cut = _logprobs(asked, asks)
    rows, at = [], 0
    for item in items:
        own = slice(at, at + len(item.targets))
        row = choice_row(item, found[own], task.normalise)
        rows.append(row | _read(asks[own]) | _said(cut[own]))
        at = own.stop
    return rows


def choice_row(item: Item, logprobs: list[list[float]], normalise: str) -> Row:
    """Which choice each way of normalising picks, from the logprobs of the choices' tokens in nats.

    accuracy follows `normalise`; the other two are there to see whether length decides.
    true_probability is the share of the true choices in the summed probability of all (MC2 of
    TruthfulQA, arXiv 2109.07958).
    """
    sums = [math.fsum(row) for row in logprobs]
    scores = {
        "none": sums,
        "tokens": [total / len(row) for total, row in zip(sums, logprobs, strict=True)],
        "bytes": [
            total / len(text.strip().encode("utf-8", "surrogatepass"))
            for total, text in zip(sums, item.targets, strict=True)
        ],
    }
    picked = {name: _first_best(row) for name, row in scores.items()}
    best = max(sums)
    weights = [math.exp(total - best) for total in sums]
    true = math.fsum(w for w, right in zip(weights, item.right, strict=True) if right)
    return {
        "picked": picked[normalise],
        "right": [i for i, right in enumerate(item.right) if right],
        "logprobs": [round(total, 6) for total in sums],
        "accuracy": item.right[picked[normalise]],
        "accuracy_per_token": item.right[picked["tokens"]],
        "accuracy_per_byte": item.right[picked["bytes"]],
        "true_probability": true / math.fsum(weights),
    }


def _first_best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def _answered(task: Task, items: list[Item], rows: Sequence[Row]) -> list[Answered]:
    try:
        return [
            answered(item.row, row["picked"], bool(row["accuracy"]))
            for item, row in zip(items, rows, strict=True)
        ]
    except DataError as error:
        raise DataError(f"task {task.name}: {error.message}", error.hint) from None


# ---- pair ----------------------------------------------------------------------------------


def _pair(task: Task, items: list[Item], shots: str, asked: Asked) -> list[Row]:
    """Which of two whole sentences is likelier, each token after all before it.

    tokens: shared counts the tokens that both sentences have (aligned as difflib does): what differs
    is then judged by what it does to the rest, as in arXiv 2010.00133, but from the left only.
    """
    asks = [ask(asked.tokenizer, "", target) for item in items for target in item.targets]
    found, cut = _logprobs(asked, asks)
    rows: list[Row] = []
    for at in range(0, len(asks), 2):
        sums = [math.fsum(row) for row in found[at : at + 2]]
        if task.tokens == "shared":
            spots = shared_places(asks[at].target, asks[at + 1].target)
            sums = [math.fsum(found[at + side][spot[side]] for spot in spots) for side in (0, 1)]
        more, less = sums
        likelier = 0.5 if more == less else float(more > less)
        row = {"logprobs": [round(more, 6), round(less, 6)], "more_likely": likelier}
        rows.append(row | _read(asks[at : at + 2]) | _said(cut[at : at + 2]))
    return rows


def shared_places(one: list[int], other: list[int]) -> list[tuple[int, int]]:
    """Places of the tokens that two lists share, in order: (in one, in other)."""
    from difflib import SequenceMatcher

    blocks = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    return [(b.a + i, b.b + i) for b in blocks for i in range(b.size)]


# ---- exact ---------------------------------------------------------------------------------


def _exact(task: Task, items: list[Item], shots: str, asked: Asked) -> list[Row]:
    """Greedy answers, compared after the final mark; a prompt too long for the model is not answered."""
    tokenizer, model = asked.tokenizer, asked.model
    prompts = [_prompt_ids(task, tokenizer, question(task, item, shots)) for item in items]
    limit = positions_of(model)
    room = [limit is None or len(ids) + task.max_response_tokens <= limit for ids in prompts]
    fits = [i for i, has_room in enumerate(room) if has_room]
    generated = generate(
        model,
        [prompts[i] for i in fits],
        [0] * len(fits),
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        max_response_tokens=task.max_response_tokens,
        temperature=0.0,
        rows_at_once=asked.rows_at_once,
    )
    texts = {i: decode_response(tokenizer, g.tokens) for i, g in zip(fits, generated, strict=True)}
    written = {i: len(prompts[i]) + len(g.tokens) for i, g in zip(fits, generated, strict=True)}
    rows = []
    for i, item in enumerate(items):
        wanted = final_answer(item.targets[0], task)
        given = final_answer(texts[i], task) if i in texts else ""
        rows.append(
            {
                "response": texts.get(i),
                "given": given,
                "wanted": wanted,
                "exact_match": bool(given) and given == wanted,
                "answered": bool(given),
                "tokens": written.get(i, 0),
                **({} if i in texts else {"reason": "prompt longer than the model can read"}),
            }
        )
    return rows


def _prompt_ids(task: Task, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if task.chat:
        return encode_prompt(tokenizer, [{"role": "user", "content": text}])
    return context_ids(tokenizer, text)


# ---- both ----------------------------------------------------------------------------------


def _ask(task: Task, tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> Ask:
    if task.chat:
        return ask_in_chat(tokenizer, prompt, target.strip())
    return ask(tokenizer, prompt, gap(prompt, target))


def _logprobs(asked: Asked, asks: list[Ask]) -> tuple[list[list[float]], list[bool]]:
    return target_logprobs(
        asked.model,
        asks,
        asked.tokenizer.pad_token_id,
        asked.accelerator.device,
        asked.rows_at_once,
    )


def _read(asks: list[Ask]) -> Row:
    return {"tokens": sum(len(one.context) + len(one.target) for one in asks)}


def _said(cut: list[bool]) -> Row:
    """A mark on an item of which a context had to lose its beginning."""
    return {"reason": "longer than the model can read: its beginning was cut"} if any(cut) else {}
