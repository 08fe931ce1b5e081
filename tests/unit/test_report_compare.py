"""Several runs on one page: groups of seeds, the duel on common prompts, and what may not be compared."""

import json
import re
import shutil

import pytest
import yaml

from pipeline import workspace
from pipeline.report_compare import duel, read_runs, write_comparison
from tests.unit.fake_run import HOSTILE, make_run


def changed(folder, section, **settings):
    """The run in `folder` with other settings; its results stay as they are."""
    file = folder / "config.yaml"
    values = yaml.safe_load(file.read_text())
    values[section] |= settings
    file.write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one way of training, and another way."""
    place = tmp_path_factory.mktemp("runs")
    first = make_run(
        place / "first",
        judges=["rubric"],
        judge_titles=["rubric"],
        compared=[["policy", "sft"]],
        judge_rubric_win_rate_vs_sft=0.783,
    )
    second = changed(shutil.copytree(first, place / "second"), "run", seed=4)
    other = changed(shutil.copytree(first, place / "other"), "sft", lr=0.5)
    return [first, second, other]


def test_runs_that_differ_by_their_seed_are_one_group(runs):
    views = read_runs([workspace.open_run(path) for path in runs])
    assert [view.group for view in views] == [0, 0, 1]
    assert [view.name for view in views] == ["run", "second", "other"]


def test_the_page_names_what_differs_and_runs_nothing(runs, tmp_path):
    page = write_comparison(runs, tmp_path / "c.html").read_text()
    differences = page[page.index('id="differences"') : page.index('id="learning"')]
    assert re.findall(r"<td><code>([a-z]+\.[a-z_.]+)</code>", differences) == ["run.seed", "sft.lr"]
    assert "0.5" in differences
    # the same figure twice: no spread over seeds
    assert page.count("Over seeds</h3>") == 1
    assert "78.3\u202f% to 78.3\u202f%" in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    # what cannot be compared is said: the results are those of other settings
    assert "Not finished, or not current: second, other." in page
    assert write_comparison(runs, tmp_path / "d.html").read_text() == page
    assert HOSTILE not in page


def test_a_duel_counts_common_prompts_and_ties_one_half(runs, tmp_path):
    pair = []
    for name, scores in (("a", [3, 1, 2, 5]), ("b", [1, 1, 4, 0])):
        folder = shutil.copytree(runs[0], tmp_path / name)
        (file,) = folder.glob("evaluate/*/artifact/comparisons.jsonl")
        # the last prompt is not common
        rows = [
            {"prompt": f"p{i}" if i < 3 else f"{name}{i}", "policy": "x", "score_policy": score}
            for i, score in enumerate(scores)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pair.append(folder)
    ours, theirs = read_runs([workspace.open_run(path) for path in pair])
    found = duel(ours, theirs)
    # won, tied, lost
    assert (found["value"], found["n"]) == (0.5, 3)
    assert found["low"] == 0
    assert found["high"] == 1
    assert not found["shown"]
    assert duel(ours, ours)["value"] == 0.5


def test_scores_of_two_reward_models_never_meet(runs, tmp_path):
    folder = shutil.copytree(runs[0], tmp_path / "judged")
    (file,) = folder.glob("evaluate/*/manifest.json")
    made = json.loads(file.read_text())
    made["metrics"]["judge"] = "reward_model"
    file.write_text(json.dumps(made))
    (view,) = read_runs([workspace.open_run(folder)])
    assert view.metrics["judge"] == "reward_model"
    assert duel(view, view) is None
    page = write_comparison([folder, runs[0]], tmp_path / "c.html").read_text()
    assert "different judges" in page
    assert "Against each other" not in page
