"""Who judges, one after the other: what each said of which two models, and how often it agrees with people."""

from __future__ import annotations

from accelerate import Accelerator

from pipeline import demo_rubric, demo_world
from pipeline.job import Input, Inputs, Metrics, Out
from pipeline.records import Prompt, Ranking, read_jsonl
from pipeline.settings import Settings
from pipeline.statistics import Estimate
from stages.common import seed_for, stop_if_asked
from stages.endpoint_judge import by_endpoint
from stages.label_agreement import Labels, Score, agreement_of_scores, annotator_agreement
from stages.rules import load_rule
from stages.second_reward_model import second_reward_model
from stages.verdicts import Models, Outcomes, Verdict, outcomes_of

Texts = dict[str, list[str]]


def judge_all(
    settings: Settings,
    inputs: Inputs,
    prompts: list[Prompt],
    texts: Texts,
    compared: list[Models],
    labels: Labels | None,
    accelerator: Accelerator,
    out: Out,
) -> list[Verdict]:
    """The verdict of each of evaluate.judges, in their order.

    Args:
        texts: what each model said to each prompt.
        labels: rankings of people (or simulated annotators), to measure agreement with.
    """
    verdicts = []
    for judge in settings.evaluate.judges:
        stop_if_asked(accelerator, out, lambda: None)
        if judge == "people":
            found = by_people(inputs["judgements"], prompts, texts, compared, settings)
        elif judge == "endpoint":
            found = by_endpoint(settings, prompts, texts, compared, labels, accelerator, out)
        else:
            title, score, agreed = _scorer(judge, settings, inputs, labels, accelerator, out)
            scores = {model: score(prompts, said) for model, said in texts.items()}
            outcomes = {(a, b): outcomes_of(scores[a], scores[b]) for a, b in compared}
            found = Verdict(judge, title, outcomes, scores, agreed)
        verdicts.append(found)
    return verdicts


def _scorer(
    judge: str,
    settings: Settings,
    inputs: Inputs,
    labels: Labels | None,
    accelerator: Accelerator,
    out: Out,
) -> tuple[str, Score, Estimate | None]:
    """Title, scores and agreement of a judge that looks at one response at a time."""
    if judge == "reward_model":
        score, agreed = second_reward_model(settings, inputs, accelerator, out)
        return judge, score, agreed
    title, score = ("rubric", by_rubric) if judge == "rubric" else _by_rule(settings, out)
    seed = seed_for(settings.run.seed, "evaluate", "agreement")
    return title, score, agreement_of_scores(labels.heldout, score, seed) if labels else None


def by_people(
    judgements: Input,
    prompts: list[Prompt],
    texts: Texts,
    compared: list[Models],
    settings: Settings,
) -> Verdict:
    """What people said who did not know which model wrote what, of the models that they were shown.

    An outcome is the mean over those who judged the prompt; equal texts are a tie nobody is asked about.
    """
    assert judgements.path is not None, "judgements is an artifact of a step"
    rows = read_jsonl(judgements.path / "judgements.jsonl")
    said = [Ranking.from_row(row) for row in rows]
    ranks_of: dict[str, list[dict[str, int]]] = {}
    for one in said:
        ranks = dict(zip(one.responses, one.ranks, strict=True))
        ranks_of.setdefault(one.prompt_id, []).append(ranks)
    outcomes: dict[Models, Outcomes] = {}
    for first, second in compared:
        if not {first, second} <= {"policy", "sft", "base"}:
            continue
        outcomes[first, second] = [
            outcome_of_ranks(ranks_of.get(prompt.id, []), texts[first][i], texts[second][i])
            for i, prompt in enumerate(prompts)
        ]
    seed = seed_for(settings.run.seed, "evaluate", "agreement")
    verdict = Verdict("people", "people", outcomes, agreement=annotator_agreement(said, seed))
    verdict.metrics = {
        "judgements": len(said),
        "annotators": len({one.annotator for one in said}),
    }
    return verdict


def outcome_of_ranks(ranks: list[dict[str, int]], first: str, second: str) -> float | None:
    """Mean over people of 1 (the first is better), 0.5 or 0; None where nobody judged."""
    if first == second:
        return 0.5
    told = [(one[first], one[second]) for one in ranks if first in one and second in one]
    if not told:
        return None
    return sum(float(a < b) + 0.5 * float(a == b) for a, b in told) / len(told)


def by_rubric(prompts: list[Prompt], responses: list[str]) -> list[float]:
    return [
        demo_rubric.score(prompt.text, response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _by_rule(settings: Settings, out: Out) -> tuple[str, Score]:
    assert settings.evaluate.rule is not None
    rule = load_rule(settings.evaluate.rule, "evaluate.rule")
    out.derived["rule"] = rule.origin

    def score(prompts: list[Prompt], responses: list[str]) -> list[float]:
        return [
            rule(list(prompt.messages), response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    return f"the rule {rule.name}", score


def rubric_metrics(prompts: list[Prompt], texts: Texts) -> Metrics:
    """Mean of each quality, share of well-formed responses, number of different story skeletons."""
    metrics: Metrics = {}
    for role, said in texts.items():
        rows = [
            demo_rubric.qualities(prompt.text, text)
            for prompt, text in zip(prompts, said, strict=True)
        ]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in demo_rubric.QUALITIES}
        metrics[f"quality_{role}"] = means
        prefix = "" if role == "policy" else f"{role}_"
        well = [demo_rubric.well_formed(text) for text in said]
        metrics[f"{prefix}well_formed"] = sum(well) / len(well)
        metrics[f"{prefix}skeletons"] = len({demo_world.skeleton(text) for text in said})
        scores = [demo_rubric.score(p.text, t) for p, t in zip(prompts, said, strict=True)]
        metrics[f"{prefix}rubric_score"] = sum(scores) / len(scores)
    return metrics
