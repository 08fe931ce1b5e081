"""Arithmetic of the planner against published tables and hand-worked sums."""

import math

import pytest

from pipeline import scaling
from pipeline.scaling import EPOCH, HOFFMANN, ModelSize, compute_optimal

# GPT-2 small: 12 layers, width 768, 50257 words, tied (Radford et al. 2019; 124,439,808 in the hub's copy)
GPT2 = ModelSize(
    parameters=124_439_808, embedding=38_597_376 + 786_432, multiplying=123_653_376, layers=12,
    hidden=768, attention_width=768, kv_width=768, vocabulary=50_257,
)  # fmt: skip

# arXiv 2203.15556, tables 3 and A3: parameters -> FLOPs of the three approaches
TABLES = {
    4e8: (1.92e19, 1.84e19, 2.21e19),
    1e10: (1.23e22, 1.32e22, 2.46e22),
    6.7e10: (5.76e23, 6.88e23, 1.71e24),
    1e12: (1.27e26, 1.59e26, 5.65e26),
}


@pytest.mark.parametrize("parameters", TABLES)
@pytest.mark.parametrize("approach", [0, 1, 2])
def test_the_three_approaches_give_their_published_tables(parameters, approach):
    found = compute_optimal(TABLES[parameters][approach])[approach]
    assert found.parameters == pytest.approx(
        parameters, rel=0.07
    )  # exponents are published with few digits


def test_chinchilla_itself_is_what_the_replication_recommends():
    # 70 B parameters and 1.4 T tokens are 5.88e23 FLOPs; arXiv 2404.10102, figure 5: about 20 tokens each
    found = compute_optimal(5.88e23)[3]
    assert found.parameters == pytest.approx(70e9, rel=0.1)
    assert 18 < found.tokens / found.parameters < 22


@pytest.mark.parametrize("law", [HOFFMANN, EPOCH])
def test_no_neighbour_of_the_optimum_has_a_lower_loss(law):
    budget = 1e21
    parameters, tokens = law.optimum(budget)
    assert 6 * parameters * tokens == pytest.approx(budget)
    best = law.loss(parameters, tokens)
    for factor in (0.9, 1.1):
        assert law.loss(parameters * factor, tokens / factor) > best


def test_the_published_law_gives_the_published_loss():
    # arXiv 2203.15556, eq. 10 for Chinchilla: 1.69 + 406.4 / 70e9^0.34 + 410.7 / 1.4e12^0.28 = 1.936
    law = scaling.Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
    assert law.loss(70e9, 1.4e12) == pytest.approx(1.936, abs=1e-3)


def test_training_takes_six_operations_a_weight_and_three_forwards_of_attention():
    assert scaling.train_flops(GPT2, 1000, 0) == 6 * 123_653_376 * 1000
    attention = scaling.train_flops(GPT2, 1000, 512) - scaling.train_flops(GPT2, 1000, 0)
    # PaLM, appendix B: 12 L H Q T a token, for attention to all of T
    assert attention == 12 * 12 * 768 * 512 * 1000


def test_a_cached_response_costs_what_reading_it_costs():
    one_by_one = sum(scaling.forward_flops(GPT2, 1, position + 0.5) for position in range(30))
    assert scaling.generation_flops(GPT2, 20, 10) == pytest.approx(one_by_one)


def test_frozen_weights_spare_their_own_gradients():
    lora = ModelSize(**{**GPT2.__dict__, "adapters": 1_000_000})
    full = 6 * 123_653_376
    assert scaling.train_flops(lora, 1, 0) == full - 2 * 123_653_376 + 6 * 1_000_000
    memory = scaling.training_memory(lora)
    assert (memory.gradients, memory.optimizer) == (4e6, 8e6)


def test_adamw_takes_sixteen_bytes_a_weight_and_sharding_divides_them():
    whole = scaling.training_memory(GPT2)
    assert whole.total == 16 * GPT2.parameters
    ddp = scaling.training_memory(GPT2, processes=4)
    assert ddp.total - whole.total == 4 * GPT2.parameters
    sharded = scaling.training_memory(GPT2, processes=4, sharded=True)
    assert sharded.weights + sharded.gradients + sharded.optimizer == 4 * GPT2.parameters


def test_the_cache_has_its_published_size():
    # arXiv 2309.06180, section 3: a token of OPT-13B takes 800 KB in 16 bits
    opt = ModelSize(**{**GPT2.__dict__, "layers": 40, "kv_width": 5120})
    assert scaling.kv_cache_bytes(opt, 1, 1, scaling.BF16_BYTES) == 800 * 1024


def test_hand_worked_total():
    parts = scaling.together(
        scaling.Memory(weights=1, exchange=5), scaling.Memory(weights=2, exchange=3, process=10)
    )
    assert (parts.weights, parts.exchange, parts.total) == (3, 5, 18)
    assert math.isclose(parts.to_row()["total"], 18)
