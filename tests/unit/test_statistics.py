"""Shares, tests and agreement against hand values, slow second ways and published figures."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import pytest

from pipeline.statistics import (
    bootstrap,
    cohen_kappa,
    mcnemar,
    mean_with_interval,
    nominal_alpha,
    over_seeds,
    over_seeds_and_prompts,
    paired_difference,
    ratio_interval,
    sign_test,
    standard_error,
)

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def data_file(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return path


# wins, losses, draws of models against text-davinci-003, with the win rate and the standard error in
# percent as AlpacaEval publishes them (alpaca_eval_gpt4_leaderboard.csv of tatsu-lab/alpaca_eval)
PUBLISHED = {
    "gpt4_turbo": (783, 16, 5, 97.69900497512438, 0.5104848118311993),
    "claude": (707, 89, 9, 88.38509317, 1.11448754),
    "guanaco-65b": (578, 227, 0, 71.80124224, 1.586912361),
    "alpaca-farm-ppo-human": (328, 469, 8, 41.24223602, 1.727181312),
    "phi-2": (234, 543, 22, 30.663329161451813, 1.6056202651534168),
    "text_davinci_003": (0, 0, 805, 50.0, 0.0),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_win_rates_and_standard_errors_are_the_published_ones(model: str) -> None:
    wins, losses, draws, rate, error = PUBLISHED[model]
    outcomes = [1.0] * wins + [0.0] * losses + [0.5] * draws
    found = mean_with_interval(outcomes, seed=0)
    assert 100 * found.value == pytest.approx(rate, abs=1e-6)
    assert 100 * standard_error(outcomes) == pytest.approx(error, abs=1e-6)
    assert found.n == len(outcomes)
    # a normal interval of so many prompts
    half = 1.96 * error / 100
    assert found.low == pytest.approx(found.value - half, abs=0.1 * half + 1e-9)
    assert found.high == pytest.approx(found.value + half, abs=0.1 * half + 1e-9)


def test_the_human_verdicts_of_faireval_are_the_published_ones() -> None:
    """ChatGPT wins 41 and Vicuna 25 of the questions without a tie (Wang et al. 2023, table 4)."""
    rows = json.loads(data_file("llmbar/Processed/FairEval/dataset.json").read_text())
    outcomes = [float(row["label"] == 1) for row in rows]
    found = mean_with_interval(outcomes, seed=0)
    assert (sum(outcomes), found.n) == (41, 66)
    assert found.value == pytest.approx(0.6212, abs=5e-5)
    assert standard_error(outcomes) == pytest.approx(0.0602, abs=5e-5)
    exact = 2 * sum(comb(66, k) for k in range(41, 67)) / 2**66
    assert sign_test(outcomes) == pytest.approx(exact)


def test_the_toxicity_of_instructgpt_on_the_same_prompts() -> None:
    path = data_file("instructgpt/real_toxicity_samples.csv")
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["prompt_type"] == "biased prompt":
                scores[row["model_type"]][row["context"]] = float(row["toxicity"])
    wanted = {"ppo-ptx-175b": 0.329, "gpt-175b": 0.244, "sft-175b": 0.239}
    means = {name: mean_with_interval(list(scores[name].values()), seed=0) for name in wanted}
    for name, value in wanted.items():
        assert means[name].value == pytest.approx(value, abs=5e-4)
    contexts = sorted(scores["sft-175b"])
    ppo, sft = ([scores[name][c] for c in contexts] for name in ("ppo-ptx-175b", "sft-175b"))
    found = paired_difference(ppo, sft, seed=0)
    assert found.value == pytest.approx(0.0904, abs=2e-3)
    # pairing by prompt takes out what the prompts share
    unpaired = (standard_error(ppo) ** 2 + standard_error(sft) ** 2) ** 0.5
    assert (found.high - found.low) / (2 * 1.96) < unpaired


@pytest.mark.parametrize("model", ["gpt4", "mistralguard"])
def test_the_kappas_of_xstests_annotators(model: str) -> None:
    path = data_file(f"xstest/model_completions/xstest_v2_completions_{model}.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(row["annotation_1"], row["annotation_2"]) for row in csv.DictReader(file)]
    observed = sum(one == other for one, other in rows) / len(rows)
    # chance: any label of the first with any label of the second
    chance = sum(one == other for one, _ in rows for _, other in rows) / len(rows) ** 2
    kappa = cohen_kappa(*zip(*rows, strict=True))
    assert kappa == pytest.approx((observed - chance) / (1 - chance))
    assert kappa == pytest.approx({"gpt4": 0.9701, "mistralguard": 0.8923}[model], abs=5e-5)
    # with two annotators of nearly equal habits they are nearly equal
    assert nominal_alpha(rows) == pytest.approx(kappa, abs=2e-3)


def test_cohens_own_kind_of_table_by_hand() -> None:
    """20 both yes, 15 both no, 5 and 10 apart: observed 0.7, expected 0.5, kappa 0.4."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(["a"] * 3, ["a"] * 3) is None


def test_nominal_alpha_of_krippendorffs_example_is_what_he_prints() -> None:
    """Four observers, twelve units, missing values: nominal alpha 0.743 (2011, section C)."""
    table = [
        ["1", "2", "3", "3", "2", "1", "4", "1", "2", ".", ".", "."],
        ["1", "2", "3", "3", "2", "2", "4", "1", "2", "5", ".", "3"],
        [".", "3", "3", "3", "2", "3", "4", "2", "2", "5", "1", "."],
        ["1", "2", "3", "3", "2", "4", "4", "1", "2", "5", "1", "."],
    ]
    units = [[row[u] for row in table if row[u] != "."] for u in range(12)]
    assert nominal_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert nominal_alpha([["a", "a"], ["a"]]) is None


def test_the_sign_test_counts_no_ties() -> None:
    # 8 of 10: 2 * (45 + 10 + 1) / 1024
    outcomes = [1.0] * 8 + [0.0] * 2
    assert sign_test(outcomes) == pytest.approx(112 / 1024)
    assert sign_test(outcomes + [0.5] * 90) == sign_test(outcomes)
    assert sign_test([0.5] * 4) == 1.0


def test_mcnemar_looks_at_the_items_that_differ() -> None:
    first = [True] * 9 + [False] * 1 + [True] * 50 + [False] * 40
    second = [False] * 9 + [True] * 1 + [True] * 50 + [False] * 40
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar(first, first) == 1.0


def test_values_of_one_prompt_are_drawn_together() -> None:
    """The same 30 values told four times are no 120 prompts."""
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2, 30).astype(float).tolist()
    alone = mean_with_interval(values, seed=0)
    clustered = mean_with_interval(values * 4, seed=0, clusters=list(range(30)) * 4)
    naive = mean_with_interval(values * 4, seed=0)
    assert (clustered.value, clustered.low, clustered.high) == alone[:3]
    assert naive.high - naive.low < 0.6 * (alone.high - alone.low)


def test_the_bootstrap_of_three_prompts_is_that_of_all_27_draws() -> None:
    values = np.array([0.0, 1.0, 0.5])
    means = [np.mean([values[i] for i in draw]) for draw in product(range(3), repeat=3)]
    low, high = np.percentile(means, [2.5, 97.5], method="inverted_cdf")
    found = mean_with_interval(values.tolist(), seed=3)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    # by how often each was drawn: the same draws
    times = bootstrap(lambda times_DN: times_DN @ values / times_DN.sum(1), 3, seed=3)
    assert times == pytest.approx((found.low, found.high))


def test_the_mean_over_seeds_by_hand() -> None:
    """0.5, 0.6, 0.7: mean 0.6, error 0.1 / sqrt 3, t with two degrees 4.3027."""
    found = over_seeds([0.5, 0.6, 0.7])
    assert found is not None
    half = 4.302653 * 0.1 / 3**0.5
    assert found == pytest.approx((0.6, 0.6 - half, 0.6 + half, 3), abs=1e-6)
    assert over_seeds([0.5]) is None


def test_runs_and_prompts_are_both_drawn() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(80)
    # runs that differ much, and runs that are the same
    apart = [(rng.random(80) < p).astype(float).tolist() for p in (0.2, 0.5, 0.8)]
    alike = [(hard < 0.5).astype(float).tolist()] * 3
    wide = over_seeds_and_prompts(apart, 0, same_prompts=True)
    assert wide.value == pytest.approx(np.mean(apart))
    assert wide.high - wide.low > 0.4
    together = over_seeds_and_prompts(alike, 0, same_prompts=True)
    one = mean_with_interval(alike[0], 0)
    # three times the same run on the same prompts knows no more than the run
    assert together.high - together.low == pytest.approx(one.high - one.low, rel=0.1)
    nested = over_seeds_and_prompts(alike, 0, same_prompts=False)
    assert nested.high - nested.low < 0.7 * (one.high - one.low)


def test_the_bootstrap_interval_holds_the_ratio_and_shrinks_with_more_items() -> None:
    rng = np.random.default_rng(0)
    correct = rng.integers(0, 4, size=400).astype(float)
    pairs = np.full(400, 3.0)
    low, high = ratio_interval(correct, pairs, seed=1)
    few_low, few_high = ratio_interval(correct[:25], pairs[:25], seed=1)
    assert low < correct.sum() / pairs.sum() < high
    assert high - low < few_high - few_low
