"""What a judge said of two models, prompt by prompt, and the figures that follow from it.

An outcome is 1 where the first model's answer is better, 0 where the second's is, 0.5 for a tie, and
None where the judge gave no answer that can be read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.job import Metrics, win_rate_metric
from pipeline.statistics import Estimate, mean_with_interval, sign_test
from stages.length_control import length_controlled

Outcomes = list[float | None]
Models = tuple[str, str]


@dataclass
class Verdict:
    """All that one judge said.

    judge: its name in evaluate.judges. title: for people. outcomes: of each two models that it
    compared. scores: of a judge that scores each answer by itself, by model. agreement: with the
    annotators, on rankings that it was not made from. metrics: what else there is to say of it.
    """

    judge: str
    title: str
    outcomes: dict[Models, Outcomes]
    scores: dict[str, list[float]] = field(default_factory=dict)
    agreement: Estimate | None = None
    metrics: Metrics = field(default_factory=dict)


def models_to_compare(models: list[str]) -> list[Models]:
    """Every policy, and the best of n, against sft; every policy against base; the last one against
    those of earlier rounds."""
    policies = [name for name in models if name.startswith("policy")]
    others = [name for name in models if name not in (*policies, "sft", "base")]
    found = [(name, "sft") for name in (*policies, *others)]
    found += [(name, "base") for name in policies if "base" in models]
    return found + [("policy", name) for name in policies if name != "policy"]


def outcomes_of(scores: list[float], other_scores: list[float]) -> Outcomes:
    pairs = zip(scores, other_scores, strict=True)
    return [float(own > other) + 0.5 * float(own == other) for own, other in pairs]


def verdict_metrics(verdict: Verdict, texts: dict[str, list[str]], seed: int) -> Metrics:
    """All figures of one judge, each with `judge_NAME_` before it.

    Of each two models: the win rate with _low and _high (95 %), _ties, _prompts, _p (sign test: that
    neither is better) and _length_controlled, again with _low and _high. agreement with _low, _high
    and _pairs.
    """
    metrics: Metrics = {}
    for models, outcomes in verdict.outcomes.items():
        metrics |= compared(win_rate_metric(*models), models, outcomes, texts, seed)
    if verdict.agreement is not None:
        metrics |= with_interval("agreement", verdict.agreement)
        metrics["agreement_pairs"] = verdict.agreement.n
    metrics |= verdict.metrics
    return {f"judge_{verdict.judge}_{name}": value for name, value in metrics.items()}


def compared(
    name: str, models: Models, outcomes: Outcomes, texts: dict[str, list[str]], seed: int
) -> Metrics:
    """The figures of one comparison; nothing where the judge said nothing."""
    told = [place for place, outcome in enumerate(outcomes) if outcome is not None]
    if not told:
        return {f"{name}_prompts": 0}
    values = [outcome for outcome in outcomes if outcome is not None]
    lengths, other = ([len(texts[model][place]) for place in told] for model in models)
    return {
        **with_interval(name, mean_with_interval(values, seed)),
        f"{name}_ties": sum(value == 0.5 for value in values) / len(values),
        f"{name}_prompts": len(values),
        f"{name}_p": sign_test(values),
        **with_interval(
            f"{name}_length_controlled", length_controlled(values, lengths, other, seed)
        ),
    }


def with_interval(name: str, found: Estimate) -> Metrics:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
