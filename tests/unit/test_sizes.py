"""Exact sizes against models that are really built."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.settings import LoraSettings
from stages.models import add_lora
from stages.sizes import count, kept_for_backward
from tests.tiny_models import KINDS, tiny_config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_the_model(kind, tied):
    config = tiny_config(kind)
    config.tie_word_embeddings = tied
    size = count(config)
    model = AutoModelForCausalLM.from_config(config)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    table = model.get_input_embeddings().weight.numel()
    places = 128 * 32 if kind == "gpt2" else 0
    assert size.embedding == table + places
    # each token is multiplied with all but what it looks up; the head counts, tied or not
    assert size.multiplying == size.parameters - places - (0 if tied else table)
    assert (size.layers, size.attention_width, size.kv_width) == (2, 32, 32)


def test_adapters_are_those_of_peft():
    lora = LoraSettings(rank=4)
    config = tiny_config("llama")
    model = add_lora(AutoModelForCausalLM.from_config(config), lora, "causal")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = count(config, lora)
    assert size.adapters == size.trainable == trained
    # 2 layers of 4 x (32, 32), 2 x (32, 64) and (64, 32), each (in + out) x rank
    assert trained == 2 * 4 * (4 * 64 + 3 * 96)


def test_what_is_kept_for_backward_is_what_torch_keeps():
    config = tiny_config("llama")
    model = AutoModelForCausalLM.from_config(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    ids = torch.zeros((3, 40), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    real = sum(size for size, _ in found.values())
    assert kept_for_backward(config, 3, 40) == pytest.approx(real, rel=0.01)


def test_twice_the_rows_keep_twice_as_much_and_bf16_less():
    config = tiny_config("llama")
    once, twice = (kept_for_backward(config, rows, 64, logits=False) for rows in (2, 4))
    assert twice == pytest.approx(2 * once, rel=0.1)
    assert kept_for_backward(config, 4, 64, bf16=True, logits=False) < twice
    assert kept_for_backward(config, 4, 64) > twice + 4 * 64 * 61 * 4


def test_with_adapters_less_is_kept_than_all_weights_need_and_more_than_nothing():
    config = tiny_config("llama")
    full = kept_for_backward(config, 2, 64, logits=False)
    adapted = kept_for_backward(config, 2, 64, lora=LoraSettings(rank=2), logits=False)
    # inputs of frozen weights are not needed, those of their adapters are
    assert 0.5 * full < adapted < 1.6 * full
