"""evaluate: policy against sft (and base) on prompts that no stage was trained on.

Reads: `policy`, `sft`, `base` where there is one, `rankings` where there are any, `prompts`, `text`,
and `reward_model` where there is one: for the score token by token, and for the best of n (evaluate.best_of).
Writes an `evaluation`: `evaluation.json`, `comparisons.jsonl` (the answers side by side) and `tokens.jsonl` (the
policy's, token by token).

    prefline evaluate RUN evaluate.max_prompts=500

The judge is a second reward model, of another seed and trained on the held-out rankings, which the
first one never saw; or a Python function (evaluate.rule); or the demo's hidden rubric.

Metrics (healthy range): win_rate_vs_sft with win_rate_low and win_rate_high (95 %, ties count one half;
above 0.5 with its whole interval: the feedback worked), judge, judge_accuracy (a reward-model judge on
rankings it was not trained on), kl_nats a response from sft (< 10), perplexity on held-out text (near
sft's), mean_tokens (near sft's: else length was learned), distinct_1, distinct_2, duplicate_rate and
degenerate_rate (near sft's, near 0). Of the best of n: best_of_n (the n), best_of_n_win_rate_vs_sft
with _low and _high, best_of_n_kl_nats (at most), best_of_n_mean_tokens and the like; what it took is
best_of_n_seconds of the step's cost.
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
from pipeline.job import Inputs, Metrics, Out
from pipeline.records import Prompt, write_jsonl
from pipeline.settings import Settings
from stages.answering import Answers, answer, best_of_n, best_of_n_kl
from stages.common import seed_for, start, stop_if_asked
from stages.heldout_text import heldout_text, perplexity
from stages.judges import find_judge, rubric_metrics
from stages.judging import text_metrics, win_rate
from stages.models import load_causal_lm, load_reward_model, load_tokenizer
from stages.prompts import PromptIds, encode_prompts, load_prompts, longest_prompt, of_split
from stages.rollout import all_logprobs, make_sequences
from stages.token_view import token_rows

BEST_OF_N = "best_of_n"


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    accelerator = start(settings, out)
    tokenizer = load_tokenizer(inputs["policy"])
    # a file that is given for this is for this; of one that ppo trains on, the test split only
    unmarked = "test" if settings.evaluate.prompts else None
    found = of_split(load_prompts(inputs["prompts"], settings, out, unmarked), "test", settings)
    max_tokens = longest_prompt(
        settings.evaluate.max_prompt_tokens,
        settings.evaluate.max_response_tokens,
        inputs["policy"].contract.get("max_length"),
        out,
    )
    prompts = encode_prompts(found, tokenizer, max_tokens, out)
    prompts = prompts[: settings.evaluate.max_prompts]
    documents = heldout_text(settings, inputs, out)

    metrics: Metrics = {"prompts": len(prompts)}
    answers: dict[str, Answers] = {}
    for role in ("policy", "sft", "base"):
        if role not in inputs:
            continue
        stop_if_asked(accelerator, out, lambda: None)
        model = load_causal_lm(inputs[role]).to(accelerator.device).eval()
        own_tokenizer = load_tokenizer(inputs[role])
        answers[role] = answer(settings, role, model, own_tokenizer, prompts, accelerator, out)
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
        prefix = "" if role == "policy" else f"{role}_"
        metrics[f"{prefix}perplexity"] = perplexity(model, own_tokenizer, documents, accelerator)
        out.progress(len(answers), 4 + bool(settings.evaluate.best_of), "model")
        del model
    for role, said in answers.items():
        prefix = "" if role == "policy" else f"{role}_"
        lengths = [len(row) for row in said.tokens]
        metrics |= {
            prefix + name: value
            for name, value in text_metrics(said.texts, lengths, said.ended).items()
        }

    score, judged = find_judge(settings, inputs, accelerator, out)
    metrics |= judged
    seed = seed_for(settings.run.seed, "evaluate", "bootstrap")
    questions = [p.prompt for p in prompts]
    scores = {role: score(questions, said.texts) for role, said in answers.items()}
    against_sft = win_rate(scores["policy"], scores["sft"], seed)
    metrics |= {
        "win_rate_vs_sft": against_sft.rate,
        "win_rate_low": against_sft.low,
        "win_rate_high": against_sft.high,
        "ties": against_sft.ties,
    }
    if BEST_OF_N in scores:
        best = win_rate(scores[BEST_OF_N], scores["sft"], seed)
        metrics |= {
            BEST_OF_N: settings.evaluate.best_of,
            f"{BEST_OF_N}_win_rate_vs_sft": best.rate,
            f"{BEST_OF_N}_win_rate_low": best.low,
            f"{BEST_OF_N}_win_rate_high": best.high,
            f"{BEST_OF_N}_kl_nats": best_of_n_kl(settings.evaluate.best_of),
        }
    if "base" in scores:
        metrics["win_rate_vs_base"] = win_rate(scores["policy"], scores["base"], seed).rate
    if settings.evaluate.judge == "rubric":
        metrics |= rubric_metrics(questions, answers)
    if out.rank == 0:
        rows = _comparisons(questions, answers, scores)
        write_jsonl(out.artifact / "comparisons.jsonl", rows)
        write_jsonl(
            out.artifact / "tokens.jsonl",
            token_rows(prompts, answers["policy"], ref_BR, tokenizer, inputs.get("reward_model")),
        )
        text = json.dumps(metrics, indent=1, sort_keys=True)
        (out.artifact / "evaluation.json").write_text(text + "\n")
    return metrics


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
    prompts: list[Prompt], answers: dict[str, Answers], scores: dict[str, list[float]]
) -> list[dict[str, Any]]:
    rows = []
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": prompt.text, "base": None}
        for role, said in answers.items():
            row[role] = said.texts[i]
            row[f"score_{role}"] = scores[role][i]
        own, other = scores["policy"][i], scores["sft"][i]
        row["winner"] = "tie" if own == other else "policy" if own > other else "sft"
        rows.append(row)
    return rows


if __name__ == "__main__":
    worker.main()
