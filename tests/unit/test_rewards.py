"""The score of a response is the weighted sum that the settings ask for, and nothing else."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError, StageError
from pipeline.settings.rewarded import RewardedSettings
from stages import rewards, rules
from stages.models import backbone_and_head
from stages.rewards import RewardModel, Rewards
from stages.rules import GROUP, load_rule
from tests.tiny_models import tiny_reward_model

assert GROUP  # something that is not a function, under a name of this module


def count_words(messages: list[dict[str, Any]], response: str) -> float:
    return len(response.split())


def fails(messages: list[dict[str, Any]], response: str) -> float:
    raise KeyError("no such thing")


def not_a_number(messages: list[dict[str, Any]], response: str) -> float:
    return float("nan")


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        EntryPoint(name, f"{__name__}:{name}", GROUP)
        for name in ("count_words", "fails", "not_a_number", "missing", "GROUP")
    )
    monkeypatch.setattr(rules, "entry_points", lambda group: points.select(group=group))
    monkeypatch.setattr(rewards, "decode_response", lambda tokenizer, ids: "w " * len(ids))


class Tokenizer:
    pad_token_id = 0
    eos_token_id = 9


ROWS = [[3, 4, 5], [3, 6, 7, 8, 9]]
OWN = {"missing_eos_penalty": 0.25, "length_penalty": 0.125, "reward_weight": 0.0}


def score(weights: dict[str, float], models: list[RewardModel] | None = None) -> Any:
    """Of one response that was cut (two tokens) and one that ended (four with the end token)."""
    loaded = {name: (load_rule(name, "ppo.rules"), weight) for name, weight in weights.items()}
    own = RewardedSettings(**{**OWN, "rules": {"any": 1.0}})
    prompts, responses = [row[:1] for row in ROWS], [row[1:] for row in ROWS]
    tokenizer: Any = Tokenizer()
    return Rewards(models or [], loaded).score(
        prompts, [[], []], responses, tokenizer, torch.device("cpu"), own, 8
    )


def test_a_rule_sees_the_text_and_is_named_by_its_entry_point() -> None:
    scores_B, parts_B = score({"count_words": 0.5})
    assert parts_B["count_words"].tolist() == [2.0, 4.0]
    assert scores_B.tolist() == [0.5 * 2 - 0.25 - 0.125 * 2, 0.5 * 4 - 0.125 * 4]


def test_a_reward_model_is_normalised_then_clipped_then_weighted() -> None:
    model = tiny_reward_model("llama", vocab_size=11, width=16, sharpness=1.0)
    with torch.no_grad():
        # the response that was cut gets an end token: without one no model was trained
        raw = [model(torch.tensor([row])).logits.item() for row in ([*ROWS[0], 9], ROWS[1])]
    plain = RewardModel("plain", 1.0, *backbone_and_head(model), mean=0.1, std=0.5)
    steep = RewardModel("steep", 2.0, *backbone_and_head(model), mean=raw[0] - 1, std=1e-3)
    scores_B, parts_B = score({}, [plain, steep])
    assert parts_B["plain"].tolist() == pytest.approx([(x - 0.1) / 0.5 for x in raw], abs=1e-5)
    assert parts_B["steep"].tolist()[0] == 5.0
    expected = [
        parts_B["plain"][i].item() + 2 * parts_B["steep"][i].item() - penalty
        for i, penalty in enumerate((0.25 + 0.125 * 2, 0.125 * 4))
    ]
    assert scores_B.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("unheard_of", ConfigError, "no installed package declares the rule 'unheard_of'"),
        ("missing", ConfigError, "'missing' cannot be imported"),
        ("GROUP", ConfigError, "is not a function"),
        ("fails", StageError, "the rule 'fails' failed on the response"),
        ("not_a_number", StageError, "gave nan"),
    ],
)
def test_a_rule_that_cannot_be_used_is_named(name: str, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        score({name: 1.0})
