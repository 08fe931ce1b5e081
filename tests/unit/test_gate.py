"""The gate before the policy: what closes it, what users see, and what another threshold costs."""

import json

import pytest

from pipeline import gate, runner, workspace
from pipeline.config import load_settings
from pipeline.errors import StageError
from pipeline.plan import plan
from pipeline.report import write_report
from pipeline.settings import Settings
from pipeline.settings.reward import RewardGate, RewardSettings
from tests import fake_line
from tests.unit.test_runner import ROOT, execute, finished, states

GOOD = {
    "heldout_accuracy": 0.62,
    "heldout_accuracy_low": 0.55,
    "heldout_accuracy_high": 0.69,
    "length_correlation": -0.41,
    "eos_effect": 0.3,
}
BLIND = {**GOOD, "eos_effect": 0.0}


@pytest.fixture
def config(tmp_path, monkeypatch):
    fake_line.install(monkeypatch)
    monkeypatch.setenv("FAKE_QUALITY", json.dumps(GOOD))
    return fake_line.write_config(tmp_path)


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        ({}, {}, None),
        ({"min_accuracy": 0.62, "max_length_correlation": 0.41}, {}, None),
        (
            {"min_accuracy": 0.65},
            {},
            "held-out accuracy 0.620 (0.550 to 0.690) is below reward.gate.min_accuracy 0.65",
        ),
        (
            {"max_length_correlation": 0.4},
            {},
            "length correlation -0.410 is beyond reward.gate.max_length_correlation 0.4",
        ),
        ({}, {"eos_effect": 0.0}, "the end token is not seen (it moves a score by 0.0000"),
        ({"require_eos": False}, {"eos_effect": 0.0}, None),
        # of a coin one knows only that it is no better: a wide interval says nothing yet
        ({}, {"heldout_accuracy": 0.4, "heldout_accuracy_high": 0.52}, None),
        ({}, {"heldout_accuracy": 0.4, "heldout_accuracy_high": 0.49}, "surely worse than a coin"),
        # an accuracy that the user asked for is asked of the figure itself
        (
            {"min_accuracy": 0.3},
            {"heldout_accuracy": 0.4, "heldout_accuracy_high": 0.49},
            None,
        ),
    ],
)
def test_what_closes_the_gate_names_its_figures(settings, changes, reason):
    found = gate.look(RewardGate(**settings), {**GOOD, **changes})
    assert found.closed == (reason is not None)
    assert all((reason or "") in text for text in found.reasons)
    assert gate.look(RewardGate(**settings, force=True), {**GOOD, **changes}).closed is False


def test_a_reward_model_that_was_never_measured_closes_nothing():
    strict = RewardGate(min_accuracy=0.9, max_length_correlation=0.1)
    assert gate.look(strict, {"loss": 0.5}).reasons == ()


def test_a_closed_gate_stops_before_the_policy_and_keeps_the_reward_model(config, monkeypatch):
    monkeypatch.setenv("FAKE_QUALITY", json.dumps(BLIND))
    with pytest.raises(StageError, match="ppo: failed: gate: the end token is not seen") as caught:
        execute(config)
    assert caught.value.exit_code == 1
    assert "reward.gate.force=true" in caught.value.hint
    now = states(config)
    assert now["reward"].text == "done"
    assert now["ppo"].text.startswith("failed: gate: the end token is not seen")
    assert now["ppo"].to_row()["state"] == "failed"
    assert now["evaluate"].text == "missing"
    assert not (config.parent / "run" / "ppo").exists()
    said = runner.dry_run(workspace.open_run(config))
    assert any(line.startswith("ppo: failed: gate") and line.endswith("stop here") for line in said)
    events = workspace.open_run(config).events()
    assert events[-1]["event"] == "gate"
    page = write_report(config.parent / "run").read_text()
    assert "failed: gate: the end token is not seen" in page


def test_another_threshold_trains_nothing_again_and_opens_or_closes_the_gate(config):
    with pytest.raises(StageError, match=r"below reward\.gate\.min_accuracy 0\.7"):
        execute(config, "reward.gate.min_accuracy=0.7")
    before = states(config)["reward"]
    done = {s.step.name: s for s in execute(config, "reward.gate.min_accuracy=0.6")[2]}
    assert done["reward"].manifest.started == before.manifest.started
    assert done["ppo"].word == "done"
    assert done["ppo"].manifest.derived["gate"]["passed"] is True
    # a policy that is there is there
    assert {s.word for s in execute(config, "reward.gate.min_accuracy=0.7")[2]} == {"done"}


def test_force_goes_on_and_is_recorded(config, capsys):
    strict = "reward.gate.max_length_correlation=0.3"
    with pytest.raises(StageError, match="length correlation"):
        execute(config, strict)
    made = {s.step.name: s for s in execute(config, strict, "reward.gate.force=true")[2]}
    kept = made["ppo"].manifest.derived["gate"]
    assert (kept["passed"], kept["forced"]) == (False, True)
    assert kept["figures"]["length_correlation"] == -0.41
    assert "WARNING: ppo: reward.gate.force goes on through gate: length" in capsys.readouterr().err
    page = write_report(config.parent / "run").read_text()
    assert "reward.gate.force" in page
    assert "through a closed gate" in page


def test_the_command_ends_with_exit_code_one(config):
    code, err = finished(config, "reward.gate.min_accuracy=0.9")
    assert code == 1
    assert "error: ppo: failed: gate: held-out accuracy 0.620" in err


@pytest.mark.parametrize("policy", ["ppo", "grpo", "rloo", "dpo", "kto"])
def test_the_gate_guards_what_optimises_the_reward_model(policy):
    tree = {
        "pretrain": {"data": "demo:stories"},
        "sample": {"prompts": "demo:prompts"},
        "run": {"policy": policy},
    }
    settings = Settings.model_validate(tree)
    guarded = [step.name for step in plan(settings) if gate.guards(step, settings)]
    assert guarded == ([policy] if policy in ("ppo", "grpo", "rloo") else [])


def test_the_gate_lets_the_shipped_configurations_through_and_no_threshold_is_hashed():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        shipped = load_settings(Settings, path).reward.gate
        assert shipped.min_accuracy is None
        assert shipped.max_length_correlation is None
    strict = RewardGate(min_accuracy=0.9, max_length_correlation=0.1, require_eos=False, force=True)
    from pipeline import manifest

    one, two = (
        Settings.model_validate(
            {"pretrain": {"data": "demo:stories"}, "sample": {"prompts": "demo:prompts"}}
        ).model_copy(update={"reward": RewardSettings(gate=g)})
        for g in (RewardGate(), strict)
    )
    reward = next(step for step in plan(one) if step.name == "reward")
    digests = dict.fromkeys(reward.inputs, "sha256:1")
    assert manifest.fingerprint(reward, one, digests) == manifest.fingerprint(reward, two, digests)
