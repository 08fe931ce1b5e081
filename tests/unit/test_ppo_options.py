"""What the ppo step can be told beyond the plain algorithm, on tiny runs: critics, sources, PTX, gold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import worker
from pipeline.errors import ArtifactError, DataError, Stopped
from pipeline.job import Input, Inputs
from stages import rewards
from stages import tokenizer as tokenizer_stage
from stages.models import load_causal_lm, load_reward_model, load_tokenizer, save_model
from stages.rules import Rule
from tests.tiny_ppo import make_inputs, make_job, rows_of, run_ppo

LORA = {"rank": 2, "alpha": 4}
GOLD = {"gold": "reward_model"}
TEXT = "one two three one two one three\n\n" * 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "llama")


def with_text(inputs: Inputs, folder: Path, text: str = TEXT) -> Inputs:
    path = folder / "text.txt"
    path.write_text(text)
    return {**inputs, "ptx": Input("ptx", "sha256:9", sources=(str(path),))}


def weights(work: Path) -> bytes:
    return (work / "artifact.tmp" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"critic": "shared", "value_warmup_updates": 1},
        {"lora": LORA},
        {"lora": LORA, "critic": "separate"},
        {"ptx_coef": 0.5, "ptx_tokens": 16, "ptx_rows": 3, "rows_per_rank": 1},
    ],
    ids=["shared", "lora", "lora-separate", "ptx"],
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    given = with_text(inputs, tmp_path) if "ptx_coef" in changes else inputs
    changes = {**changes, "ptx_data": "x"} if "ptx_coef" in changes else changes
    run_ppo(make_job(tmp_path / "whole", given, **changes))
    job = make_job(tmp_path / "run", given, **changes)
    asked = iter([False, False, True])
    monkeypatch.setattr(worker, "stop_requested", lambda: next(asked))
    with pytest.raises(Stopped):
        run_ppo(job)
    monkeypatch.setattr(worker, "stop_requested", lambda: False)
    torch.manual_seed(torch.seed())
    run_ppo(job)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_critic_in_warm_up_leaves_the_policy_alone(inputs: Inputs, tmp_path: Path) -> None:
    for critic, changes in (("shared", {}), ("separate", {}), ("lora", {"lora": LORA})):
        work = tmp_path / critic
        run_ppo(
            make_job(
                work, inputs, critic=critic, value_warmup_updates=2, eval_every_updates=1, **changes
            )
        )
        start, first, second, third = rows_of(work)
        assert first["validation_kl"] == second["validation_kl"] == start["validation_kl"], critic
        assert first["value_grad_norm"] > 0
        assert third["validation_kl"] != start["validation_kl"], critic


def test_the_policy_s_own_warm_up_begins_where_that_of_the_critic_ends(
    inputs: Inputs, tmp_path: Path
) -> None:
    run_ppo(make_job(tmp_path, inputs, value_warmup_updates=1, warmup_fraction=0.25, updates=5))
    # four updates of four steps: the first of them warms up
    assert [row["lr"] for row in rows_of(tmp_path)[2:]] == pytest.approx(
        [0.25e-3, 1e-3, 1e-3 * 8 / 12, 1e-3 * 4 / 12]
    )


def test_a_dual_clip_that_nothing_reaches_changes_no_bit(inputs: Inputs, tmp_path: Path) -> None:
    for name, bound in (("off", None), ("far", 1e6), ("near", 1 + 1e-6)):
        run_ppo(make_job(tmp_path / name, inputs, dual_clip=bound, rows_per_rank=1))
    off, far, near = (rows_of(tmp_path / name) for name in ("off", "far", "near"))
    # not the published ones, which may be those of the start
    trained = {
        name: (tmp_path / name / "checkpoints/step-00000002/policy.safetensors").read_bytes()
        for name in ("off", "far", "near")
    }
    assert trained["far"] == trained["off"]
    assert [row.pop("dual_clip_fraction") for row in far[1:]] == [0.0] * 3
    assert far == off
    # and one within reach counts its share of the tokens, and trains something else
    assert all(0 < row["dual_clip_fraction"] < 1 for row in near[1:])
    assert trained["near"] != trained["off"]


def test_pretraining_text_is_learnt_along(inputs: Inputs, tmp_path: Path) -> None:
    changes = {"ptx_tokens": 16, "ptx_data": "x", "updates": 6}
    run_ppo(make_job(tmp_path / "ptx", with_text(inputs, tmp_path), ptx_coef=1.0, **changes))
    losses = [row["ptx_loss"] for row in rows_of(tmp_path / "ptx")[1:]]
    assert losses[-1] < losses[0] - 0.1


def test_too_little_pretraining_text_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    given = with_text(inputs, tmp_path, "one")
    with pytest.raises(DataError, match="fewer tokens than one row of 128"):
        run_ppo(make_job(tmp_path / "run", given, ptx_coef=1.0, ptx_data="x"))


@pytest.mark.parametrize("critic", ["separate", "shared", "lora"])
def test_without_a_reward_model_rules_alone_reward(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, critic: str
) -> None:
    """Shorter is better, by a rule: the policy learns it, and the critic begins at zero."""

    def short(messages: list[dict[str, Any]], response: str) -> float:
        return -float(len(response))

    monkeypatch.setattr(rewards, "load_rule", lambda name, key: Rule(name, short, "test"))
    given = {role: item for role, item in inputs.items() if role != "reward_model"}
    lora = {"lora": {"rank": 2}} if critic == "lora" else {}
    changes = {"critic": critic, "reward_weight": 0, "rules": {"short": 1.0}, **lora}
    job = make_job(tmp_path, given, missing_eos_penalty=0.0, **changes)
    run_ppo(job)
    rows = rows_of(tmp_path)
    # of the critic that says 0
    assert rows[1]["explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert rows[1]["score"] < 0


def test_the_score_is_the_weighted_sum_less_the_penalties(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def long(messages: list[dict[str, Any]], response: str) -> float:
        assert messages[-1]["role"] == "user"
        return float(len(response))

    monkeypatch.setattr(rewards, "load_rule", lambda name, key: Rule(name, long, "test"))
    other = inputs["reward_model"]
    given = {**inputs, "reward_models": Input("reward_models", "", sources=(str(other.path),))}
    job = make_job(
        tmp_path,
        given,
        reward_weight=0.5,
        reward_models=[str(other.path)],
        reward_model_weights=[2.0],
        rules={"long": 0.25},
        length_penalty=0.125,
        missing_eos_penalty=3.0,
    )
    run_ppo(job)
    for row in rows_of(tmp_path):
        if "score/long" not in row:
            continue
        expected = (
            0.5 * row["score/reward_model"]
            + 2.0 * row["score/reward_models[0]"]
            + 0.25 * row["score/long"]
            - 0.125 * row["response_tokens"]
            - 3.0 * (1 - row["eos_rate"])
        )
        assert row["score"] == pytest.approx(expected, abs=1e-4)
        assert row["score/long"] > 0


def test_gold_decides_what_is_kept_where_it_is_asked_to(inputs: Inputs, tmp_path: Path) -> None:
    """A gold model that is minus the reward model: what PPO does can only be worse by it."""
    source = inputs["reward_model"]
    model = load_reward_model(source)
    with torch.no_grad():
        model.score.weight.neg_()
    save_model(model, load_tokenizer(source), tmp_path / "gold")
    given = {**inputs, "gold_model": Input("gold_model", "", sources=(str(tmp_path / "gold"),))}
    changes = {**GOLD, "gold_model": str(tmp_path / "gold"), "eval_every_updates": 1, "best_of": 0}
    changes |= {"lr": 3e-3, "updates": 6}
    kept = {}
    for by in ("best_reward", "best_gold"):
        kept[by], _ = run_ppo(make_job(tmp_path / by, given, keep=by, **changes))
    rows = rows_of(tmp_path / "best_gold")
    assert rows == rows_of(tmp_path / "best_reward")
    gold = [row["validation_gold"] for row in rows]
    windows = [[*gold[max(0, i - 1) : i + 2], gold[i]] for i in range(len(gold))]
    values = [sum(window) / len(window) for window in windows]
    assert kept["best_gold"]["best_update"] == values.index(max(values))
    assert kept["best_gold"]["gold_peak_update"] == kept["best_gold"]["best_update"]
    rewards = [row["validation_reward"] for row in rows]
    assert kept["best_reward"]["best_update"] == rewards.index(max(rewards))
    assert kept["best_gold"]["best_update"] != kept["best_reward"]["best_update"]


def test_a_reward_model_with_another_tokenizer_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    """Of the same size, and with the same special ids."""
    source = inputs["reward_model"]
    own = load_tokenizer(source)
    other = tokenizer_stage.train(iter(["four five six seven"] * 9), 300, 2)
    assert other.pad_token_id == own.pad_token_id
    save_model(load_reward_model(source), other, tmp_path / "other")
    given = {**inputs, "gold_model": Input("gold_model", "", sources=(str(tmp_path / "other"),))}
    with pytest.raises(ArtifactError, match="another tokenizer than the policy"):
        run_ppo(make_job(tmp_path / "run", given, gold_model=str(tmp_path / "other"), **GOLD))


@pytest.mark.parametrize(
    "stated",
    ["{", "{}", '{"score_mean": 0, "score_std": 0}', '{"score_mean": "a", "score_std": 1}'],
)
def test_a_broken_normalisation_is_named(inputs: Inputs, tmp_path: Path, stated: str) -> None:
    source = inputs["reward_model"]
    save_model(load_reward_model(source), load_tokenizer(source), tmp_path / "gold")
    (tmp_path / "gold" / "reward.json").write_text(stated)
    given = {**inputs, "gold_model": Input("gold_model", "", sources=(str(tmp_path / "gold"),))}
    with pytest.raises(ArtifactError, match=r"reward\.json"):
        run_ppo(make_job(tmp_path / "run", given, gold_model=str(tmp_path / "gold"), **GOLD))


def test_two_reward_models_of_the_same_name_both_count(inputs: Inputs, tmp_path: Path) -> None:
    path = str(inputs["reward_model"].path)
    given = {**inputs, "reward_models": Input("reward_models", "", sources=(path, path))}
    changes = {"reward_models": [path, path], "reward_model_weights": [2.0, 3.0], "updates": 1}
    run_ppo(make_job(tmp_path, given, reward_weight=1.0, missing_eos_penalty=0.0, **changes))
    row = rows_of(tmp_path)[1]
    parts = [row[f"score/{n}"] for n in ("reward_model", "reward_models[0]", "reward_models[1]")]
    assert row["score"] == pytest.approx(parts[0] + 2 * parts[1] + 3 * parts[2], abs=1e-5)


def test_with_adapters_the_reference_is_the_base_unless_it_is_another_model(
    inputs: Inputs, tmp_path: Path
) -> None:
    """In round 2 the policy starts from the first round's: the reference is a model of its own."""
    policy = load_causal_lm(inputs["model"])
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    save_model(policy, load_tokenizer(inputs["model"]), tmp_path / "second")
    second = {
        **inputs,
        "model": replace(inputs["model"], path=tmp_path / "second", digest="sha256:7"),
    }
    for given, frozen, name in ((inputs, 1, "one"), (second, 2, "two")):
        _, out = run_ppo(make_job(tmp_path / name, given, lora=LORA, updates=1))
        assert out.derived["frozen_models"] == frozen
    first_kl = rows_of(tmp_path / "one")[0]["validation_kl"]
    assert first_kl == pytest.approx(0, abs=1e-5)
    assert abs(rows_of(tmp_path / "two")[0]["validation_kl"]) > 1e-3
