"""What the report says of several judges."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.report import write_report
from pipeline.report_judges import judge_notes
from pipeline.report_seeds import Evaluated, over_runs
from tests.unit.fake_run import HOSTILE, make_run


def rates(name: str, rate: float, low: float, high: float, equal: float | None = None) -> dict:
    shift = (equal if equal is not None else rate) - rate
    found = {name: rate, f"{name}_low": low, f"{name}_high": high, f"{name}_p": 0.0004}
    found |= {f"{name}_ties": 0.25, f"{name}_prompts": 317}
    for end, value in {"": rate, "_low": low, "_high": high}.items():
        found[f"{name}_length_controlled{end}"] = value + shift
    return found


JUDGED = {
    "judges": ["rubric", "endpoint"],
    "judge_titles": ["rubric", HOSTILE],
    "compared": [["policy", "sft"], ["policy_1", "sft"]],
    **rates("judge_rubric_win_rate_vs_sft", 0.783, 0.737, 0.824),
    **rates("judge_endpoint_win_rate_vs_sft", 0.412, 0.361, 0.463),
    **rates("judge_rubric_policy_1_win_rate_vs_sft", 0.648, 0.611, 0.685),
    **{"judge_endpoint_agreement": 0.711, "judge_endpoint_agreement_pairs": 200},
    **{"judge_endpoint_agreement_low": 0.64, "judge_endpoint_agreement_high": 0.777},
    **{"judge_endpoint_position_bias": 0.31, "judge_endpoint_unreadable": 0.083},
    **{"annotator_agreement": 0.734, "annotator_agreement_pairs": 91, "labels_by": "people"},
    **{"annotator_agreement_low": 0.69, "annotator_agreement_high": 0.77},
}


def test_each_judge_and_each_two_models_have_a_row(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, **JUDGED)).read_text()
    part = page[page.index('<section id="judges">') : page.index('<section id="samples">')]
    for told in ("41.2", "round 1 vs sft", "64.8", "&lt; 0.001", "317", "25"):
        assert told in part, told
    assert "Agreement with people" in part
    for told in ("71.1", "73.4", "the ceiling", "31", "8.3"):
        assert told in part, told
    assert HOSTILE not in page


def test_a_report_of_before_there_were_judges_is_whole(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path)).read_text()
    assert "Verdicts: not yet" in page


def test_notes_warn_of_disagreement_bias_and_what_could_not_be_read() -> None:
    notes = "\n".join(judge_notes(JUDGED))
    assert "The judges disagree" in notes
    assert "contradicts itself in 31" in notes
    assert "8.3\u202f% of the comparisons" in notes
    assert "Length decides" not in notes


@pytest.mark.parametrize(("equal", "warns"), [(0.783, False), (0.75, False), (0.52, True)])
def test_a_win_that_is_length_alone_is_noted(equal: float, warns: bool) -> None:
    name = "judge_rubric_win_rate_vs_sft"
    metrics = JUDGED | rates(name, 0.783, 0.737, 0.824, equal)
    notes = "\n".join(judge_notes(metrics | {"judges": ["rubric"], "judge_titles": ["rubric"]}))
    assert ("Length decides: at equal length" in notes) is warns


@pytest.mark.parametrize("broken", [{"judges": None}, {"judge_titles": ["x"]}, {"compared": "x"}])
def test_metrics_that_are_no_metrics_break_nothing(tmp_path: Path, broken: dict) -> None:
    assert write_report(make_run(tmp_path, **(JUDGED | broken))).exists()


def evaluated(rate_of_wins: float, prompts: int = 40, first: int = 0) -> Evaluated:
    outcomes = [1.0] * round(rate_of_wins * prompts)
    outcomes += [0.0] * (prompts - len(outcomes))
    rows = [
        {"prompt": f"p{first + i}", "outcomes": {"rubric": {"win_rate_vs_sft": outcome}}}
        for i, outcome in enumerate(outcomes)
    ]
    metrics = {"judges": ["rubric"], "judge_titles": ["rubric"], "compared": [["policy", "sft"]]}
    return Evaluated({**metrics, "judge_rubric_win_rate_vs_sft": rate_of_wins}, rows)


def test_runs_of_several_seeds_by_hand() -> None:
    """0.5, 0.6, 0.7: mean 0.6, error 0.1 / sqrt 3, t with two degrees 4.3027."""
    (row,) = over_runs([evaluated(0.5), evaluated(0.6), evaluated(0.7)])
    assert row["rates"] == [0.5, 0.6, 0.7]
    assert row["mean"] == pytest.approx(0.6)
    half = 4.302653 * 0.1 / 3**0.5
    assert row["interval"] == pytest.approx((0.6 - half, 0.6 + half), abs=1e-6)
    low, high = row["with_prompts"]
    # no narrower than what the prompts alone leave open
    assert high - low > 2 * 1.9 * (0.6 * 0.4 / 40) ** 0.5
    assert "whisker" in row["bar"]


def test_runs_on_other_prompts_or_alone_have_what_can_be_said() -> None:
    (row,) = over_runs([evaluated(0.5)])
    assert row["interval"] is None
    assert row["with_prompts"] is not None
    (apart,) = over_runs([evaluated(0.5), evaluated(0.5, first=100)])
    (paired,) = over_runs([evaluated(0.5), evaluated(0.5)])
    width = [r["with_prompts"][1] - r["with_prompts"][0] for r in (apart, paired)]
    assert width[0] < 0.85 * width[1]
    lacking = evaluated(0.5)
    del lacking.metrics["judge_rubric_win_rate_vs_sft"]
    assert over_runs([evaluated(0.5), lacking]) == []
