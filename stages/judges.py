"""Judges of evaluate that score each response by itself: the second reward model, a rule, the rubric."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

from pipeline import demo_rubric, demo_world
from pipeline.errors import StageError
from pipeline.job import Input, Inputs, Metrics, Out
from pipeline.records import Prompt, Ranking, read_jsonl
from pipeline.settings import Settings
from stages.answering import Answers
from stages.chat import encode_completion, encode_prompt
from stages.common import seed_for
from stages.models import add_lora, load_tokenizer, merge_lora, new_reward_model
from stages.ranked_data import annotator_weights, encode_rankings, encode_to_train_on, longest_row
from stages.reward_measures import measure
from stages.reward_training import train_reward_model
from stages.rollout import score_all
from stages.rules import load_rule
from stages.shared_prefix import decide_sharing


def find_judge(
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


def rubric_metrics(prompts: list[Prompt], answers: dict[str, Answers]) -> Metrics:
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
