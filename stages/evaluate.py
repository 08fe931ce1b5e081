"""evaluate: policy against sft (and base) on prompts that no stage was trained on.

Reads: `policy`, `sft`, `base` where there is one, `rankings` where there are any, `prompts`, `text`,
and `reward_model` where evaluate.best_of asks for the best of n sft responses as a baseline.
Writes an `evaluation`: `evaluation.json` and `comparisons.jsonl` (the answers side by side).

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
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import demo_rubric, demo_world, worker
from pipeline.errors import StageError
from pipeline.job import Input, Inputs, Metrics, Out
from pipeline.records import Prompt, Ranking, read_jsonl, write_jsonl
from pipeline.settings import Settings
from stages.answering import Answers, answer, best_of_n, best_of_n_kl
from stages.chat import encode_completion, encode_prompt
from stages.common import seed_for, start, stop_if_asked
from stages.data import is_heldout, read_demonstrations, read_texts
from stages.judging import text_metrics, win_rate
from stages.models import (
    add_lora,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    merge_lora,
    new_reward_model,
)
from stages.prompts import PromptIds, encode_prompts, load_prompts, longest_prompt, of_split
from stages.ranked_data import annotator_weights, encode_rankings, encode_to_train_on, longest_row
from stages.reward_measures import measure
from stages.reward_training import train_reward_model
from stages.rollout import all_logprobs, make_sequences, score_all
from stages.rules import load_rule
from stages.shared_prefix import decide_sharing

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
    heldout_text = _heldout_text(settings, inputs, out)

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
            metrics["kl_nats"] = _kl(
                settings, answers["policy"], model, prompts, tokenizer, accelerator
            )
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
        metrics[f"{prefix}perplexity"] = _perplexity(
            model, own_tokenizer, heldout_text, accelerator
        )
        out.progress(len(answers), 4 + bool(settings.evaluate.best_of), "model")
        del model
    for role, said in answers.items():
        prefix = "" if role == "policy" else f"{role}_"
        lengths = [len(row) for row in said.tokens]
        metrics |= {
            prefix + name: value
            for name, value in text_metrics(said.texts, lengths, said.ended).items()
        }

    score, judged = _judge(settings, inputs, accelerator, out)
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
        metrics |= _rubric_metrics(questions, answers)
    if out.rank == 0:
        rows = _comparisons(questions, answers, scores)
        write_jsonl(out.artifact / "comparisons.jsonl", rows)
        text = json.dumps(metrics, indent=1, sort_keys=True)
        (out.artifact / "evaluation.json").write_text(text + "\n")
    return metrics


def _kl(
    settings: Settings,
    said: Answers,
    reference: PreTrainedModel,
    prompts: list[PromptIds],
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> float:
    """Mean over responses of sum_t log p/q on the policy's own samples: KL in nats a response."""
    batch = make_sequences(
        [p.ids for p in prompts], said.tokens, tokenizer.pad_token_id, accelerator.device
    )
    with torch.no_grad():
        ref_BR = all_logprobs(reference, batch, settings.evaluate.temperature)
    valid_BR = batch.valid_BR
    ref = float(torch.where(valid_BR, ref_BR, 0.0).double().sum())
    own = sum(math.fsum(row) for row in said.logprobs)
    return (own - ref) / len(prompts)


def _heldout_text(settings: Settings, inputs: Inputs, out: Out) -> list[str]:
    """Documents that no stage was trained on, for the perplexity; none if there is no text at all."""
    if "text" not in inputs:
        return []
    if settings.evaluate.text or settings.pretrain.data:
        texts, tally = read_texts(
            inputs["text"].sources, settings.pretrain.text_field, settings.pretrain.max_documents
        )
        everything = settings.evaluate.text is not None
        fraction = settings.pretrain.heldout_fraction
        kept = (text for text in texts if everything or is_heldout(text, fraction))
    else:
        conversations, tally = read_demonstrations(
            inputs["text"].sources, settings.sft.max_examples
        )
        fraction = settings.sft.heldout_fraction
        kept = (
            "\n\n".join(message["content"] for message in conversation)
            for conversation in conversations
            if is_heldout(conversation, fraction)
        )
    found = list(islice(kept, settings.evaluate.max_documents))
    # of text that a stage before has read, its own limit holds: only nothing at all is refused
    tally.check("evaluate.text", 1.0)
    if tally.reasons:
        out.say(f"text for the perplexity: {tally.summary()}")
        out.derived["documents_dropped"] = dict(tally.reasons)
    return found


@torch.no_grad()
def _perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    accelerator: Accelerator,
    max_length: int = 512,
) -> float | None:
    """exp of the mean negative logprob of a token, over the documents (cut at 512 tokens)."""
    limit = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    rows = [encode_completion(tokenizer, text, eos=False)[:limit] for text in texts]
    # the first token has nothing before it to be predicted from
    rows = [row for row in rows if len(row) >= 2]
    if not rows:
        return None
    batch = make_sequences(
        [row[:1] for row in rows],
        [row[1:] for row in rows],
        tokenizer.pad_token_id,
        accelerator.device,
    )
    logprobs_BR = all_logprobs(model, batch, 1.0, rows_at_once=16)
    mean = torch.where(batch.valid_BR, logprobs_BR, 0.0).double().sum() / batch.valid_BR.sum()
    return math.exp(-float(mean))


def _judge(
    settings: Settings, inputs: Inputs, accelerator: Accelerator, out: Out
) -> tuple[Callable[[list[Prompt], list[str]], list[float]], Metrics]:
    """A function that scores responses, and what is known of its quality."""
    if settings.evaluate.judge == "rubric":

        def by_rubric(prompts: list[Prompt], responses: list[str]) -> list[float]:
            return [
                demo_rubric.score(prompt.text, response)
                for prompt, response in zip(prompts, responses, strict=True)
            ]

        return by_rubric, {"judge": "rubric"}
    if settings.evaluate.judge == "rule":
        assert settings.evaluate.rule is not None
        rule = load_rule(settings.evaluate.rule, "evaluate.rule")
        out.derived["rule"] = rule.origin

        def by_rule(prompts: list[Prompt], responses: list[str]) -> list[float]:
            return [
                rule(list(prompt.messages), response)
                for prompt, response in zip(prompts, responses, strict=True)
            ]

        return by_rule, {"judge": f"the rule {rule.name}"}
    return _second_reward_model(settings, inputs, accelerator, out)


def _second_reward_model(
    settings: Settings, inputs: Inputs, accelerator: Accelerator, out: Out
) -> tuple[Callable[[list[Prompt], list[str]], list[float]], Metrics]:
    """A judge with another seed, trained on the held-out rankings only."""
    assert inputs["rankings"].path is not None
    start_from: Input = inputs["sft"]
    tokenizer = load_tokenizer(start_from)
    rankings = [
        Ranking.from_row(row) for row in read_jsonl(inputs["rankings"].path / "rankings.jsonl")
    ]
    seed = seed_for(settings.run.seed, "evaluate", "judge", out.round)
    torch.manual_seed(seed)
    model = new_reward_model(start_from, settings.reward.dropout)
    max_length = longest_row(settings.reward, model)
    unseen, tally = encode_to_train_on(
        [r for r in rankings if r.split == "heldout"],
        tokenizer,
        max_length,
        settings.reward,
        annotator_weights(inputs["rankings"].path, settings.reward),
    )
    seen, _ = encode_rankings([r for r in rankings if r.split == "train"], tokenizer, max_length)
    if not unseen:
        raise StageError(
            f"evaluate: the judge needs held-out rankings: {tally.summary()}",
            "Raise rank.heldout_fraction, or collect more rankings.",
        )
    out.say(f"judge: training a second reward model on {len(unseen)} held-out rankings")
    model = add_lora(model, settings.reward.lora, "reward").to(accelerator.device)
    pad_id, device = tokenizer.pad_token_id, accelerator.device
    groups = [ranking.group for ranking in unseen + seen]
    share_prefix = decide_sharing(settings.reward.share_prefix, model, groups, pad_id, out)
    train_reward_model(
        model,
        unseen,
        settings.reward,
        accelerator,
        out,
        pad_id=pad_id,
        seed=seed,
        keep_checkpoints=1,
        share_prefix=share_prefix,
        evaluate=lambda _: {},
    )
    model = merge_lora(model).eval()

    def by_model(prompts: list[Prompt], responses: list[str]) -> list[float]:
        rows = [
            encode_prompt(tokenizer, list(prompt.messages))
            + encode_completion(tokenizer, response, eos=True)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return score_all(model, rows, pad_id, device).tolist()

    # the first model's training rankings are new to this one
    quality = measure(model, seen, pad_id, seed, share_prefix) if seen else {"accuracy": None}
    return by_model, {"judge": "reward_model", "judge_accuracy": quality["accuracy"]}


def _rubric_metrics(prompts: list[Prompt], answers: dict[str, Answers]) -> Metrics:
    """Mean of each quality, share of well-formed responses, number of different story skeletons."""
    metrics: Metrics = {}
    for role, said in answers.items():
        rows = [
            demo_rubric.qualities(prompt.text, text)
            for prompt, text in zip(prompts, said.texts, strict=True)
        ]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in demo_rubric.QUALITIES}
        metrics[f"quality_{role}"] = means
        prefix = "" if role == "policy" else f"{role}_"
        well = [demo_rubric.well_formed(text) for text in said.texts]
        metrics[f"{prefix}well_formed"] = sum(well) / len(well)
        metrics[f"{prefix}skeletons"] = len({demo_world.skeleton(text) for text in said.texts})
        scores = [demo_rubric.score(p.text, t) for p, t in zip(prompts, said.texts, strict=True)]
        metrics[f"{prefix}rubric_score"] = sum(scores) / len(scores)
    return metrics


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
