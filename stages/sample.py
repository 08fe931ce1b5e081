"""sample: K responses per prompt from a model, to be ranked.

Reads: `model` (model or policy), `prompts` (the user's) and, where select.by asks which prompts are
ranked, `reward_model` (of the round before). Writes a `samples` artifact: `samples.jsonl` (prompt, its
different responses; priority and selection_probability where prompts were chosen) and `prompts.jsonl`
(every prompt and its split).

    prefline sample RUN sample.temperature=0.9

Only training prompts are sampled; validation and test prompts wait for ppo and evaluate. Exact
duplicates among the responses of a prompt are merged and counted.

Metrics (healthy range): prompts, responses, duplicates_merged (few; many mean a low temperature or a
collapsed model), empty_responses (0), too_few (prompts with fewer than two different responses: 0),
eos_rate (> 0.95: the model has learned to stop), mean_tokens. Where prompts were chosen, all of these
are of the candidates; also selected, selected_at_random, mean_priority (of the candidates) and
mean_priority_selected (above it).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import worker
from pipeline.errors import StageError
from pipeline.files import replace_durably
from pipeline.job import Inputs, Metrics, Out
from pipeline.records import Response, SampleGroup, is_heldout, read_jsonl, write_jsonl
from pipeline.settings import Settings
from stages.chat import decode_response
from stages.common import epoch_order, num_parameters, seed_for, start, stop_if_asked
from stages.generation import Generated, generate
from stages.models import load_causal_lm, load_tokenizer, positions
from stages.prompts import PromptIds, encode_prompts, load_prompts, longest_prompt, of_split
from stages.selection import priorities, select

_PROMPTS_PER_PART = 64


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    accelerator = start(settings, out)
    tokenizer = load_tokenizer(inputs["model"])
    model = load_causal_lm(inputs["model"]).to(accelerator.device)

    prompts = load_prompts(inputs["prompts"], settings, out)
    train = of_split(prompts, "train", settings)
    count = min(settings.sample.max_prompts or len(train), len(train))
    chooses = "reward_model" in inputs
    if settings.select.by != "random" and not chooses:
        out.say("prompts are taken at random: there is no reward model yet to ask (select.by)")
    candidates = min(count * settings.select.candidates, len(train)) if chooses else count
    # each round takes the next prompts of one shuffled order; the first has none to choose among
    begin = count + (out.round - 2) * candidates if chooses else (out.round - 1) * count
    picked = epoch_order(len(train), begin, candidates, settings.run.seed, "sample", "prompts")
    if chooses:
        # candidates from the end of one pass may come again at the beginning of the next
        picked = list(dict.fromkeys(picked))
    max_tokens = longest_prompt(
        settings.sample.max_prompt_tokens,
        settings.sample.max_response_tokens,
        positions(model),
        out,
    )
    encoded = encode_prompts([train[i] for i in picked], tokenizer, max_tokens, out)
    parts = _sample_parts(settings, encoded, model, tokenizer, accelerator, out)

    rows = [row for part in parts for row in read_jsonl(part)]
    metrics = _metrics(rows, out)
    groups = [row["group"] for row in rows]
    if chooses:
        groups, found = _select(settings, inputs, groups, count, tokenizer, accelerator, out)
        metrics |= found
    if out.rank == 0:
        write_jsonl(out.artifact / "prompts.jsonl", (p.to_row() for p in prompts))
        write_jsonl(out.artifact / "samples.jsonl", groups)
    out.contract.update(inputs["model"].contract)
    read = settings.sample.responses_per_prompt * sum(len(prompt.ids) for prompt in encoded)
    out.cost["flops"] += 2.0 * num_parameters(model) * (read + out.cost["tokens"])
    return metrics


def _sample_parts(
    settings: Settings,
    prompts: list[PromptIds],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    out: Out,
) -> list[Path]:
    """One file for every 64 prompts, written whole: a killed run keeps the finished ones."""
    folder = out.checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(prompts), _PROMPTS_PER_PART)
    parts = [folder / f"part-{number:05d}.jsonl" for number in range(len(starts))]
    done = sum(part.exists() for part in parts)
    if done:
        out.say(f"continuing: {done} of {len(parts)} parts are already sampled")
        out.resumed_from = done
    for number, at in enumerate(starts):
        # the ranks meet once in as many parts as there are ranks; before every part, all would wait
        # for the one whose turn it is
        if number % accelerator.num_processes == 0:
            stop_if_asked(accelerator, out, lambda: None)
        if number % accelerator.num_processes != accelerator.process_index:
            continue
        if not parts[number].exists():
            rows = _sample(settings, prompts[at : at + _PROMPTS_PER_PART], model, tokenizer, out)
            temporary = parts[number].with_suffix(".tmp")
            write_jsonl(temporary, rows)
            replace_durably(temporary, parts[number])
        out.progress(min(at + _PROMPTS_PER_PART, len(prompts)), len(prompts), "prompt")
    accelerator.wait_for_everyone()
    return parts


def _sample(
    settings: Settings,
    prompts: list[PromptIds],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Out,
) -> list[dict[str, Any]]:
    K = settings.sample.responses_per_prompt
    generated = generate(
        model,
        [p.ids for p in prompts for _ in range(K)],
        [
            seed_for(settings.run.seed, "sample", out.round, p.prompt.id, k)
            for p in prompts
            for k in range(K)
        ],
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        max_response_tokens=settings.sample.max_response_tokens,
        temperature=settings.sample.temperature,
        top_p=settings.sample.top_p,
        rows_at_once=settings.sample.rows_per_rank,
    )
    return [_group(p, generated[i * K : (i + 1) * K], tokenizer) for i, p in enumerate(prompts)]


def _group(
    prompt: PromptIds, generated: list[Generated], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The different, not empty responses of one prompt, and how many were not."""
    different: dict[str, Response] = {}
    empty = 0
    for item in generated:
        text = decode_response(tokenizer, item.tokens)
        if not text.strip():
            empty += 1
            continue
        different.setdefault(text, Response(text, item.ended, len(item.tokens)))
    group = SampleGroup(prompt.prompt, tuple(different.values()))
    return {
        "group": group.to_row(),
        "sampled": len(generated),
        "empty": empty,
        "ended": sum(item.ended for item in generated),
        "tokens": sum(len(item.tokens) for item in generated),
    }


def _select(
    settings: Settings,
    inputs: Inputs,
    rows: list[dict[str, Any]],
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    out: Out,
) -> tuple[list[dict[str, Any]], Metrics]:
    """The `count` prompts that are worth ranking, and how they were chosen."""
    own = settings.select
    groups = [SampleGroup.from_row(row) for row in rows if len(row["responses"]) > 1]
    wanted = priorities(own.by, inputs["reward_model"], tokenizer, groups, accelerator, out)
    ids = [group.prompt.id for group in groups]
    heldout = [is_heldout(prompt_id, settings.rank.heldout_fraction) for prompt_id in ids]
    seed = seed_for(settings.run.seed, "select", out.round)
    selection = select(ids, wanted, heldout, count, own.random_share, seed)
    chosen = selection.chosen
    at_random = len(selection.at_random)
    if len(groups) <= count:
        out.say(f"all {len(groups)} prompts go on: no more than sample.max_prompts can be ranked")
    else:
        out.say(
            f"{len(chosen)} of {len(groups)} prompts go on to be ranked: {len(chosen) - at_random} by"
            f" {own.by}, {at_random} at random"
        )
    found = {
        "selected": len(chosen),
        "selected_at_random": at_random,
        "mean_priority": sum(wanted) / len(wanted),
        "mean_priority_selected": sum(wanted[i] for i in chosen) / len(chosen),
    }
    marked = (
        replace(groups[i], priority=wanted[i], selection_probability=selection.probability[i])
        for i in chosen
    )
    return [group.to_row() for group in marked], found


def _metrics(rows: list[dict[str, Any]], out: Out) -> Metrics:
    sampled = sum(row["sampled"] for row in rows)
    kept = sum(len(row["group"]["responses"]) for row in rows)
    empty = sum(row["empty"] for row in rows)
    too_few = sum(len(row["group"]["responses"]) < 2 for row in rows)
    if too_few == len(rows):
        raise StageError(
            "sample: no prompt got two different responses, so there is nothing to rank",
            "Raise sample.temperature or sample.responses_per_prompt, or look at the model.",
        )
    out.cost["tokens"] += sum(row["tokens"] for row in rows)
    return {
        "prompts": len(rows),
        "responses": kept,
        "duplicates_merged": sampled - kept - empty,
        "empty_responses": empty,
        "too_few": too_few,
        "eos_rate": sum(row["ended"] for row in rows) / sampled,
        "mean_tokens": sum(row["tokens"] for row in rows) / sampled,
    }


if __name__ == "__main__":
    worker.main()
