"""Agreement of judges with annotators, and what a verdict says, by hand and against the ranking app's."""

from __future__ import annotations

import numpy as np
import pytest

from labeling_ui.rank import agreement as agreement_of_the_app
from pipeline.job import Input, win_rate_metric
from pipeline.records import Prompt, Ranking, write_jsonl
from stages.label_agreement import (
    Labels,
    agreement_of_scores,
    annotator_agreement,
    read_labels,
    strict_pairs,
)
from stages.verdicts import Verdict, models_to_compare, outcomes_of, verdict_metrics


def ranking(prompt: str, ranks: tuple[int, ...], annotator: str = "ada", **more) -> Ranking:
    texts = tuple("abcdefgh"[: len(ranks)])
    return Ranking(({"role": "user", "content": prompt},), texts, ranks, annotator, **more)


def by_letter(prompts: list[Prompt], texts: list[str]) -> list[float]:
    """a and b score the same, c less."""
    return [{"a": 1.0, "b": 1.0, "c": 0.0}[text] for text in texts]


def test_agreement_by_hand() -> None:
    # a > b (judge: tie), a > c (right), b > c (right); then c > a (wrong), a = b, c > b (wrong)
    rankings = [ranking("p", (1, 2, 3)), ranking("q", (2, 2, 1))]
    assert len(strict_pairs(rankings)) == 5
    found = agreement_of_scores(rankings, by_letter, seed=0)
    assert found is not None
    assert found.value == pytest.approx(2.5 / 5)
    assert found.n == 5
    # drawn by prompt: twice p, twice q, or both
    assert (found.low, found.high) == (0.0, pytest.approx(2.5 / 3))
    assert agreement_of_scores([ranking("p", (1, 1))], by_letter, seed=0) is None


def test_annotators_agree_as_the_ranking_app_says() -> None:
    rng = np.random.default_rng(5)
    rankings = []
    for i in range(30):
        size = int(rng.integers(2, 6))
        for name in rng.permutation(["ada", "bob", "eve"])[: rng.integers(1, 4)]:
            ranks = tuple(int(x) for x in rng.integers(1, 4, size))
            rankings.append(ranking(f"p{i}", ranks, str(name)))
        if i % 5 == 0:
            # the same person's later word is what counts
            later = tuple(int(x) for x in rng.integers(1, 4, size))
            rankings.append(ranking(f"p{i}", later, rankings[-1].annotator, round=2))
    found = annotator_agreement(rankings, seed=0)
    assert found is not None
    assert found.value == pytest.approx(agreement_of_the_app(rankings))
    assert found.low < found.value < found.high
    assert annotator_agreement(rankings[:1], seed=0) is None


def test_people_come_before_simulated_annotators(tmp_path) -> None:
    simulated = [ranking(f"p{i}", (1, 2), "sim-1", source="simulated") for i in range(3)]
    people = [ranking("p9", (2, 1), source="app", split="heldout")]

    def read(rankings: list[Ranking]) -> Labels | None:
        write_jsonl(tmp_path / "rankings.jsonl", (r.to_row() for r in rankings))
        return read_labels(Input("rankings", "sha256:1", path=tmp_path))

    assert read(simulated) == Labels(simulated, "simulated")
    mixed = read(simulated + people)
    assert mixed == Labels(people, "people")
    assert mixed is not None
    assert mixed.heldout == people
    assert read([]) is None


def test_which_models_are_compared() -> None:
    assert models_to_compare(["policy", "sft"]) == [("policy", "sft")]
    found = models_to_compare(["policy", "sft", "base", "best_of_n", "policy_1", "policy_2"])
    names = [win_rate_metric(*models) for models in found]
    assert names == [
        "win_rate_vs_sft",
        "policy_1_win_rate_vs_sft",
        "policy_2_win_rate_vs_sft",
        "best_of_n_win_rate_vs_sft",
        "win_rate_vs_base",
        "policy_1_win_rate_vs_base",
        "policy_2_win_rate_vs_base",
        "win_rate_vs_policy_1",
        "win_rate_vs_policy_2",
    ]


def test_the_figures_of_a_verdict_by_hand() -> None:
    outcomes = outcomes_of([2.0, 1.0, 1.0, 5.0, 0.0], [1.0, 1.0, 2.0, 4.0, 9.0])
    assert outcomes == [1.0, 0.5, 0.0, 1.0, 0.0]
    verdict = Verdict("rule", "the rule x", {("policy", "sft"): [*outcomes, None]})
    texts = {"policy": ["x" * 5] * 6, "sft": ["y" * 5] * 6}
    found = verdict_metrics(verdict, texts, seed=0)
    name = "judge_rule_win_rate_vs_sft"
    assert found[name] == 0.5
    assert found[f"{name}_ties"] == 0.2
    assert found[f"{name}_prompts"] == 5
    assert found[f"{name}_p"] == 1.0
    assert found[f"{name}_length_controlled"] == pytest.approx(0.5, abs=1e-6)
    assert found[f"{name}_low"] < 0.5 < found[f"{name}_high"]
    assert "judge_rule_agreement" not in found


def test_a_judge_that_said_nothing_has_no_rate() -> None:
    verdict = Verdict("endpoint", "x", {("policy", "sft"): [None, None]})
    found = verdict_metrics(verdict, {"policy": ["", ""], "sft": ["", ""]}, seed=0)
    assert found == {"judge_endpoint_win_rate_vs_sft_prompts": 0}
