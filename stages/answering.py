"""What a model says to held-out prompts: one response each, or the best of several by a score.

Best-of-n is the baseline that needs no training (Stiennon et al. 2020, arXiv 2009.01325): n responses
of the sft model to each prompt, of which the one with the highest reward-model score is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.files import replace_durably
from pipeline.job import Inputs, Out
from pipeline.records import read_jsonl, write_jsonl
from pipeline.settings import Settings
from stages.chat import decode_response, encode_prompt
from stages.common import gather_list, num_parameters, own_share, seed_for
from stages.generation import Generated, generate
from stages.models import load_tokenizer
from stages.prompts import PromptIds, encode_prompts, load_prompts, longest_prompt, of_split
from stages.rollout import rows_to_score, score_all

Rows = list[dict[str, Any]]


class Answers(NamedTuple):
    """What one model said to every prompt. logprobs: one list a response, one number a token."""

    texts: list[str]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    ended: list[bool]


def prompts_to_answer(settings: Settings, inputs: Inputs, out: Out) -> list[PromptIds]:
    """The held-out prompts, at most evaluate.max_prompts, as the policy reads them."""
    # a file that is given for this is for this; of one that ppo trains on, the test split only
    unmarked = "test" if settings.evaluate.prompts else None
    found = of_split(load_prompts(inputs["prompts"], settings, out, unmarked), "test", settings)
    max_tokens = longest_question(settings, inputs, out)
    prompts = encode_prompts(found, load_tokenizer(inputs["policy"]), max_tokens, out)
    return prompts[: settings.evaluate.max_prompts]


def longest_question(settings: Settings, inputs: Inputs, out: Out) -> int:
    """Tokens of the longest prompt behind which a response still fits."""
    return longest_prompt(
        settings.evaluate.max_prompt_tokens,
        settings.evaluate.max_response_tokens,
        inputs["policy"].contract.get("max_length"),
        out,
    )


def answer(
    settings: Settings,
    role: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[PromptIds],
    accelerator: Accelerator,
    out: Out,
    asked_before: Path | None = None,
) -> Answers:
    """One response to each prompt; kept on disk, so that a killed run does not ask again.

    asked_before: folder of an `answers` artifact. What people have judged is in there.
    """
    if asked_before is not None and (asked_before / f"{role}.jsonl").exists():
        return _answers(_same_prompts(asked_before, role, prompts))

    def make() -> Rows:
        share = [prompts[i] for i in own_share(len(prompts), accelerator)]
        seeds = [seed_for(settings.run.seed, "evaluate", p.prompt.id) for p in share]
        return _rows(_sample(settings, model, tokenizer, share, seeds), tokenizer)

    rows = once(role, make, accelerator, out)
    written = sum(len(row["tokens"]) for row in rows)
    read = sum(len(prompt.ids) for prompt in prompts)
    out.cost["tokens"] += written
    out.cost["flops"] += 2.0 * num_parameters(model) * (read + written)
    return _answers(rows)


def best_of_n(
    settings: Settings,
    role: str,
    model: PreTrainedModel,
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[PromptIds],
    accelerator: Accelerator,
    out: Out,
) -> Answers:
    """To each prompt the best of `evaluate.best_of` responses of `model`, by the reward model."""
    n = settings.evaluate.best_of
    sizes = num_parameters(model) + num_parameters(reward_model)

    def make() -> Rows:
        began = time.perf_counter()
        share = [prompts[i] for i in own_share(len(prompts), accelerator)]
        several = [prompt for prompt in share for _ in range(n)]
        seeds = [
            seed_for(settings.run.seed, "evaluate", "best_of", p.prompt.id, k)
            for p in share
            for k in range(n)
        ]
        generated = _sample(settings, model, tokenizer, several, seeds)
        ids, _ = rows_to_score(
            [prompt.ids for prompt in several],
            [g.tokens for g in generated],
            tokenizer.eos_token_id,
        )
        scores = score_all(
            reward_model,
            ids,
            tokenizer.pad_token_id,
            accelerator.device,
            settings.evaluate.rows_per_rank,
        ).tolist()
        rows = _rows([generated[i] for i in best_places(scores, n)], tokenizer)
        seconds = (time.perf_counter() - began) / max(1, len(rows))
        for at, row in enumerate(rows):
            # what all n cost, not the one that was kept
            several_ids = ids[at * n : (at + 1) * n]
            row |= {"read": sum(map(len, several_ids)), "seconds": seconds}
            row["written"] = row["read"] - n * len(share[at].ids)
        return rows

    rows = once(role, make, accelerator, out)
    out.cost["tokens"] += sum(row["written"] for row in rows)
    out.cost["flops"] += 2.0 * sizes * sum(row["read"] for row in rows)
    out.cost[f"{role}_seconds"] = round(math.fsum(row["seconds"] for row in rows), 3)
    return _answers(rows)


def best_places(scores: list[float], n: int) -> list[int]:
    """Of each run of n scores the place of the highest; of equal ones the first."""
    return [
        max(range(at, at + n), key=lambda place: (scores[place], -place))
        for at in range(0, len(scores), n)
    ]


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from the model that it samples, in nats a response: at most this.

    log n - (n - 1) / n (Stiennon et al. 2020, arXiv 2009.01325, appendix G.3); that it is a bound, met
    where no response comes twice, show Beirami et al. 2024, arXiv 2401.01879.
    """
    return math.log(n) - (n - 1) / n


def _sample(
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[PromptIds],
    seeds: list[int],
) -> list[Generated]:
    return generate(
        model,
        # the tokenizer of a base model that the user gave may differ from the policy's
        [encode_prompt(tokenizer, list(p.prompt.messages)) for p in prompts],
        seeds,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        max_response_tokens=settings.evaluate.max_response_tokens,
        temperature=settings.evaluate.temperature,
        rows_at_once=settings.evaluate.rows_per_rank,
    )


def _same_prompts(folder: Path, role: str, prompts: list[PromptIds]) -> Rows:
    asked = [row["id"] for row in read_jsonl(folder / "prompts.jsonl")]
    assert asked == [prompt.prompt.id for prompt in prompts], "the same settings, the same prompts"
    return read_jsonl(folder / f"{role}.jsonl")


def _rows(generated: list[Generated], tokenizer: PreTrainedTokenizerBase) -> Rows:
    return [
        {
            "text": decode_response(tokenizer, g.tokens),
            "tokens": g.tokens,
            "logprobs": g.logprobs,
            "ended": g.ended,
        }
        for g in generated
    ]


def once(role: str, make: Callable[[], Rows], accelerator: Accelerator, out: Out) -> Rows:
    """The rows of all ranks: made, or as an earlier start of this step left them on disk."""
    kept = out.checkpoints / f"{role}.jsonl"
    if kept.exists():
        out.say(f"continuing: the answers of {role} are already there")
        return read_jsonl(kept)
    rows = gather_list(make(), accelerator)
    if out.rank == 0:
        out.checkpoints.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(".tmp")
        write_jsonl(temporary, rows)
        replace_durably(temporary, kept)
    accelerator.wait_for_everyone()
    return rows


def _answers(rows: Rows) -> Answers:
    return Answers(*([row[key] for row in rows] for key in ("text", "tokens", "logprobs", "ended")))
