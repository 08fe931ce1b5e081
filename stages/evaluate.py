"""evaluate: policy against sft (and base) on prompts that no stage was trained on.

Reads: `policy`, `sft`, `base` where there is one, `policy_1` and so on (of earlier rounds), `rankings`
where there are any, `prompts`, `text`; `answers` and `judgements` where people judge; and `reward_model` where
there is one: for the score token by token, and for the best of n sft responses as a baseline (evaluate.best_of).
Writes an `evaluation`: `evaluation.json`, `comparisons.jsonl` (the answers side by side), `tokens.jsonl` (the
policy's, token by token) and rows of what else was asked for (docs/evaluation.md).

    prefline evaluate RUN evaluate.max_prompts=500

Judges (evaluate.judges, one or several; the first gives the verdict): a second reward model, of another
seed and trained on the held-out rankings, which the first one never saw; a Python function
(evaluate.rule); a model behind an OpenAI-compatible endpoint; the demo's hidden rubric. docs/evaluation.md.

Metrics (healthy range): win_rate_vs_sft with win_rate_low and win_rate_high (95 %, ties count one half;
above 0.5 with its whole interval: the feedback worked), judge, kl_nats a response from sft (< 10),
perplexity on held-out text (near sft's), mean_tokens (near sft's: else length was learned), distinct_1,
distinct_2, duplicate_rate and degenerate_rate (near sft's, near 0), bits_per_byte, repetition, empty_rate,
most_common_rate, surprise_nats (nats a token that sft finds in the policy's responses; near entropy_nats)
and `alarms` (none). What is asked for besides: tasks, refusals, toxicity, context. Of every judge judge_NAME_ and a
win rate of each two models (see `verdicts.verdict_metrics`), judge_NAME_agreement with the annotators
(near annotator_agreement, its ceiling; labels_by says whether these are people). Of the best of n:
best_of_n (the n), best_of_n_win_rate_vs_sft with _low and _high, best_of_n_kl_nats (at most),
best_of_n_mean_tokens and the like; what it took is best_of_n_seconds of the step's cost.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import worker
from pipeline.job import Inputs, Metrics, Out, win_rate_metric
from pipeline.records import Prompt, write_jsonl
from pipeline.settings import Settings
from stages.answering import Answers, answer, best_of_n, best_of_n_kl, prompts_to_answer
from stages.behaviour import Seen, look_at, prepare
from stages.behaviour_summary import summarise
from stages.common import seed_for, start, stop_if_asked
from stages.heldout_text import heldout_loss, heldout_text
from stages.judges import judge_all, rubric_metrics
from stages.label_agreement import Labels, annotator_agreement, read_labels
from stages.models import load_causal_lm, load_reward_model, load_tokenizer
from stages.prompts import PromptIds
from stages.rollout import all_logprobs, make_sequences
from stages.text_metrics import text_metrics
from stages.token_view import token_rows
from stages.verdicts import (
    Models,
    Verdict,
    models_to_compare,
    verdict_metrics,
    with_interval,
)

BEST_OF_N = "best_of_n"
_MODELS = ("policy", "sft", "base")
# what the first judge found, under names of its own -> behind judge_NAME_
_FIRST_JUDGE = {
    "win_rate_vs_sft": "win_rate_vs_sft",
    "win_rate_low": "win_rate_vs_sft_low",
    "win_rate_high": "win_rate_vs_sft_high",
    "ties": "win_rate_vs_sft_ties",
    "win_rate_vs_base": "win_rate_vs_base",
    f"{BEST_OF_N}_win_rate_vs_sft": f"{BEST_OF_N}_win_rate_vs_sft",
    f"{BEST_OF_N}_win_rate_low": f"{BEST_OF_N}_win_rate_vs_sft_low",
    f"{BEST_OF_N}_win_rate_high": f"{BEST_OF_N}_win_rate_vs_sft_high",
}


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    accelerator = start(settings, out)
    tokenizer = load_tokenizer(inputs["policy"])
    prompts = prompts_to_answer(settings, inputs, out)
    documents = heldout_text(settings, inputs, out)
    looks = prepare(settings, inputs, tokenizer, prompts, out)

    metrics: Metrics = {"prompts": len(prompts)}
    answers: dict[str, Answers] = {}
    seen: dict[str, Seen] = {}
    models = [role for role in _MODELS if role in inputs] + earlier_policies(inputs)
    asked_before = inputs["answers"].path if "answers" in inputs else None
    for role in models:
        stop_if_asked(accelerator, out, lambda: None)
        model = load_causal_lm(inputs[role]).to(accelerator.device).eval()
        own_tokenizer = load_tokenizer(inputs[role])
        answers[role] = answer(
            settings, role, model, own_tokenizer, prompts, accelerator, out, asked_before
        )
        if role == "sft":
            ref_BR = _ref_logprobs(
                settings, answers["policy"], model, prompts, tokenizer, accelerator
            )
            metrics["kl_nats"] = _kl(answers["policy"], ref_BR)
            if settings.evaluate.best_of:
                stop_if_asked(accelerator, out, lambda: None)
                answers[BEST_OF_N] = best_of_n(
                    settings,
                    BEST_OF_N,
                    model,
                    load_reward_model(inputs["reward_model"]).to(accelerator.device),
                    tokenizer,
                    prompts,
                    accelerator,
                    out,
                )
        if role in _MODELS:
            prefix = "" if role == "policy" else f"{role}_"
            loss = heldout_loss(model, own_tokenizer, documents, accelerator)
            metrics |= {prefix + name: value for name, value in loss.items()}
            seen[role] = look_at(
                looks, settings, role, model, own_tokenizer, documents, accelerator, out
            )
        out.progress(len(answers), len(models) + bool(settings.evaluate.best_of) + 1, "model")
        del model
    for role, said in answers.items():
        prefix = "" if role == "policy" else f"{role}_"
        lengths = [len(row) for row in said.tokens]
        metrics |= {
            prefix + name: value
            for name, value in text_metrics(said.texts, lengths, said.ended).items()
        }

    metrics |= summarise(looks, settings, answers, seen, metrics, len(tokenizer), out)
    questions = [p.prompt for p in prompts]
    texts = {role: said.texts for role, said in answers.items()}
    labels = read_labels(inputs["rankings"]) if "rankings" in inputs else None
    compared = models_to_compare(list(texts))
    verdicts = judge_all(settings, inputs, questions, texts, compared, labels, accelerator, out)
    metrics |= _judged(settings, verdicts, compared, texts, labels)
    if "rubric" in settings.evaluate.judges:
        metrics |= rubric_metrics(questions, texts)
    if out.rank == 0:
        write_jsonl(out.artifact / "comparisons.jsonl", _comparisons(questions, texts, verdicts))
        write_jsonl(
            out.artifact / "tokens.jsonl",
            token_rows(prompts, answers["policy"], ref_BR, tokenizer, inputs.get("reward_model")),
        )
        text = json.dumps(metrics, indent=1, sort_keys=True)
        (out.artifact / "evaluation.json").write_text(text + "\n")
    return metrics


def _judged(
    settings: Settings,
    verdicts: list[Verdict],
    compared: list[Models],
    texts: dict[str, list[str]],
    labels: Labels | None,
) -> Metrics:
    """The figures of every judge, and those of the first under the short names."""
    seed = seed_for(settings.run.seed, "evaluate", "bootstrap")
    metrics: Metrics = {
        "judge": verdicts[0].title,
        "judges": [verdict.judge for verdict in verdicts],
        "judge_titles": [verdict.title for verdict in verdicts],
        "compared": [list(models) for models in compared],
    }
    for verdict in verdicts:
        metrics |= verdict_metrics(verdict, texts, seed)
    first = f"judge_{verdicts[0].judge}_"
    for name, key in _FIRST_JUDGE.items():
        if first + key in metrics:
            metrics[name] = metrics[first + key]
    if BEST_OF_N in texts:
        metrics[BEST_OF_N] = settings.evaluate.best_of
        metrics[f"{BEST_OF_N}_kl_nats"] = best_of_n_kl(settings.evaluate.best_of)
    if labels is not None:
        metrics["labels_by"] = labels.by
        agreed = annotator_agreement(labels.rankings, seed)
        if agreed is not None:
            metrics |= with_interval("annotator_agreement", agreed)
            metrics["annotator_agreement_pairs"] = agreed.n
    return metrics


def earlier_policies(inputs: Inputs) -> list[str]:
    """policy_1, policy_2, ...: those of earlier rounds, in their order."""
    found = [role for role in inputs if role.startswith("policy_")]
    return sorted(found, key=lambda role: int(role.removeprefix("policy_")))


def _ref_logprobs(
    settings: Settings,
    said: Answers,
    reference: PreTrainedModel,
    prompts: list[PromptIds],
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> Tensor:
    """Logprobs `[B, R]` of the policy's own samples under the reference; 0 where a row has ended."""
    batch = make_sequences(
        [p.ids for p in prompts], said.tokens, tokenizer.pad_token_id, accelerator.device
    )
    with torch.no_grad():
        ref_BR = all_logprobs(reference, batch, settings.evaluate.temperature)
    return torch.where(batch.valid_BR, ref_BR, 0.0)


def _kl(said: Answers, ref_BR: Tensor) -> float:
    """Mean over responses of sum_t log p/q on the policy's own samples: KL in nats a response."""
    own = sum(math.fsum(row) for row in said.logprobs)
    return (own - float(ref_BR.double().sum())) / len(said.logprobs)


def _comparisons(
    prompts: list[Prompt], texts: dict[str, list[str]], verdicts: list[Verdict]
) -> list[dict[str, Any]]:
    """The answers side by side, with the first judge's scores and verdict, and what every judge said."""
    first = verdicts[0]
    rows = []
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": prompt.text, "base": None}
        for role, said in texts.items():
            row[role] = said[i]
            if role in first.scores:
                row[f"score_{role}"] = first.scores[role][i]
        own = first.outcomes["policy", "sft"][i]
        row["winner"] = None if own is None else _winner(own)
        row["outcomes"] = {
            verdict.judge: {
                win_rate_metric(*models): outcomes[i]
                for models, outcomes in verdict.outcomes.items()
            }
            for verdict in verdicts
        }
        rows.append(row)
    return rows


def _winner(outcome: float) -> str:
    return "tie" if outcome == 0.5 else "policy" if outcome > 0.5 else "sft"


if __name__ == "__main__":
    worker.main()
