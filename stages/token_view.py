"""What training changed, token by token: `tokens.jsonl` beside the comparisons, for the report and to look at.

A row is the policy's answer to one prompt: `tokens` (their texts), `kl` (log p/q of each, p the policy, q sft,
at the temperature of the sampling; their sum is the row's share of kl_nats) and `scores`, where there is a
reward model: what it would say, normalised, if it were asked at that token. It was trained to be asked at
the last one alone, so the numbers before it show what moved the score and are no scores of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.job import Input
from stages.answering import Answers
from stages.models import backbone_and_head, load_reward_model
from stages.prompts import PromptIds
from stages.rollout import Sequences, in_full, make_sequences, over_responses, rows_to_score

_PLACES = 4


def token_rows(
    prompts: list[PromptIds],
    said: Answers,
    ref_BR: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: Input | None,
) -> list[dict[str, Any]]:
    """The rows of tokens.jsonl. ref_BR: logprobs of the same tokens under sft."""
    scores = (
        running_scores(prompts, said.tokens, tokenizer, reward_model, ref_BR.device)
        if reward_model
        else [None] * len(prompts)
    )
    rows = []
    for i, prompt in enumerate(prompts):
        ref = ref_BR[i].tolist()
        kl = [round(own - ref[t], _PLACES) for t, own in enumerate(said.logprobs[i])]
        row = {"prompt": prompt.prompt.text, "tokens": pieces(tokenizer, said.tokens[i]), "kl": kl}
        rows.append(row | ({"scores": scores[i]} if scores[i] is not None else {}))
    return rows


def running_scores(
    prompts: list[PromptIds],
    responses: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    item: Input,
    device: torch.device,
) -> list[list[float]]:
    """The reward model's normalised score read at every token of every response.

    The last one is the score itself; a response that was cut is read with its end token.
    """
    model = load_reward_model(item).to(device).eval()
    backbone, head = backbone_and_head(model)
    mean, std = item.contract["score_mean"], item.contract["score_std"]
    ids = [p.ids for p in prompts]
    rows, _ = rows_to_score(ids, responses, tokenizer.eos_token_id)
    whole = [row[len(prompt) :] for row, prompt in zip(rows, ids, strict=True)]

    def score(batch: Sequences) -> Tensor:
        hidden_BTH = backbone(input_ids=batch.tokens_BT, use_cache=False).last_hidden_state
        # a token's own output, one after that which predicts it
        spots_BR = (batch.predict_BR + 1).clamp(max=hidden_BTH.shape[1] - 1)
        return in_full(head, hidden_BTH).gather(1, spots_BR)

    batch = make_sequences(ids, whole, tokenizer.pad_token_id, device)
    raw_BR = over_responses(score, batch)
    found: list[list[float]] = batch.as_lists((raw_BR - mean) / std)
    return [
        [round(x, _PLACES) for x in row[: len(response) - 1]] + [round(row[-1], _PLACES)]
        for row, response in zip(found, responses, strict=True)
    ]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds; a character of several tokens belongs to the last of them.

    Joined they are the decoded response, special tokens included.
    """
    found, begin, told = [], 0, ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[begin:end], skip_special_tokens=False)
        # an unfinished character decodes to the replacement character
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(told) :])
        # one token is kept before the next: some decoders treat the first of a text differently
        begin = end - 1
        told = tokenizer.decode(ids[begin:end], skip_special_tokens=False)
    return found
