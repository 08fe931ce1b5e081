"""What a model does, beside whether it wins: defects of its responses, refusals, toxicity, its context
window, benchmarks; and the alarms of a policy gone wrong.

`prepare` reads all that is asked for before a model is loaded, `look_at` asks one model;
`behaviour_summary.summarise` makes the figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.job import Inputs, Out
from pipeline.records import Prompt
from pipeline.settings import Settings
from pipeline.tasks import Task, read_task
from stages.answering import longest_question, once
from stages.benchmarks import Asked, score_task
from stages.chat import decode_response, encode_prompt
from stages.common import num_parameters, own_share, seed_for, stop_if_asked
from stages.context_window import lengths_to_try, loss_by_position, needle_test
from stages.generation import generate
from stages.likelihood import positions_of
from stages.prompts import PromptIds, encode_prompts, load_prompts
from stages.refusals import (
    agreement,
    classify,
    read_annotations,
    read_refusal_prompts,
)
from stages.rules import Rule, load_rule
from stages.task_data import Item, Row, read_items
from stages.toxicity import scores_of


@dataclass(frozen=True)
class Looks:
    """What is looked at. refusal_groups: safe or unsafe, one a refusal prompt."""

    tasks: list[tuple[Task, list[Item], str]] = field(default_factory=list)
    refusal_prompts: list[PromptIds] = field(default_factory=list)
    refusal_groups: list[str] = field(default_factory=list)
    people_on_refusals: dict[str, Any] | None = None
    scorer: Rule | None = None
    toxicity_prompts: list[PromptIds] = field(default_factory=list)


@dataclass
class Seen:
    """What was found of one model: rows of each task, of refusals, of toxicity and of the context."""

    tasks: dict[str, list[Row]] = field(default_factory=dict)
    refusals: list[Row] = field(default_factory=list)
    toxicity: list[Row] = field(default_factory=list)
    context: list[Row] = field(default_factory=list)
    context_limit: int | None = None


def prepare(
    settings: Settings,
    inputs: Inputs,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[PromptIds],
    out: Out,
) -> Looks:
    """Read tasks, prompts and labels that evaluate asks for; say what cannot be used.

    prompts: those of the comparison.

    Raises:
        ConfigError, DataError: a task file, its data or a prompt file is wrong, with its place.
    """
    own = settings.evaluate
    tasks = []
    for path in inputs["tasks"].sources if "tasks" in inputs else ():
        task = read_task(Path(path))
        items, shots, tally = read_items(task, own.task_items)
        out.say(f"task {task.name}: {len(items)} items of {tally.summary()}")
        if tally.reasons:
            out.derived[f"{task.name}_dropped"] = dict(tally.reasons)
        tasks.append((task, items, shots))
    refusals: list[PromptIds] = []
    groups: list[str] = []
    if "refusal_prompts" in inputs:
        found, tally = read_refusal_prompts(inputs["refusal_prompts"].sources)
        out.say(f"refusal prompts: {tally.summary()}")
        group_of = {prompt.id: group for prompt, group in found}
        refusals = encode_prompts(
            [prompt for prompt, _ in found], tokenizer, longest_question(settings, inputs, out), out
        )
        groups = [group_of[p.prompt.id] for p in refusals]
    people = None
    if "refusal_annotations" in inputs:
        labelled, tally = read_annotations(inputs["refusal_annotations"].sources)
        out.say(f"refusal annotations: {tally.summary()}")
        people = agreement(labelled)
    scorer, toxicity_prompts = None, []
    if own.toxicity is not None:
        scorer = load_rule(own.toxicity, "evaluate.toxicity")
        out.derived["toxicity_scorer"] = scorer.origin
        toxicity_prompts = prompts
        if "toxicity_prompts" in inputs:
            loaded = load_prompts(inputs["toxicity_prompts"], settings, out, "test")
            toxicity_prompts = encode_prompts(
                loaded, tokenizer, longest_question(settings, inputs, out), out
            )
    return Looks(tasks, refusals, groups, people, scorer, toxicity_prompts)


def look_at(
    looks: Looks,
    settings: Settings,
    role: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    accelerator: Accelerator,
    out: Out,
) -> Seen:
    """Ask one model all that is asked for; what is done stays on disk for a run that goes on."""
    own = settings.evaluate
    seen = Seen(context_limit=positions_of(model))
    asked = Asked(model, tokenizer, accelerator, own.rows_per_rank)
    for task, items, shots in looks.tasks:
        stop_if_asked(accelerator, out, lambda: None)
        name = f"task-{task.name}-{role}"
        seen.tasks[task.name] = once(
            name,
            lambda task=task, items=items, shots=shots: score_task(task, items, shots, asked),  # type: ignore[misc]
            accelerator,
            out,
        )
    if looks.refusal_prompts:
        stop_if_asked(accelerator, out, lambda: None)
        seen.refusals = once(
            f"refusals-{role}", lambda: _refuse(looks, settings, asked), accelerator, out
        )
    if looks.scorer is not None:
        stop_if_asked(accelerator, out, lambda: None)
        seen.toxicity = once(
            f"toxicity-{role}", lambda: _toxic(looks, settings, asked), accelerator, out
        )
    if own.context_documents or own.needle_trials:
        stop_if_asked(accelerator, out, lambda: None)
        seen.context = once(
            f"context-{role}", lambda: _context(settings, asked, documents), accelerator, out
        )
    read = [*seen.refusals, *seen.toxicity, *seen.context]
    read += [row for rows in seen.tasks.values() for row in rows]
    tokens = sum(row.get("tokens", 0) for row in read)
    out.cost["tokens"] += tokens
    out.cost["flops"] += 2.0 * num_parameters(model) * tokens
    return seen


def _refuse(looks: Looks, settings: Settings, asked: Asked) -> list[Row]:
    """Greedy answers to the refusal prompts of this rank's share, and what the rule says of them."""
    share_of = own_share(len(looks.refusal_prompts), asked.accelerator)
    prompts = [looks.refusal_prompts[i].prompt for i in share_of]
    texts, tokens = _responses(settings, asked, prompts, [0] * len(prompts), 0.0)
    return [
        {
            "prompt": prompts[at].text,
            "group": looks.refusal_groups[i],
            "response": texts[at],
            "label": classify(texts[at]),
            "tokens": tokens[at],
        }
        for at, i in enumerate(share_of)
    ]


def _toxic(looks: Looks, settings: Settings, asked: Asked) -> list[Row]:
    """toxicity_samples responses to each prompt of this rank's share, and their scores."""
    assert looks.scorer is not None
    k = settings.evaluate.toxicity_samples
    share_of = own_share(len(looks.toxicity_prompts), asked.accelerator)
    prompts = [looks.toxicity_prompts[i].prompt for i in share_of]
    texts, tokens = _responses(
        settings,
        asked,
        [prompt for prompt in prompts for _ in range(k)],
        [
            seed_for(settings.run.seed, "evaluate", "toxicity", prompt.id, sample)
            for prompt in prompts
            for sample in range(k)
        ],
        settings.evaluate.temperature,
    )
    rows = []
    for at, prompt in enumerate(prompts):
        several = texts[at * k : (at + 1) * k]
        rows.append(
            {
                "prompt": prompt.text,
                "responses": several,
                "toxicity": scores_of(looks.scorer, list(prompt.messages), several),
                "tokens": sum(tokens[at * k : (at + 1) * k]),
            }
        )
    return rows


def _responses(
    settings: Settings, asked: Asked, prompts: list[Prompt], seeds: list[int], temperature: float
) -> tuple[list[str], list[int]]:
    """A response to each prompt, and the tokens that were read and written for it."""
    ids = [encode_prompt(asked.tokenizer, list(prompt.messages)) for prompt in prompts]
    generated = generate(
        asked.model,
        ids,
        seeds,
        eos_id=asked.tokenizer.eos_token_id,
        pad_id=asked.tokenizer.pad_token_id,
        max_response_tokens=settings.evaluate.max_response_tokens,
        temperature=temperature,
        rows_at_once=asked.rows_at_once,
    )
    texts = [decode_response(asked.tokenizer, g.tokens) for g in generated]
    return texts, [len(row) + len(g.tokens) for row, g in zip(ids, generated, strict=True)]


def _context(settings: Settings, asked: Asked, documents: list[str]) -> list[Row]:
    """Rows of the context window, `kind` position, needle or unread; all of them on rank 0."""
    own, model = settings.evaluate, asked.model
    lengths = lengths_to_try(model, own.context_lengths)
    rows: list[Row] = []
    if not lengths:
        return [{"kind": "unread", "what": "all", "why": "the model names no longest input"}]
    if own.context_documents:
        found, why = loss_by_position(
            model,
            asked.tokenizer,
            documents[: own.context_documents],
            max(lengths),
            asked.accelerator,
        )
        rows += [{"kind": "position", **row} for row in found]
        rows += [{"kind": "unread", "what": "loss by position", "why": why}] if why else []
    if own.needle_trials:
        found, why = needle_test(
            model, asked.tokenizer, lengths, own.needle_trials, asked.accelerator
        )
        rows += [{"kind": "needle", **row, "tokens": row["length"] * row["n"]} for row in found]
        rows += [{"kind": "unread", "what": "needle", "why": why}] if why else []
    return rows if asked.accelerator.process_index == 0 else []
