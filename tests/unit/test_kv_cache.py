"""The cache in place against that of transformers, and what the decode loop does with both."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel

from stages.generation import _closed_up, generate
from stages.kv_cache import holds_plain_states, join
from tests.tiny_models import tiny_model

EOS, PAD, V = 2, 0, 61
PROMPTS = [[5, 6, 7], [8] * 10, [9, 10], [11, 12, 13, 14]] * 3

every_kind = pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])


def model_of(kind: str) -> PreTrainedModel:
    if kind != "mistral":
        return tiny_model(kind)
    torch.manual_seed(0)
    # a window shorter than prompt and response: its cache is of another kind
    config = MistralConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    model = MistralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def sample(model, prompts=PROMPTS, seeds=None, **options):  # type: ignore[no-untyped-def]
    return generate(
        model,
        prompts,
        list(range(len(prompts))) if seeds is None else seeds,
        eos_id=EOS,
        pad_id=PAD,
        max_response_tokens=30,
        **options,
    )


def test_the_cache_in_place_holds_what_that_of_transformers_holds() -> None:
    """Joining, dropping and moving rows, and adding tokens, against the plain cache."""
    model = model_of("llama")

    def read(rows: list[list[int]], cache: DynamicCache) -> DynamicCache:
        model(torch.tensor(rows), past_key_values=cache, use_cache=True)
        return cache

    with torch.no_grad():
        short = read([[5, 6], [7, 8]], DynamicCache(config=model.config))
        long = read([[5, 6, 7], [8, 9, 10]], DynamicCache(config=model.config))
        known = [
            (a.keys.clone(), b.keys.clone()) for a, b in zip(short.layers, long.layers, strict=True)
        ]
        ours = join([short, long], room=5)
        plain = DynamicCache(config=model.config)
        for number, (layer, (of_short, of_long)) in enumerate(zip(ours.layers, known, strict=True)):
            # rows of fewer columns end where the others end, and begin with zeros
            assert torch.equal(layer.keys[:2, :, 1:], of_short)
            assert torch.equal(layer.keys[2:], of_long)
            assert not layer.keys[:2, :, 0].any()
            plain.update(layer.keys.clone(), layer.values.clone(), number)
        for keep, tokens in (([0, 3, 2], [[11], [12], [13]]), ([2, 0], []), ([1, 0], [[14], [15]])):
            for cache in (plain, ours):
                cache.batch_select_indices(torch.tensor(keep))
                if tokens:
                    read(tokens, cache)
            for mine, theirs in zip(ours.layers, plain.layers, strict=True):
                assert torch.equal(mine.keys, theirs.keys)
                assert torch.equal(mine.values, theirs.values)
        assert ours.get_seq_length() == 5


def test_other_kinds_of_caches_are_known() -> None:
    assert holds_plain_states(model_of("llama").config)
    assert holds_plain_states(model_of("gpt2").config)
    assert not holds_plain_states(model_of("mistral").config)


def test_the_last_live_rows_take_the_places_of_the_finished_ones() -> None:
    assert _closed_up([True, False, True, False, True, True]) == [0, 4, 2, 5]
    assert _closed_up([True, True]) == [0, 1]
    assert _closed_up([False, False, True]) == [2]


@every_kind
def test_rows_leave_and_move_without_changing_any_other(kind: str) -> None:
    model = model_of(kind)
    found = sample(model)
    for i, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], [i])[0]
        assert found[i].tokens == alone.tokens
        assert found[i].logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert len({len(generated.tokens) for generated in found}) > 2, "rows must end at many steps"


def test_greedy_decoding_under_a_sliding_window_equals_that_of_transformers() -> None:
    model = model_of("mistral")
    for prompt, ours in zip(PROMPTS, sample(model, temperature=0), strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=PAD)
        assert theirs[0, len(prompt) :].tolist() == ours.tokens


def test_prompts_of_equal_length_need_no_mask() -> None:
    model = model_of("gpt2")
    masks = []
    model.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    alike = [[5, 6, 7], [8, 9, 10]]
    found = sample(model, alike)
    assert masks[1:] == [None] * (len(masks) - 1)
    assert len(masks) > 1
    padded = sample(model, [*alike, [4] * 9])
    assert [g.tokens for g in found] == [g.tokens for g in padded[:2]]


@every_kind
def test_values_are_those_of_a_forward_over_prompt_and_response(kind: str) -> None:
    model = model_of(kind)
    torch.manual_seed(1)
    head = nn.Linear(32, 1)
    found = sample(model, value_head=head)
    plain = sample(model)
    assert [g.tokens for g in found] == [g.tokens for g in plain]
    assert plain[0].values == []
    for prompt, generated in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt + generated.tokens])
            expected = head(model.base_model(ids).last_hidden_state[0]).squeeze(-1)
        # the state before the first response token ends with the prompt
        expected = expected[len(prompt) - 1 : -1].tolist()
        assert generated.values == pytest.approx(expected, abs=1e-4)
