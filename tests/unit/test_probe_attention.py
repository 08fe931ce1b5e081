"""What a head looks at, recomputed from the projections by hand, against the model's own attention."""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

from stages import probe_attention

IDS = [1, 5, 9, 33, 9, 60, 17, 8]


def made(config, sharpness=4.0):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(sharpness if parameter.dim() > 1 else 1.0)
    return model


def llama(**more):
    """Four heads on two groups of keys."""
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaConfig(**shape | more)


SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": lambda: llama(),
    "gpt2": lambda: GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt2 scaled by layer": lambda: GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, scale_attn_by_inverse_layer_idx=True
    ),
    "mistral with a window": lambda: MistralConfig(**SHAPE, sliding_window=3),
    "gemma2 with a soft cap": lambda: Gemma2Config(
        **SHAPE, attn_logit_softcapping=2.0, query_pre_attn_scalar=8, sliding_window=3
    ),
    "gpt-oss with sinks": lambda: GptOssConfig(
        **SHAPE, num_local_experts=2, num_experts_per_tok=1, sliding_window=4
    ),
}


def own_attention(model, ids):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False)
    return [weights[0] for weights in found.attentions]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_and_the_arithmetic_by_hand_are_the_models_own(name):
    model = made(CONFIGS[name]())
    before = model.config._attn_implementation
    found = probe_attention.look(model, IDS)
    assert model.config._attn_implementation == before
    expected = own_attention(model, IDS)
    assert len(found) == len(expected) == len(found.layers) == 2
    for index, weights_ATT in enumerate(expected):
        torch.testing.assert_close(found.weights_of(index), weights_ATT, atol=1e-5, rtol=1e-4)
        for head in range(4):
            for at in (0, 4, 7):
                row = probe_attention.by_hand(found.layers[index], head, at, 0)["rows"]
                by_hand = torch.tensor([part["weight"] for part in row])
                torch.testing.assert_close(
                    by_hand, weights_ATT[head, at], atol=1e-5, rtol=1e-4, check_dtype=False
                )
                hidden = [i for i, part in enumerate(row) if part["logit"] is None]
                assert set(hidden) >= set(range(at + 1, len(IDS)))


def test_queries_and_keys_of_a_llama_are_projected_turned_and_grouped_as_by_hand():
    """The second way: numbers from the layer's matrices, rotary angles written out."""
    config = llama()
    model = made(config)
    found = probe_attention.look(model, IDS)
    size = config.hidden_size // 4
    theta = config.rope_parameters["rope_theta"]

    def turned(vector, position):
        half = size // 2
        result = [0.0] * size
        for i in range(half):
            angle = position * theta ** (-2 * i / size)
            a, b = vector[i], vector[i + half]
            result[i] = a * math.cos(angle) - b * math.sin(angle)
            result[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return result

    with torch.no_grad():
        x_TH = model.model.embed_tokens(torch.tensor(IDS))
        normed_TH = model.model.layers[0].input_layernorm(x_TH)
        attention = model.model.layers[0].self_attn
        query = (normed_TH @ attention.q_proj.weight.T).view(len(IDS), 4, size)
        key = (normed_TH @ attention.k_proj.weight.T).view(len(IDS), 2, size)
    expected = own_attention(model, IDS)[0]
    for head in range(4):
        group = head // 2
        for at in range(len(IDS)):
            q = turned(query[at, head].tolist(), at)
            logits = []
            for to in range(at + 1):
                k = turned(key[to, group].tolist(), to)
                logits.append(sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(size))
            top = max(logits)
            exps = [math.exp(x - top) for x in logits]
            weights = [e / sum(exps) for e in exps] + [0.0] * (len(IDS) - at - 1)
            assert weights == pytest.approx(expected[head, at].tolist(), abs=1e-5)
            told = probe_attention.by_hand(found.layers[0], head, at, at)
            assert told["group"] == group
            assert told["query"] == pytest.approx(q, abs=1e-4)
            assert told["scaling"] == pytest.approx(1 / math.sqrt(size))
            assert [row["scaled"] for row in told["rows"][: at + 1]] == pytest.approx(
                logits, abs=1e-4
            )


def test_the_products_of_a_pair_add_up_to_its_score():
    found = probe_attention.look(made(llama()), IDS)
    told = probe_attention.by_hand(found.layers[1], 3, 6, 2)
    assert sum(told["products"]) == pytest.approx(told["rows"][2]["product"])
    assert told["rows"][2]["scaled"] == pytest.approx(sum(told["products"]) / math.sqrt(8))
    assert sum(row["weight"] for row in told["rows"]) == pytest.approx(1)


def test_the_page_begins_with_the_head_that_looks_hardest_further_back():
    found = probe_attention.look(made(llama()), IDS)
    for at in range(len(IDS)):
        layer, head = probe_attention.hardest(found, at)
        places = range(1, at - 1) if at > 2 else range(1, at)
        every = [
            (float(found.weights_of(i)[a, at, to]), i, a)
            for i in range(2)
            for a in range(4)
            for to in places
        ]
        assert (layer, head) == (max(every)[1:] if every else (0, 0))
        row = found.weights_of(layer)[head, at]
        to = probe_attention.most_seen(row, at)
        assert to == (max(range(1, at), key=lambda i, row=row: float(row[i])) if at > 1 else 0)


def test_looking_changes_nothing_of_what_the_model_says():
    model = made(llama())
    with torch.no_grad():
        before = model(input_ids=torch.tensor([IDS])).logits
        probe_attention.look(model, IDS)
        assert torch.equal(model(input_ids=torch.tensor([IDS])).logits, before)


def test_a_model_without_attention_has_none():
    model = made(MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert len(probe_attention.look(model, IDS)) == 0
