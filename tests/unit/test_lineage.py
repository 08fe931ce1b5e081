"""Where a policy comes from, and what a label touched."""

import pytest

from pipeline import lineage, runner, workspace
from pipeline.errors import ArtifactError, DataError
from tests import fake_line


@pytest.fixture
def run(tmp_path, monkeypatch):
    fake_line.install(monkeypatch)
    config = fake_line.write_config(tmp_path)
    with workspace.writer(workspace.draft_run(config)) as (run, _):
        runner.execute(run)
    return run


def test_the_tree_goes_from_the_policy_back_to_people_and_data(run):
    tree = lineage.backward(run)
    assert tree.name == "ppo"
    text = "\n".join(lineage.tree_lines(tree))
    assert "reward_model: reward" in text
    assert "rankings: rank" in text
    assert "1 rankings by bot-1 1" in text
    assert f"data: {run.path.parent / 'text.txt'}" in text
    assert "prompts: demo:prompts" in text
    assert "(see above)" in text
    rows = tree.to_row()
    assert {node["role"] for node in rows["inputs"]} == {
        "model",
        "reference",
        "reward_model",
        "prompts",
    }


def test_the_tree_as_rows_holds_every_setting_and_label(run):
    rows = lineage.backward(run).to_row()
    reward = next(node for node in rows["inputs"] if node["role"] == "reward_model")
    assert rows["settings"]["ppo.kl_coef"] == 0.05
    assert reward["settings"]["reward.lr"] == run.settings.reward.lr
    rank = next(node for node in reward["inputs"] if node["role"] == "rankings")
    assert rank["rankings"]["annotators"] == {"bot-1": 1}
    assert [len(name) for name in rank["rankings"]["ids"]] == [16]


def test_a_label_is_followed_to_everything_it_touched(run):
    reached = lineage.forward(run, "abcdef")
    assert reached["label"]["annotator"] == "bot-1"
    assert {item["step"] for item in reached["touched"]} == {"rank", "reward", "ppo", "evaluate"}


@pytest.mark.parametrize(
    ("label", "message"), [("abc", "is too short"), ("0123456789", "holds a label '0123456789'")]
)
def test_an_unknown_label_is_refused(run, label, message):
    with pytest.raises(DataError, match=message):
        lineage.forward(run, label)


def test_a_run_without_results_has_no_lineage(tmp_path, monkeypatch):
    fake_line.install(monkeypatch)
    config = fake_line.write_config(tmp_path)
    with workspace.writer(workspace.draft_run(config)) as (run, _):
        pass
    with pytest.raises(ArtifactError, match="no step has a result yet"):
        lineage.backward(run)
