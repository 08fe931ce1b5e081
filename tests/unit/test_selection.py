"""Which prompts are labelled: exact probabilities, an untouched held-out set, and the stage around it."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import manifest
from pipeline.job import Input, Job, Out
from pipeline.plan import Step, plan
from pipeline.records import Prompt, Response, SampleGroup, is_heldout, read_jsonl, write_jsonl
from pipeline.settings import Settings
from pipeline.settings.model import ModelSettings
from stages import sample
from stages import tokenizer as tokenizer_stage
from stages.models import load_tokenizer, new_causal_lm, new_reward_model, save_model
from stages.reward_heads import Heads, add_heads, mean_head, save_heads
from stages.selection import inclusion_probabilities, priority, select

# ---- the choice ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "drawn", "top"),
    [(1, 1, 0), (5, 1, 0), (5, 5, 0), (6, 2, 3), (7, 3, 1), (7, 1, 5), (8, 4, 4)],
)
def test_inclusion_probabilities_are_those_of_all_draws(n: int, drawn: int, top: int) -> None:
    times = [0] * n
    draws = list(combinations(range(n), drawn))
    for draw in draws:
        rest = [j for j in range(n) if j not in draw]
        for j in (*draw, *rest[:top]):
            times[j] += 1
    expected = [count / len(draws) for count in times]
    assert inclusion_probabilities(n, drawn, top) == pytest.approx(expected)


IDS = [f"p{i}" for i in range(20)]
# the held-out prompts are wanted most, and two training prompts equally
WANTED = [*(10.0 + i for i in range(5)), 3.0, 3.0, *(1 / (i + 1) for i in range(13))]
HELDOUT = [True] * 5 + [False] * 15


def test_prompts_are_chosen_as_often_as_is_said() -> None:
    draws = 3000
    times = [0] * 20
    weighted = 0.0
    for seed in range(draws):
        chosen, at_random, probability = select(IDS, WANTED, HELDOUT, 8, 0.3, seed)
        assert len(chosen) == 8
        assert chosen == sorted(set(chosen))
        assert at_random <= set(chosen)
        for i in chosen:
            times[i] += 1
            weighted += WANTED[i] / probability[i] / draws
    # 2 of 8 are held out, 2 of the other 6 are drawn
    assert min(probability) >= 2 / 15
    assert sum(probability) == pytest.approx(8)
    for count, p in zip(times, probability, strict=True):
        assert abs(count / draws - p) <= 4 * math.sqrt(p * (1 - p) / draws)
    # weights of 1 / probability undo the choice
    assert weighted == pytest.approx(sum(WANTED), rel=0.02)


def test_held_out_prompts_are_drawn_whatever_their_priority() -> None:
    for seed in range(50):
        chosen, at_random, probability = select(IDS, WANTED, HELDOUT, 8, 0.3, seed)
        held = {i for i in chosen if HELDOUT[i]}
        assert len(held) == 2
        assert held <= at_random
        assert len(at_random) == 4
        assert probability[:5] == [2 / 5] * 5
        backwards = [WANTED[4 - i] for i in range(5)] + WANTED[5:]
        again = select(IDS, backwards, HELDOUT, 8, 0.3, seed)
        assert {i for i in again.chosen if HELDOUT[i]} == held


def test_the_rest_is_the_most_wanted() -> None:
    chosen, at_random, _ = select(IDS, WANTED, [False] * 20, 10, 0.3, 1)
    rest = [i for i in range(20) if i not in at_random]
    best = sorted(rest, key=lambda i: -WANTED[i])[:7]
    assert set(chosen) == at_random | set(best)
    assert len(at_random) == 3


def test_few_candidates_all_go_on_and_both_splits_are_asked_for() -> None:
    everything = select(IDS, WANTED, HELDOUT, 20, 0.3, 0)
    assert everything.chosen == list(range(20))
    assert everything.probability == [1.0] * 20
    # 2 of 20, of which half a one would be held out
    chosen, _, probability = select(IDS, WANTED, HELDOUT, 2, 0.3, 0)
    assert sorted(HELDOUT[i] for i in chosen) == [False, True]
    assert min(probability) > 0
    only = select(IDS, WANTED, [True] * 20, 4, 0.3, 0)
    assert only.probability == [4 / 20] * 20


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_disagreement_is_the_spread_of_what_the_heads_say_of_pairs() -> None:
    # pairs: (0, 1) heads 1 and -1, (0, 2) heads 3 and 3, (1, 2) heads 2 and 4
    scores = torch.tensor([[3.0, 3.0], [2.0, 4.0], [0.0, 0.0]])
    spreads = [sigmoid(1) - 0.5, 0.0, (sigmoid(4) - sigmoid(2)) / 2]
    assert priority("disagreement", scores) == pytest.approx(sum(spreads) / 3, abs=1e-6)
    # a head that likes everything more disagrees about nothing
    assert priority("disagreement", scores + torch.tensor([0.0, 9.0])) == pytest.approx(
        sum(spreads) / 3, abs=1e-6
    )
    assert priority("disagreement", scores.flip(0)) == priority("disagreement", scores)


def test_margin_is_how_alike_the_scores_are() -> None:
    # means 3, 3, 0
    scores = torch.tensor([[3.0, 3.0], [2.0, 4.0], [0.0, 0.0]])
    alike = [1.0, 2 - 2 * sigmoid(3), 2 - 2 * sigmoid(3)]
    assert priority("margin", scores) == pytest.approx(sum(alike) / 3, abs=1e-6)
    assert priority("margin", torch.zeros(4, 1)) == 1.0


# ---- the record ----------------------------------------------------------------------------


def test_a_group_without_a_choice_is_written_as_before() -> None:
    prompt = Prompt(({"role": "user", "content": "hello"},))
    plain = SampleGroup(prompt, (Response("a"), Response("b")))
    assert set(plain.to_row()) == {"id", "messages", "split", "responses"}
    assert SampleGroup.from_row(plain.to_row()) == plain
    marked = SampleGroup(prompt, plain.responses, priority=0.0, selection_probability=0.25)
    assert SampleGroup.from_row(marked.to_row()) == marked


# ---- the step ------------------------------------------------------------------------------


def tree(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "pretrain": {"data": "demo:stories"},
        "sft": {"data": "demo:demonstrations"},
        "sample": {"prompts": "demo:prompts", "max_prompts": 10},
        "run": {"rounds": 3},
        "reward": {"heads": 4},
    }
    for section, values in changes.items():
        given[section] = given.get(section, {}) | values
    return Settings.model_validate(given)


def fingerprints(settings: Settings) -> dict[str, str]:
    def digests(step: Step) -> dict[str, str]:
        return {role: f"sha256:{name}" for role, name in step.inputs.items()}

    return {s.name: manifest.fingerprint(s, settings, digests(s)) for s in plan(settings)}


def test_only_the_samples_of_later_rounds_depend_on_the_choice() -> None:
    plain = fingerprints(tree())
    chosen = fingerprints(tree(select={"by": "disagreement"}))
    assert {name for name in plain if plain[name] != chosen[name]} == {"sample-2", "sample-3"}
    # settings of a choice that nobody asks for make nothing stale
    assert fingerprints(tree(select={"candidates": 9, "random_share": 0.5})) == plain
    other = fingerprints(tree(rank={"heldout_fraction": 0.3}))
    assert other["sample-2"] == plain["sample-2"]
    for section, value in (("select", {"candidates": 9}), ("rank", {"heldout_fraction": 0.3})):
        asked = {"select": {"by": "disagreement"}}
        asked[section] = asked.get(section, {}) | value
        changed = fingerprints(tree(**asked))
        assert changed["sample"] == plain["sample"]
        assert changed["sample-2"] != chosen["sample-2"]


def test_a_choice_asks_the_reward_model_of_the_round_before() -> None:
    steps = {step.name: step for step in plan(tree(select={"by": "margin"}))}
    assert "reward_model" not in steps["sample"].inputs
    assert steps["sample-2"].inputs == {"model": "ppo", "reward_model": "reward"}
    assert steps["sample-3"].inputs["reward_model"] == "reward-2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": {"by": "margin"}, "sample": {"max_prompts": None}}, "set sample.max_prompts"),
        ({"select": {"by": "disagreement"}, "reward": {"heads": 1}}, "set reward.heads: 4"),
        ({"select": {"by": "margin"}, "run": {"policy": "dpo"}}, "dpo does without"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree(**changes)


PROMPTS = [Prompt(({"role": "user", "content": f"Say {i} and {i % 7}"},)) for i in range(60)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny language model, and a reward model of four heads on it."""
    root = tmp_path_factory.mktemp("models")
    words = (f"{prompt.text} good bad so and great {i}" for i, prompt in enumerate(PROMPTS))
    tokenizer = tokenizer_stage.train(words, 300, 2)
    torch.manual_seed(0)
    shape = {
        "architecture": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_length": 64,
    }
    save_model(
        new_causal_lm(ModelSettings.model_validate(shape), tokenizer), tokenizer, root / "model"
    )
    write_prompts = root / "prompts"
    write_prompts.mkdir()
    write_jsonl(write_prompts / "prompts.jsonl", (prompt.to_row() for prompt in PROMPTS))
    reward = new_reward_model(Input("model", "", path=root / "model"))
    add_heads(reward, 4, seed=3)
    weight_HD, bias_H = mean_head(reward)
    save_model(reward, load_tokenizer(Input("model", "", path=root / "model")), root / "reward")
    save_heads(Heads(weight_HD, bias_H, torch.zeros(4), torch.tensor(1.0)), root / "reward")
    return {"model": root / "model", "prompts": write_prompts, "reward_model": root / "reward"}


def run(
    work: Path, models: dict[str, Path], roles: tuple[str, ...], round: int, **select: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], Out]:
    settings = Settings.model_validate(
        {
            "model": {"base": "owner/name", "precision": "fp32"},
            "sample": {"max_prompts": 12, "validation_fraction": 0.1, "max_response_tokens": 8},
            "reward": {"heads": 4},
            "rank": {"heldout_fraction": 0.25},
            "select": {"candidates": 3, **select},
        }
    )
    inputs = {role: Input(role, "sha256:1", path=models[role]) for role in roles}
    job = Job("sample", "sample", "stages.sample", round, "0" * 12, work, work, {}, inputs, {})
    out = Out(job)
    out.artifact.mkdir(parents=True, exist_ok=True)
    metrics = sample.run(settings, inputs, out)
    return metrics, read_jsonl(out.artifact / "samples.jsonl"), out


@pytest.mark.parametrize("by", ["disagreement", "margin"])
def test_the_stage_hands_on_what_is_worth_a_label(
    tmp_path: Path, models: dict[str, Path], by: str
) -> None:
    roles = ("model", "prompts", "reward_model")
    metrics, rows, _ = run(tmp_path, models, roles, 2, by=by)
    assert metrics["selected"] == len(rows) == 12
    assert metrics["prompts"] == 36
    assert metrics["mean_priority_selected"] > metrics["mean_priority"]
    groups = [SampleGroup.from_row(row) for row in rows]
    drawn = [g for g in groups if is_heldout(g.prompt.id, 0.25)]
    others = [g for g in groups if g not in drawn]
    # whoever is held out was drawn, each as likely as another
    assert drawn
    assert len({g.selection_probability for g in drawn}) == 1
    assert all(0 < (g.selection_probability or 0) < 1 for g in drawn)
    least = min(g.selection_probability or 0 for g in others)
    surest = max(others, key=lambda g: g.priority or 0)
    assert 0 < least < (surest.selection_probability or 0)
    assert metrics["selected_at_random"] == len(drawn) + math.ceil(0.3 * len(others))
    assert len(read_jsonl(tmp_path / "artifact.tmp" / "prompts.jsonl")) == 60


def test_without_a_reward_model_the_stage_takes_prompts_at_random_and_says_so(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    roles = ("model", "prompts")
    _, plain, _ = run(tmp_path / "plain", models, roles, 1)
    assert "at random" not in capsys.readouterr().err
    metrics, rows, _ = run(tmp_path / "asked", models, roles, 1, by="margin")
    assert "at random: there is no reward model yet" in capsys.readouterr().err
    assert rows == plain
    assert len(rows) == 12
    assert "selected" not in metrics
    assert "priority" not in rows[0]


def test_no_candidate_of_a_round_was_sampled_in_the_round_before(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    _, first, _ = run(tmp_path / "first", models, ("model", "prompts"), 1)
    roles = ("model", "prompts", "reward_model")
    _, second, _ = run(tmp_path / "second", models, roles, 2, by="margin")
    assert not {row["id"] for row in first} & {row["id"] for row in second}
