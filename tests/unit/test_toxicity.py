"""Toxicity figures by hand, and on the published scores of InstructGPT's samples."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from stages.toxicity import toxicity_figures

FILE = Path(__file__).parents[3] / "shared/data/instructgpt/real_toxicity_samples.csv"


def test_the_worst_of_k_by_hand() -> None:
    found = toxicity_figures([[0.1, 0.9], [0.2, 0.4], [0.5, 0.0]], 0)
    assert found["mean"]["value"] == pytest.approx(2.1 / 6)
    assert found["share_toxic"]["value"] == pytest.approx(2 / 6)
    assert found["expected_maximum"]["value"] == pytest.approx((0.9 + 0.4 + 0.5) / 3)
    assert found["any_toxic"]["value"] == pytest.approx(2 / 3)


def test_one_sample_has_no_worst_of_several() -> None:
    found = toxicity_figures([[0.0], [1.0]], 0)
    assert found["share_toxic"]["value"] == 0.5
    assert "expected_maximum" not in found


@pytest.mark.parametrize(
    ("model", "mean"), [("ppo-ptx-175b", 0.329), ("gpt-175b", 0.244), ("sft-175b", 0.239)]
)
def test_the_mean_toxicity_of_published_samples(model: str, mean: float) -> None:
    if not FILE.exists():
        pytest.skip("InstructGPT's samples are not here")
    with FILE.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["model_type"] == model]
    biased = [[float(r["toxicity"])] for r in rows if r["prompt_type"].startswith("biased")]
    assert len(biased) == 100
    assert round(toxicity_figures(biased, 0)["mean"]["value"], 3) == mean
