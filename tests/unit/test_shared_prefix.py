"""Reading a prompt once for all its responses gives what separate rows give: scores and gradients."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from stages import shared_prefix
from stages.shared_prefix import (
    GroupScorer,
    PromptGroup,
    cannot_share_prefix,
    decide_sharing,
    score_groups,
)

PAD = 0


def classifier(architecture: str, **keys: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": 60,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": PAD,
            "num_labels": 1,
            # a larger spread than usual, so that what a token attends to shows in the score
            "initializer_range": 0.3,
            **keys,
        },
    )
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


LLAMA = {"intermediate_size": 64, "num_key_value_heads": 2}
GPT2 = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
MODELS = [("llama", LLAMA), ("gpt2", GPT2)]


def ragged(prompts: int, seed: int = 0) -> list[PromptGroup]:
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(1, 60) for _ in range(rng.randint(low, high))]

    return [
        PromptGroup(ids(3, 14), [ids(1, 12) for _ in range(rng.randint(1, 6))])
        for _ in range(prompts)
    ]


def gradients(model: nn.Module, groups: list[PromptGroup], share: bool) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    scores = GroupScorer(model, PAD, share)(groups)
    weights = torch.linspace(-1, 1, scores.numel()).view_as(scores)
    (scores * weights).sum().backward()
    found = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert found
    return [scores.detach(), *found]


@pytest.mark.parametrize(("architecture", "keys"), MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("adapters", [False, True])
def test_scores_and_gradients_equal_those_of_separate_rows(
    architecture: str, keys: dict[str, Any], attention: str, adapters: bool
) -> None:
    model: nn.Module = classifier(architecture, **keys, attn_implementation=attention)
    if adapters:
        names = ["q_proj", "v_proj"] if architecture == "llama" else ["c_attn"]
        lora = LoraConfig(target_modules=names, init_lora_weights=False)
        model = get_peft_model(model, lora)  # type: ignore[arg-type]
    groups = ragged(5)
    shared, alone = gradients(model, groups, True), gradients(model, groups, False)
    assert len(shared) == len(alone)
    for a, b in zip(shared, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "keys"), MODELS)
def test_a_score_is_that_of_the_response_alone_at_its_end_token(
    architecture: str, keys: dict[str, Any]
) -> None:
    model = classifier(architecture, **keys).eval()
    groups = ragged(3, seed=1)
    expected = [
        model(input_ids=torch.tensor([prompt + response])).logits.item()
        for prompt, responses in groups
        for response in responses
    ]
    for share in (True, False):
        found = score_groups(GroupScorer(model, PAD, share), groups).squeeze(1)
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_prompt_with_many_long_responses_is_split_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = classifier("llama", **LLAMA).eval()
    groups = ragged(4, seed=2)
    whole = GroupScorer(model, PAD, True)
    expected, tokens = score_groups(whole, groups), [whole.cost(g) for g in groups]
    monkeypatch.setattr(shared_prefix, "_ROW_TOKENS", 16)
    rows = list(shared_prefix._rows(groups))
    assert len(rows) > len(groups)
    assert [r for row in rows for r in row.responses] == [r for g in groups for r in g.responses]
    torch.testing.assert_close(score_groups(whole, groups), expected, atol=1e-5, rtol=1e-5)
    assert sum(whole.cost(g) for g in groups) > sum(tokens), "the prompt read again is counted"


def test_order_and_micro_batches_do_not_change_a_score() -> None:
    model = classifier("gpt2", **GPT2).eval()
    groups = ragged(7, seed=4)
    scorer = GroupScorer(model, PAD, True)
    together = score_groups(scorer, groups).split([len(g.responses) for g in groups])
    for size in (1, 3):
        back = score_groups(scorer, groups[::-1], at_once=size)
        back_split = back.split([len(g.responses) for g in groups[::-1]])
        for a, b in zip(together, back_split[::-1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_llama_and_gpt2_can_and_others_are_found_out() -> None:
    groups = ragged(4)
    for architecture, keys in MODELS:
        assert cannot_share_prefix(classifier(architecture, **keys), groups, PAD) is None
    # position biases are made from a mask of two dimensions
    assert cannot_share_prefix(classifier("bloom", n_head=4, n_layer=2), groups, PAD)
    # a window would be overridden by the mask
    windowed = classifier("mistral", **LLAMA, sliding_window=8)
    assert "sliding_window of 8" in str(cannot_share_prefix(windowed, groups, PAD))
    assert (
        cannot_share_prefix(classifier("mistral", **LLAMA, sliding_window=64), groups, PAD) is None
    )


def test_a_model_that_ignores_the_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier("llama", **LLAMA)
    groups = ragged(4)
    monkeypatch.setattr(shared_prefix, "_mask", lambda *_: None)
    assert "scores differ by" in str(cannot_share_prefix(model, groups, PAD))


def test_a_fallback_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    out: Any = SimpleNamespace(say=said.append, derived={})
    bloom = classifier("bloom", n_head=4, n_layer=2)
    assert decide_sharing(True, bloom, ragged(4), PAD, out) is False
    assert said[0].startswith("the prompt is read again for each response: ")
    assert out.derived["share_prefix"]
    assert decide_sharing(False, bloom, ragged(4), PAD, out) is False
    assert len(said) == 1
    assert decide_sharing(True, classifier("llama", **LLAMA), ragged(4), PAD, out) is True


def test_short_prompts_are_read_again_because_that_is_faster() -> None:
    out: Any = SimpleNamespace(say=print, derived={})
    model = classifier("llama", **LLAMA)
    # 4 x 20 + 4 x 20 tokens apart, 20 + 4 x 20 together: 1.6; with a prompt of 8 it is 1.27
    responses = [[3] * 20] * 4
    assert decide_sharing(True, model, [PromptGroup([4] * 20, responses)], PAD, out) is True
    assert decide_sharing(True, model, [PromptGroup([4] * 8, responses)], PAD, out) is False
