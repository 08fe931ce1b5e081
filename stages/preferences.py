"""Pairs of responses from rankings, as token ids, and what a policy's logprobs say of them.

Shapes: N pairs, B rows (chosen and rejected of the pairs), R response tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from pipeline.job import Metrics
from pipeline.records import Ranking, Tally
from stages.chat import encode_completion, encode_prompt
from stages.rollout import all_logprobs, make_sequences


class Pair(NamedTuple):
    """Two responses to one prompt; each ends with the end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    prompt_id: str


class Pairs(NamedTuple):
    """The pairs of some rankings, and by reason how many were left out."""

    pairs: list[Pair]
    tally: Tally


def encode_pairs(
    rankings: list[Ranking],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    best_worst: bool = False,
) -> Pairs:
    """The strict pairs of the rankings; ties and what is too long are counted.

    best_worst: of each ranking only its first best response against its first worst.
    """
    tally = Tally()
    pairs = []
    for ranking in rankings:
        prompt = encode_prompt(tokenizer, list(ranking.messages))
        responses = [encode_completion(tokenizer, text, eos=True) for text in ranking.responses]
        K = len(responses)
        strict = ranking.strict_pairs
        ties = K * (K - 1) // 2 - len(strict)
        if ties:
            tally.reasons["tie"] += ties
        if best_worst and strict:
            best = ranking.ranks.index(min(ranking.ranks))
            worst = ranking.ranks.index(max(ranking.ranks))
            tally.reasons["not best against worst"] += len(strict) - 1
            strict = [(best, worst)]
        for chosen, rejected in strict:
            longest = max(len(responses[chosen]), len(responses[rejected]))
            if len(prompt) + longest > max_length:
                tally.drop(f"longer than {max_length} tokens with its prompt", ranking.id)
                continue
            tally.use()
            pairs.append(Pair(prompt, responses[chosen], responses[rejected], ranking.prompt_id))
    return Pairs(pairs, tally)


@torch.no_grad()
def pair_logprobs(
    model: nn.Module, pairs: list[Pair], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sum of the logprobs of each response, chosen and rejected, `[N]` each; on the CPU, float64."""
    sums = []
    for responses in ([p.chosen for p in pairs], [p.rejected for p in pairs]):
        batch = make_sequences([p.prompt for p in pairs], responses, pad_id, device)
        logprobs_NR = all_logprobs(model, batch, 1.0)
        sums.append(torch.where(batch.valid_BR, logprobs_NR, 0.0).double().sum(-1).cpu())
    return sums[0], sums[1]


def preference_metrics(
    logprobs: tuple[Tensor, Tensor], ref_logprobs: tuple[Tensor, Tensor], beta: float
) -> Metrics:
    """Loss, accuracy and mean margin of pairs whose (chosen, rejected) logprobs are given.

    The implicit reward of a response is beta log(policy / reference), and the loss of a pair is
    -log sigmoid of the difference (DPO, arXiv 2305.18290, eq. 7). Equal rewards count one half.
    """
    margins_N = beta * ((logprobs[0] - ref_logprobs[0]) - (logprobs[1] - ref_logprobs[1]))
    right_N = (margins_N > 0).double() + 0.5 * (margins_N == 0).double()
    return {
        "loss": -logsigmoid(margins_N).mean().item(),
        "accuracy": right_N.mean().item(),
        "margin": margins_N.mean().item(),
    }
