"""From settings to steps: a pipeline may start anywhere."""

import pytest

from pipeline.plan import plan
from pipeline.settings import Settings


def steps(**tree):
    return {step.name: step for step in plan(Settings.model_validate(tree))}


PRETRAIN = {"data": "demo:stories"}
SFT = {"data": "demo:demonstrations"}
SAMPLE = {"prompts": "demo:prompts"}


def test_from_text_every_stage_runs():
    found = steps(pretrain=PRETRAIN, sft=SFT, sample=SAMPLE)
    names = ["tokenizer", "pretrain", "sft", "sample", "rank", "reward", "ppo", "evaluate"]
    assert list(found) == names
    assert found["ppo"].inputs == {
        "model": "sft",
        "reference": "sft",
        "reward_model": "reward",
        "prompts": "sample",
    }
    assert found["evaluate"].inputs["base"] == "pretrain"


def test_from_a_model_nothing_is_pretrained():
    found = steps(model={"base": "owner/name"}, sft=SFT, sample=SAMPLE)
    assert list(found) == ["sft", "sample", "rank", "reward", "ppo", "evaluate"]
    assert found["sft"].sources["model"] == ("owner/name",)
    assert found["evaluate"].sources["base"] == ("owner/name",)


def test_a_model_that_is_trained_on_needs_no_tokenizer():
    found = steps(model={"base": "owner/name"}, pretrain=PRETRAIN)
    assert list(found) == ["pretrain"]
    assert found["pretrain"].sources["base"] == ("owner/name",)


def test_imported_rankings_need_no_sampling():
    found = steps(model={"base": "owner/name"}, rank={"data": "rankings.jsonl"})
    assert list(found) == ["rank", "reward", "ppo", "evaluate"]
    assert found["rank"].inputs == {}
    assert found["ppo"].inputs["prompts"] == "rank"


def test_text_alone_gives_a_language_model():
    assert list(steps(pretrain=PRETRAIN)) == ["tokenizer", "pretrain"]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_every_step_comes_after_what_it_reads_and_names_are_unique(rounds):
    tree = {"pretrain": PRETRAIN, "sft": SFT, "sample": SAMPLE, "run": {"rounds": rounds}}
    seen: set[str] = set()
    for step in plan(Settings.model_validate(tree)):
        assert set(step.inputs.values()) <= seen
        assert not set(step.inputs) & set(step.sources)
        assert step.name not in seen
        seen.add(step.name)
    assert len(seen) == 3 + 5 * rounds


def test_labels_of_the_rounds_add_up():
    found = steps(pretrain=PRETRAIN, sft=SFT, sample=SAMPLE, run={"rounds": 2})
    assert found["rank-2"].inputs == {"samples": "sample-2", "rankings": "rank"}
    assert found["sample-2"].inputs == {"model": "ppo"}
    assert found["ppo-2"].inputs["reference"] == "sft"


@pytest.mark.parametrize("policy", ["grpo", "rloo"])
def test_another_way_to_a_policy_reads_what_ppo_reads(policy):
    tree = {"pretrain": PRETRAIN, "sft": SFT, "sample": SAMPLE}
    ppo = steps(**tree)["ppo"]
    found = steps(**tree, run={"policy": policy, "rounds": 2})
    assert "ppo" not in found
    assert found[policy].inputs == ppo.inputs
    assert found[f"{policy}-2"].inputs["model"] == policy
    assert found["evaluate"].inputs["policy"] == policy
    assert found["sample-2"].inputs == {"model": policy}


@pytest.mark.parametrize("policy", ["dpo", "kto"])
def test_dpo_and_kto_need_no_reward_model_unless_best_of_does(policy):
    tree = {"pretrain": PRETRAIN, "sft": SFT, "sample": SAMPLE, "run": {"policy": policy}}
    found = steps(**tree)
    names = ["tokenizer", "pretrain", "sft", "sample", "rank", policy, "evaluate"]
    assert list(found) == names
    assert found[policy].inputs == {"model": "sft", "reference": "sft", "rankings": "rank"}
    assert "reward_model" not in found["evaluate"].inputs
    best_of = steps(**tree, evaluate={"best_of": 4})
    assert list(best_of) == [*names[:5], "reward", *names[5:]]
    assert best_of["evaluate"].inputs["reward_model"] == "reward"


def test_the_way_to_a_policy_changes_no_other_step():
    tree = {"pretrain": PRETRAIN, "sft": SFT, "sample": SAMPLE}
    ppo = steps(**tree)
    for policy in ("dpo", "kto", "grpo", "rloo"):
        other = steps(**tree, run={"policy": policy})
        shared = [name for name in other if name in ppo and name != "evaluate"]
        assert len(shared) >= 5
        assert [other[name] for name in shared] == [ppo[name] for name in shared]


def test_with_rules_for_a_reward_nothing_is_ranked():
    judge = {"judge": "rule", "rule": "polite"}
    tree = {
        "model": {"base": "owner/name"},
        "sft": SFT,
        "ppo": {"prompts": "prompts.jsonl", "reward_weight": 0, "rules": {"polite": 1.0}},
    }
    found = steps(**tree, evaluate=judge)
    assert list(found) == ["sft", "ppo", "evaluate"]
    assert found["ppo"].inputs == {"model": "sft", "reference": "sft"}
    assert found["ppo"].sources == {"prompts": ("prompts.jsonl",)}
    assert found["evaluate"].inputs == {"policy": "ppo", "sft": "sft"}
    assert found["evaluate"].sources["prompts"] == ("prompts.jsonl",)
    other = {**tree, "rloo": tree["ppo"], "run": {"policy": "rloo"}}
    assert list(steps(**other, evaluate=judge)) == ["sft", "rloo", "evaluate"]
    # rankings make a reward model, whatever its weight
    ranked = steps(**tree, rank={"data": "rankings.jsonl"}, evaluate=judge)
    assert list(ranked) == ["sft", "rank", "reward", "ppo", "evaluate"]
    with pytest.raises(ValueError, match=r"set evaluate\.judges: rule"):
        steps(**tree)
    with pytest.raises(ValueError, match="give both or neither"):
        steps(**tree, evaluate={"judge": "rule"})


def test_ppo_reads_rankings_and_the_reward_settings_only_to_learn_a_gold_from_them():
    tree = {"pretrain": PRETRAIN, "sft": SFT, "sample": SAMPLE}
    plain = steps(**tree)["ppo"]
    assert "rankings" not in plain.inputs
    assert "reward" not in plain.stage.sections
    own = steps(**tree, ppo={"gold": "reward_model"})["ppo"]
    assert own.inputs["rankings"] == "rank"
    assert "reward" in own.stage.sections
    given = steps(**tree, ppo={"gold": "reward_model", "gold_model": "folder"})["ppo"]
    assert given.sources["gold_model"] == ("folder",)
    assert "rankings" not in given.inputs
    assert "reward" not in given.stage.sections
