"""Over-optimisation as it happens: a rule that can be gamed, gold that rises and falls, what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline import worker
from pipeline.errors import StageError, Stopped
from pipeline.job import Input, Inputs, Job, Metrics
from pipeline.records import Ranking, write_jsonl
from pipeline.settings import Settings
from stages import frontier, gold, rewards
from stages.answering import best_of_n_kl
from stages.chat import decode_response, encode_prompt
from stages.common import seed_for
from stages.generation import generate
from stages.models import load_causal_lm, load_tokenizer
from stages.over_optimisation import expected_of_best
from stages.rules import Messages, Rule
from tests.tiny_ppo import make_inputs, make_job, rows_of, run_ppo


def letters(_: Messages, response: str) -> float:
    """The proxy: pays for every letter, and so for answers stuffed with them."""
    return float(sum(c.isascii() and c.isalpha() for c in response))


def moderate(messages: Messages, response: str) -> float:
    """What is wanted: letters up to eight, and no more."""
    count = letters(messages, response)
    return count if count <= 8 else 16 - count


RULES = {"letters": letters, "moderate": moderate}
GAMED: dict[str, Any] = {
    "reward_weight": 0,
    "rules": {"letters": 1.0},
    "gold": "rule",
    "gold_rule": "moderate",
    "best_of": 4,
    "critic": "shared",
    "value_warmup_updates": 0,
    "value_lr": 1e-2,
    "lr": 1e-2,
    "kl_coef": 0.0,
    "missing_eos_penalty": 0.0,
    "updates": 26,
    "prompts_per_step": 32,
    "minibatch_rows": 16,
    "temperature": 1.0,
    "max_response_tokens": 8,
    "eval_prompts": 24,
    "eval_every_updates": 2,
    "checkpoint_every_updates": 2,
}


@pytest.fixture(autouse=True)
def known_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rewards, gold):
        monkeypatch.setattr(module, "load_rule", lambda name, key: Rule(name, RULES[name], "test"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"), "llama", train=16, validation=24)


def gamed(work: Path, inputs: Inputs, **changes: Any) -> Job:
    given = {role: item for role, item in inputs.items() if role != "reward_model"}
    job = make_job(work, given, **{**GAMED, **changes})
    job.settings["launch"]["keep_checkpoints"] = 20
    return job


def weights(work: Path) -> dict[str, torch.Tensor]:
    return load_file(work / "artifact.tmp" / "model.safetensors")


def frontier_of(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / "frontier.json").read_text())
    return found


@pytest.mark.slow
def test_a_gamed_rule_is_found_out_and_the_policy_of_the_peak_is_published(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "run"
    found, _ = run_ppo(gamed(work, inputs, keep="best_gold"))
    rows = [row for row in rows_of(work) if "validation_gold" in row]
    score, wanted = ([row[f"validation_{k}"] for row in rows] for k in ("score", "gold"))
    # the score rises all the way; gold rises with it, and then falls
    assert score[-1] > score[len(score) // 2] > score[0] + 2
    assert max(wanted) > wanted[0] + 2
    assert max(wanted) > wanted[-1] + 2
    assert found["gold_fell"] is True
    assert 0 < found["gold_peak_update"] <= found["gold_peak_high"] < 26
    assert found["best_update"] == found["gold_peak_update"]
    assert "WARNING: optimised too far: gold was highest at update" in capsys.readouterr().err
    shown = frontier_of(work)
    assert shown["kept_update"] == shown["peak"]["update"] == found["best_update"]
    assert [row["gold"] for row in shown["validations"]] == pytest.approx(wanted)
    assert all(row["gold_low"] <= row["gold"] <= row["gold_high"] for row in shown["validations"])
    # what is published is the policy of that very update, as its checkpoint has it
    folder = work / "checkpoints" / f"step-{found['best_update']:08d}"
    then, published = load_file(folder / "policy.safetensors"), weights(work)
    last = load_file(work / "checkpoints" / "step-00000024" / "policy.safetensors")
    assert all(torch.equal(published[name], then[name]) for name in published)
    assert not all(torch.equal(published[name], last[name]) for name in published)


@pytest.mark.slow
def test_a_stopped_run_keeps_the_same_policy_and_draws_the_same_frontier(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"keep": "best_gold", "updates": 4, "prompts_per_step": 16}
    changes |= {"eval_every_updates": 1, "eval_prompts": 6}
    run_ppo(gamed(tmp_path / "whole", inputs, **changes))
    whole = weights(tmp_path / "whole")
    for stop_before in (0, 1, 3):
        work = tmp_path / str(stop_before)
        job = gamed(work, inputs, **changes)
        with monkeypatch.context() as patch:
            asked = iter([False] * stop_before + [True])
            patch.setattr(worker, "stop_requested", lambda asked=asked: next(asked))
            with pytest.raises(Stopped):
                run_ppo(job)
        with monkeypatch.context() as patch:
            patch.setattr(frontier, "_sample_and_score", None)  # nothing is sampled twice
            run_ppo(job)
        assert rows_of(work) == rows_of(tmp_path / "whole")
        for name in ("frontier.json", "validations.jsonl", "best_of_n.json"):
            assert (work / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        found = weights(work)
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_watching_changes_nothing(inputs: Inputs, tmp_path: Path) -> None:
    changes = {"updates": 3, "eval_every_updates": 1, "eval_prompts": 4}
    plain = {**changes, "gold": None, "gold_rule": None}
    run_ppo(gamed(tmp_path / "watched", inputs, **changes))
    run_ppo(gamed(tmp_path / "plain", inputs, **plain))
    one, other = weights(tmp_path / "watched"), weights(tmp_path / "plain")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "plain" / "validations.jsonl").exists()


@pytest.mark.parametrize("lora", [0, 2])
def test_the_baseline_is_the_best_of_the_reference_s_own_responses(
    inputs: Inputs, tmp_path: Path, lora: int
) -> None:
    """With adapters the reference is the policy with them off; both ways it is the model on disk."""
    changes: dict[str, Any] = {"updates": 1, "eval_prompts": 3, "best_of": 3, "epochs": 1}
    run_ppo(gamed(tmp_path / "run", inputs, lora={"rank": lora}, **changes))
    model, tokenizer = load_causal_lm(inputs["reference"]), load_tokenizer(inputs["reference"])
    assert inputs["prompts"].path is not None
    lines = (inputs["prompts"].path / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line) for line in lines]
    prompts = sorted((p for p in prompts if p["split"] == "validation"), key=lambda p: p["id"])[:3]
    each: list[tuple[list[float], list[float]]] = []
    for i, prompt in enumerate(prompts):
        texts = []
        for k in range(3):
            [one] = generate(
                model,
                [encode_prompt(tokenizer, prompt["messages"])],
                [seed_for(1, "ppo", 1, "best_of", i, k)],
                eos_id=tokenizer.eos_token_id,
                pad_id=tokenizer.pad_token_id,
                max_response_tokens=8,
            )
            texts.append(decode_response(tokenizer, one.tokens))
        each.append(([letters([], t) for t in texts], [moderate([], t) for t in texts]))
    found = json.loads((tmp_path / "run" / "best_of_n.json").read_text())
    assert [row["n"] for row in found["curve"]] == [1, 2, 3]
    for row in found["curve"]:
        n = row["n"]
        score = sum(expected_of_best(s, s, n) for s, _ in each) / 3
        wanted = sum(expected_of_best(s, g, n) for s, g in each) / 3
        assert (row["score"], row["gold"]) == pytest.approx((score, wanted))
        assert row["kl"] == best_of_n_kl(n)


# ---- a reward model that the held-out rankings made --------------------------------------------


def with_rankings(inputs: Inputs, folder: Path, heldout: int = 12) -> Inputs:
    """Shorter is better, in rankings of both splits."""
    folder.mkdir()
    rows = [
        Ranking(
            ({"role": "user", "content": f"one {i}"},),
            ("one", "one two", "one two three two"),
            (1, 2, 3),
            "ann",
            "heldout" if i < heldout else "train",
        ).to_row()
        for i in range(heldout + 8)
    ]
    write_jsonl(folder / "rankings.jsonl", rows)
    return {**inputs, "rankings": Input("rankings", "sha256:5", path=folder)}


def run_with_gold(work: Path, inputs: Inputs) -> tuple[Metrics, dict[str, Any]]:
    job = make_job(work, inputs, best_of=2, eval_prompts=3)
    job.settings["ppo"]["gold"] = "reward_model"
    job.settings["rank"]["data"] = ["rankings.jsonl"]
    job.settings["reward"] |= {"lr": 1e-2, "epochs": 4, "prompts_per_step": 4, "max_length": 64}
    metrics, out = run_ppo(job)
    return metrics, out.derived


def test_gold_may_be_learnt_from_the_held_out_rankings(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = with_rankings(inputs, tmp_path / "rankings")
    with monkeypatch.context() as patch:
        asked = iter([False, False, True])
        patch.setattr(worker, "stop_requested", lambda: next(asked))
        with pytest.raises(Stopped):
            run_with_gold(tmp_path / "stopped", given)
    assert not (tmp_path / "stopped" / "gold" / "model").exists()
    run_with_gold(tmp_path / "stopped", given)
    metrics, derived = run_with_gold(tmp_path / "run", given)
    # on the rankings that the policy's own reward model learned from
    assert derived["gold_accuracy"] > 0.9
    assert "validation_gold" in metrics
    work = tmp_path / "run"
    assert (work / "gold" / "model" / "reward.json").is_file()
    for name in ("model.safetensors", "reward.json"):
        resumed = tmp_path / "stopped" / "gold" / "model" / name
        assert resumed.read_bytes() == (work / "gold" / "model" / name).read_bytes()
    # its rows are not the policy's
    assert [row["step"] for row in rows_of(work)] == [0, 1, 2, 3]
    assert not (work / "gold" / "checkpoints").exists()
    # a start after a kill takes what is there
    before = (work / "gold" / "model" / "model.safetensors").stat().st_mtime_ns
    _, derived = run_with_gold(work, given)
    assert (work / "gold" / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert derived["gold_accuracy"] > 0.9


def test_without_held_out_rankings_there_is_nothing_to_learn_gold_from(
    inputs: Inputs, tmp_path: Path
) -> None:
    given = with_rankings(inputs, tmp_path / "rankings", heldout=0)
    with pytest.raises(StageError, match=r"ppo\.gold needs held-out rankings"):
        run_with_gold(tmp_path / "run", given)


@pytest.mark.parametrize(
    ("ppo", "message"),
    [
        ({"gold": "rule"}, "gold: rule and gold_rule belong together"),
        ({"gold_rule": "letters"}, "gold: rule and gold_rule belong together"),
        ({"keep": "best_gold"}, "best_gold needs gold"),
        ({"keep": "best_gold", "gold": "rubric"}, "must not choose"),
        ({"gold_model": "x"}, "gold_model belongs to gold: reward_model"),
        ({"gold": "reward_model", "gold_model": ["x", "y"]}, "one reward model"),
        ({"gold": "rubric"}, "knows the demo world's prompts only"),
    ],
)
def test_what_cannot_be_watched_is_refused_at_once(ppo: dict[str, Any], message: str) -> None:
    tree = {"model": {"base": "b"}, "rank": {"data": "r.jsonl"}, "ppo": ppo}
    with pytest.raises(ValueError, match=message):
        Settings.model_validate(tree)


def test_a_reward_model_needs_rankings_or_a_folder() -> None:
    alone = {
        "model": {"base": "b"},
        "ppo": {
            "gold": "reward_model",
            "prompts": "p",
            "reward_weight": 0,
            "rules": {"letters": 1},
        },
        "evaluate": {"judge": "rule", "rule": "letters"},
    }
    with pytest.raises(ValueError, match="needs rankings to hold out"):
        Settings.model_validate(alone)


def test_a_run_of_before_says_keep_best_by() -> None:
    tree: dict[str, dict[str, Any]] = {
        "model": {"base": "b"},
        "ppo": {"gold": None, "keep_best_by": "reward"},
    }
    assert Settings.model_validate(tree).ppo.keep == "best_reward"
    # what is said now counts
    tree["ppo"] |= {"gold": "reward_model", "gold_model": "x", "keep": "best_gold"}
    assert Settings.model_validate(tree).ppo.keep == "best_gold"
