"""The report's pages on the reward model and on over-optimisation: what they say, and to hostile files."""

import json
import math
import re

import pytest

from pipeline.report import write_report
from pipeline.report_data import StepView
from pipeline.report_frontier import frontier_views
from pipeline.report_notes import careful_notes
from pipeline.report_reward import reward_view
from pipeline.settings import Settings
from tests.unit.fake_run import HOSTILE, make_run

DIAGNOSIS = {
    "agreement": {
        "pairs": 90,
        "people": 0.74,
        "people_low": 0.7,
        "people_high": 0.78,
        "best": 0.87,
        "best_low": 0.84,
        "best_high": 0.9,
        "model": 0.66,
        "model_low": 0.6,
        "model_high": 0.72,
    },
    "calibration": {
        "ece": 0.113,
        "pairs": 400,
        "bins": [
            {"confidence": 0.55, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6},
            {"confidence": 0.9, "accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.9},
        ],
    },
    "length": {"score": 0.41, "score_low": 0.3, "score_high": 0.5, "people": -0.1},
    "eos": {
        "responses": 300,
        "gain": -0.46,
        "gain_low": -0.5,
        "gain_high": -0.4,
        "preferred": 0.28,
    },
}
MISTAKE = {
    "messages": [{"role": "user", "content": HOSTILE}],
    "preferred_by_people": HOSTILE,
    "preferred_by_model": "x",
    "score_of_people_s": -1.5,
    "score_of_model_s": 0.5,
    "probability": 0.98,
    "votes_for_people_s": 2,
    "votes_for_model_s": 1,
}


def frontier(fell=True, keep="best_reward", kept=40, same=None):
    rows = [
        {"update": u, "kl": kl, "score": kl, "gold": g, "gold_low": g - 0.1, "gold_high": g + 0.1}
        for u, kl, g in ((0, -0.01, 0.0), (20, 4.0, 0.5), (40, 9.0, 0.2))
    ]
    peak = {"update": 20, "update_low": 20, "update_high": 30, "drop": 0.3}
    peak |= {"drop_low": 0.1, "drop_high": 0.5, "proxy_gain": 5.0, "fell": fell}
    best = [
        {"n": 1, "kl": 0.0, "score": 0.0, "gold": 0.0},
        {"n": 4, "kl": math.log(4) - 0.75, "score": 1.0, "gold": 0.4},
    ]
    found = {"gold": "rule", "keep": keep, "kept_update": kept, "validations": rows, "peak": peak}
    return {**found, "best_of_n": best, "best_of_n_gold_at_kept_kl": same}


def step(work, stage="ppo"):
    return StepView(stage, stage, 1, "done", "done", work, {"metrics": {}}, [])


@pytest.fixture
def told(tmp_path):
    def tell(**changes):
        (tmp_path / "frontier.json").write_text(json.dumps(frontier(**changes)))
        [view] = frontier_views([step(tmp_path)])
        return view

    return tell


def test_a_page_shows_the_diagnosis_and_the_frontier_and_escapes_what_it_quotes(tmp_path):
    run = make_run(tmp_path)
    [reward] = run.glob("reward/*/manifest.json")
    (reward.parent / "diagnosis.json").write_text(json.dumps(DIAGNOSIS))
    (reward.parent / "worst_mistakes.jsonl").write_text(json.dumps(MISTAKE) + "\n")
    [ppo] = run.glob("ppo/*/manifest.json")
    (ppo.parent / "frontier.json").write_text(json.dumps(frontier()))
    page = write_report(run).read_text()
    for text in (
        "One person predicting another",
        "74.0\u202f%",
        "as sure as right",
        "<b>0.113</b>",
        "\u22120.46",
        "28.0\u202f%",
        "votes 2 to 1",
        "98\u202f% sure",
        "Over-optimisation",
        "Gold, which is only watched",
        "best of 1 to 4",
        "update 20",
    ):
        assert text in page, text
    assert "<script" not in page
    assert "onerror=alert(2)&gt;" in page
    assert 'href="#frontier"' in page


def test_a_run_without_them_has_no_empty_section(tmp_path):
    page = write_report(make_run(tmp_path)).read_text()
    assert "Over-optimisation" not in page
    assert "Worst mistakes" not in page


@pytest.mark.parametrize(
    "content", ["", "[]", '{"validations": 5}', '{"validations": [5], "peak": [], "best_of_n": {}}']
)
def test_a_damaged_file_is_no_end_of_the_page(tmp_path, content):
    for name in ("frontier.json", "diagnosis.json", "worst_mistakes.jsonl"):
        (tmp_path / name).write_text(content)
    frontier_views([step(tmp_path)])
    assert reward_view(step(tmp_path, "reward"))["calibration"] is None
    strange = {"bins": [5, {"confidence": "x"}], "ece": []}
    row = {"calibration": strange, "eos": 5, "length": []}
    (tmp_path / "diagnosis.json").write_text(json.dumps(row))
    assert reward_view(step(tmp_path, "reward"))["follows"] == []


def test_the_sentence_says_where_gold_peaked_and_what_can_be_done(told):
    text = told()["sentence"]
    assert "Gold was highest at update 20 (95\u202f% interval 20 to 30)" in text
    assert "From there to update 40 it fell by 0.300 (0.100 to 0.500)" in text
    assert "the score rose by 5" in text
    assert "ppo.keep=best_gold publishes the one of the ring" in text
    kept = told(keep="best_gold", kept=20)["sentence"]
    assert "The policy of update 20 is published (ppo.keep: best_gold)" in kept
    assert "that it fell until update 40 is not shown" in told(fell=False)["sentence"]


def test_the_policy_is_compared_with_the_best_of_n_where_they_can_be(told):
    assert "gold 0.200 (0.100 to 0.300), less than the best of 4 (0.400)" in told()["baseline"]
    # 0.4 is the end of its interval: not shown to be more
    assert (
        "gold 0.500 (0.400 to 0.600), about as much as the best of 4" in told(kept=20)["baseline"]
    )
    same = told(kept=20, same=0.3)["baseline"]
    assert "more than the best of n at the same KL of 4 nats (0.300)" in same
    # the start is the reference itself
    assert told(kept=0, same=0.0)["baseline"] is None


def test_distance_is_the_root_of_the_kl_and_the_ring_is_at_the_peak(told):
    score, gold = told()["charts"]
    # KL 0, 4 and 9 are at 0, 2 and 3 of an axis of 3: 48, 48 + 358 * 2 / 3 and 406
    for plot in (score, gold):
        ring = re.search(r'class="ring" cx="([\d.]+)"', plot)
        assert float(ring[1]) == pytest.approx(48 + 358 * 2 / 3, abs=0.1)
    # the intervals are those of gold
    assert gold.count('class="orange bar"') == 3
    assert 'bar"' not in score


def test_the_notes_warn_of_a_run_that_went_too_far_and_of_a_judge_that_is_not_apart():
    tree = {"pretrain": {"data": "demo:stories"}, "sample": {"prompts": "demo:prompts"}}

    def notes(**ppo):
        settings = Settings.model_validate({**tree, "ppo": {"gold": "reward_model", **ppo}})
        made = {"metrics": {"gold_fell": True, "gold_peak_update": 20}}
        view = StepView("ppo", "ppo", 1, "done", "done", None, made, [])
        judged = {"metrics": {"judge": "reward_model"}}
        last = StepView("evaluate", "evaluate", 1, "done", "done", None, judged, [])
        return " ".join(careful_notes(settings, [view, last], []))

    assert "gold was highest at update 20 and fell while the score rose" in notes()
    assert "same held-out rankings" not in notes()
    assert "gold was highest" not in notes(keep="best_gold")
    assert "same held-out rankings" in notes(keep="best_gold")
    assert "same held-out rankings" not in notes(keep="best_gold", gold_model="x")


def test_what_was_kept_by_gold_is_not_said_to_be_kept_by_reward():
    tree = {"pretrain": {"data": "demo:stories"}, "sample": {"prompts": "demo:prompts"}}
    rows = [{"step": step, "validation_reward": step / 100} for step in (0, 20, 40)]

    def notes(**ppo):
        settings = Settings.model_validate({**tree, "ppo": {"gold": "reward_model", **ppo}})
        made = {"metrics": {"best_update": 20}}
        view = StepView("ppo", "ppo", 1, "done", "done", None, made, rows)
        return " ".join(careful_notes(settings, [view], []))

    assert "better at update 20 than at its end (by gold)" in notes(keep="best_gold")
    assert "(validation reward 0.200 against 0.400)" in notes()
