"""The three kinds of critic give what their definitions say, on Llama and on GPT-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.job import Input
from pipeline.settings import LoraSettings
from pipeline.settings.ppo import PpoSettings
from stages.adapters import save_reward_adapter
from stages.critics import Agent, ValuePass, active, lora, separate, shared, zero_head
from stages.models import add_adapter, add_lora, backbone_and_head
from stages.ppo_models import _reward_on_base, make_agent, put_on_base
from stages.rollout import Sequences, make_sequences, response_logprobs, score_rows
from tests.tiny_models import KINDS, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    found = tiny_config(request.param, vocab_size=31, width=16)
    found.num_labels = 1
    return found


def policy_of(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def batch() -> Sequences:
    prompts = [[3, 4, 5], [6], [7, 8]]
    responses = [[9, 10], [11, 12, 13, 14], [15]]
    return make_sequences(prompts, responses, 0, torch.device("cpu"))


def by_hand(model: Any, batch: Sequences, read: Any) -> Tensor:
    """One row at a time, without padding: `read(hidden or logits at the predicting position)`."""
    rows = []
    R = batch.valid_BR.shape[1]
    for tokens, p, r in zip(
        batch.tokens_BT.tolist(),
        batch.prompt_tokens_B.tolist(),
        batch.response_tokens_B.tolist(),
        strict=True,
    ):
        outputs = model(torch.tensor([tokens[: p + r]]), output_hidden_states=True)
        rows.append([read(outputs, p - 1 + t, tokens[p + t]) for t in range(r)] + [0.0] * (R - r))
    return torch.tensor(rows)


def logprob(outputs: Any, at: int, token: int) -> float:
    return float((outputs.logits[0, at] / 0.7).log_softmax(-1)[token])


def test_a_shared_pass_reads_values_and_logprobs_at_the_same_places(
    config: Any, batch: Sequences
) -> None:
    agent = shared(policy_of(config), temperature=0.7)
    torch.nn.init.normal_(agent.value_head.weight)  # type: ignore[union-attr]
    outputs = agent.passes[0](batch)

    def value(found: Any, at: int, token: int) -> float:
        return float(agent.value_head(found.hidden_states[-1][0, at]))  # type: ignore[misc]

    with torch.no_grad():
        expected = by_hand(agent.policy, batch, value)
        logprobs = by_hand(agent.policy, batch, logprob)
    torch.testing.assert_close(outputs.values_BR, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.logprobs_BR, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(agent.values(batch, 2), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(agent.logprobs(batch, 2), logprobs, atol=1e-5, rtol=0)


def test_a_separate_critic_is_the_reward_model_on_the_scale_of_the_scores(
    config: Any, batch: Sequences
) -> None:
    reward = AutoModelForSequenceClassification.from_config(config).eval()
    backbone, head = backbone_and_head(reward)
    agent = separate(policy_of(config), ValuePass(backbone, head, mean=2.0, std=4.0), 1.0)
    # where a response ends, its value is what the reward model says of the row up to there
    p, r = batch.prompt_tokens_B[1].item(), 3
    row = batch.tokens_BT[1:2, : p + r]
    with torch.no_grad():
        expected = (reward(row).logits.squeeze() - 2.0) / 4.0
    torch.testing.assert_close(agent.values(batch, 8)[1, r], expected, atol=1e-5, rtol=0)
    assert (agent.values(batch, 8)[~batch.valid_BR] == 0).all()


@pytest.fixture
def lora_agent(config: Any) -> Agent:
    policy = add_lora(policy_of(config), LoraSettings(rank=2), "policy")
    assert isinstance(policy, PeftModel)
    add_adapter(policy, "value")
    # adapters begin as nothing: give both something to say
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    head = zero_head(policy)
    torch.nn.init.normal_(head.weight)
    return lora(policy, head, 1.0)


def test_adapters_off_are_the_base_exactly(config: Any, batch: Sequences) -> None:
    base = policy_of(config)
    expected = response_logprobs(base, batch, 1.0)[0].detach()
    policy = add_lora(base, LoraSettings(rank=2), "policy")
    assert isinstance(policy, PeftModel)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.equal(response_logprobs(policy, batch, 1.0)[0], expected)
    with active(policy, None):
        assert torch.equal(response_logprobs(policy, batch, 1.0)[0], expected)


def test_each_loss_trains_its_own_adapter_only(lora_agent: Agent, batch: Sequences) -> None:
    policy, value = lora_agent.policy_parameters(), lora_agent.value_parameters()
    assert policy
    assert not {id(p) for p in policy.values()} & {id(p) for p in value.values()}
    outputs = lora_agent.passes[0](batch)
    outputs.values_BR.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in policy.values())
    assert all(p.grad is not None for p in value.values())
    for parameter in value.values():
        parameter.grad = None
    outputs.logprobs_BR.sum().backward()
    assert all(p.grad is not None for p in policy.values())
    assert all(p.grad is None for p in value.values())
    frozen = [p for p in lora_agent.policy.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)


def test_what_is_trainable_survives_every_switch(lora_agent: Agent, batch: Sequences) -> None:
    def trainable() -> set[str]:
        return {name for name, p in lora_agent.policy.named_parameters() if p.requires_grad}

    before = trainable()
    lora_agent.passes[0](batch)
    lora_agent.values(batch, 8)
    with active(lora_agent.policy, None):  # type: ignore[arg-type]
        pass
    assert trainable() == before
    assert lora_agent.policy.active_adapter == "default"


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_no_gradient_reaches_beyond_what_a_kind_trains(
    config: Any, batch: Sequences, kind: str
) -> None:
    policy = policy_of(config)
    if kind == "shared":
        agent = shared(policy, 1.0)
        torch.nn.init.normal_(agent.value_head.weight)  # type: ignore[union-attr]
    else:
        reward = AutoModelForSequenceClassification.from_config(config).eval()
        agent = separate(policy, ValuePass(*backbone_and_head(reward)), 1.0)
    for module in agent.passes:
        values_BR = module(batch).values_BR
        if values_BR is not None:
            values_BR.sum().backward()
    reached = [name for name, p in agent.policy_parameters().items() if p.grad is not None]
    assert bool(reached) == (kind == "shared")
    assert all(p.grad is not None for p in agent.value_parameters().values())


def test_one_base_carries_policy_critic_and_reward_model(
    config: Any, batch: Sequences, tmp_path: Path
) -> None:
    base = policy_of(config)
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    classifier.base_model.load_state_dict(base.base_model.state_dict())
    reward = add_lora(classifier, LoraSettings(rank=3), "reward")
    assert isinstance(reward, PeftModel)
    for name, parameter in reward.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_reward_adapter(reward, tmp_path, "sha256:1")
    rows = [[3, 4, 5, 9], [6, 7, 8]]
    with torch.no_grad():
        expected = [reward(torch.tensor([row])).logits.item() for row in rows]

    policy = add_lora(base, LoraSettings(rank=2), "policy")
    contract = {"score_mean": 0.5, "score_std": 2.0}
    item = Input("reward_model", "", path=tmp_path, contract=contract)
    model = Input("model", "sha256:1")
    assert put_on_base(policy, model, item)
    source = _reward_on_base(item, 1.0, policy, CPU)
    agent = make_agent("lora", PpoSettings(), policy, model, item, True, CPU)
    found = score_rows(source.backbone, source.head, rows, 0, torch.device("cpu"))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    # the critic begins as the reward model, on the scale of the scores
    whole = make_sequences([row[:-1] for row in rows], [row[-1:] for row in rows], 0, CPU)
    one_on = make_sequences(rows, [[1], [1]], 0, CPU)
    values = agent.values(one_on, 8)[:, 0]
    assert values.tolist() == pytest.approx([(x - 0.5) / 2.0 for x in expected], abs=1e-5)
    # and what it learns, neither the policy nor the reward model does
    agent.passes[0](whole).values_BR.sum().backward()
    for parameter in agent.value_parameters().values():
        parameter.data += parameter.grad
    assert not torch.allclose(agent.values(one_on, 8)[:, 0], values)
    found = score_rows(source.backbone, source.head, rows, 0, torch.device("cpu"))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_an_adapter_of_another_model_is_not_used(config: Any, tmp_path: Path) -> None:
    reward = add_lora(
        AutoModelForSequenceClassification.from_config(config), LoraSettings(rank=3), "reward"
    )
    save_reward_adapter(reward, tmp_path, "sha256:other")  # type: ignore[arg-type]
    policy = add_lora(policy_of(config), LoraSettings(rank=2), "policy")
    item = Input("reward_model", "", path=tmp_path)
    assert not put_on_base(policy, Input("model", "sha256:1"), item)  # type: ignore[arg-type]
    assert sorted(policy.peft_config) == ["default", "value"]  # type: ignore[union-attr]
