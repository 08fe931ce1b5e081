"""What dpo and kto make of rankings, as token ids, and what a policy's logprobs say of pairs.

Shapes: N pairs or responses, R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from pipeline.errors import StageError
from pipeline.job import Input, Metrics, Out
from pipeline.records import Ranking, Tally, read_jsonl
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


class Labelled(NamedTuple):
    """A response to a prompt and whether it is desirable; it ends with the end token."""

    prompt: list[int]
    response: list[int]
    desirable: bool
    prompt_id: str


class _OfPrompt(Protocol):
    @property
    def prompt_id(self) -> str: ...


ExampleT = TypeVar("ExampleT", bound=_OfPrompt)


def load_examples(
    rankings: Input,
    split: str,
    encode: Callable[[list[Ranking]], tuple[list[ExampleT], Tally]],
    unit: str,
    out: Out,
) -> list[ExampleT]:
    """What `encode` makes of the rankings of a split; says what was left out.

    The held-out ones come in the order of their prompts' hashes: the first N of a file sorted by topic
    would be judged on its first topic.

    Raises:
        StageError: nothing is left.
    """
    assert rankings.path is not None
    rows = [Ranking.from_row(row) for row in read_jsonl(rankings.path / "rankings.jsonl")]
    examples, tally = encode([row for row in rows if row.split == split])
    out.say(f"{split} {unit}s: {tally.summary()}")
    out.derived[f"{split}_{unit}s_dropped"] = dict(tally.reasons)
    if not examples:
        raise StageError(
            f"{out.stage}: no {split} {unit} can be used: {tally.summary()}",
            "At least one prompt needs two responses that were not ranked equal.",
        )
    if split == "heldout":
        examples.sort(key=lambda example: example.prompt_id)
    return examples


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


def encode_labels(
    rankings: list[Ranking], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Labelled], Tally]:
    """Every response as desirable or not; the middle of a ranking and what is too long are counted.

    Desirable is what stands above more responses of its ranking than below: the label that most of its
    pairs would give it, where a pair makes its chosen response desirable and its rejected one not, as
    the KTO paper and TRL take pairs apart. One that stands above as many as below has no label.
    """
    tally = Tally()
    examples = []
    for ranking in rankings:
        prompt = encode_prompt(tokenizer, list(ranking.messages))
        for text, rank in zip(ranking.responses, ranking.ranks, strict=True):
            above = sum(rank < other for other in ranking.ranks)
            below = sum(rank > other for other in ranking.ranks)
            response = encode_completion(tokenizer, text, eos=True)
            if above == below:
                tally.drop("in the middle of its ranking", ranking.id)
            elif len(prompt) + len(response) > max_length:
                tally.drop(f"longer than {max_length} tokens with its prompt", ranking.id)
            else:
                tally.use()
                examples.append(Labelled(prompt, response, above > below, ranking.prompt_id))
    return examples, tally


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


def mismatched(pairs: list[Pair], max_length: int) -> list[Pair]:
    """Each prompt with the responses of a pair half the list away: neighbours may share their prompt.

    A response that does not fit behind the other prompt is cut.
    """
    half = len(pairs) // 2
    found = []
    for pair, other in zip(pairs, [*pairs[half:], *pairs[:half]], strict=True):
        room = max_length - len(pair.prompt)
        found.append(Pair(pair.prompt, other.chosen[:room], other.rejected[:room], pair.prompt_id))
    return found


def kto_metrics(
    logprobs: tuple[Tensor, Tensor],
    ref_logprobs: tuple[Tensor, Tensor],
    mismatched: tuple[Tensor, Tensor],
    ref_mismatched: tuple[Tensor, Tensor],
    beta: float,
) -> Metrics:
    """KTO's loss of pairs whose chosen responses are desirable and rejected ones not, without weights.

    kl: the reference point, max(0, mean log ratio of the mismatched responses). The loss of a desirable
    response is 1 - sigmoid(beta (log ratio - kl)), that of the other one 1 - sigmoid(beta (kl - log
    ratio)) (arXiv 2402.01306, eq. 7). Accuracy and margin are those of `preference_metrics`.
    """
    kl = max(0.0, (torch.cat(mismatched) - torch.cat(ref_mismatched)).mean().item())
    gains_N = beta * (logprobs[0] - ref_logprobs[0] - kl)
    losses_N = beta * (kl - logprobs[1] + ref_logprobs[1])
    return {
        **preference_metrics(logprobs, ref_logprobs, beta),
        "loss": 1 - torch.cat([gains_N, losses_N]).sigmoid().mean().item(),
        "kl": kl,
    }
