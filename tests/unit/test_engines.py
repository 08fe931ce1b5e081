"""The engines of this machine: the same responses and logprobs as our decode, the policy untouched."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from pipeline.errors import StageError
from pipeline.settings.rollout import RolloutSettings
from stages.engines import (
    ContinuousEngine,
    Engine,
    HfEngine,
    Sampling,
    make_engine,
    plain_weights,
    save_plain,
)
from stages.generation import Generated, generate
from stages.rollout import make_sequences, response_logprobs

EOS, PAD, V = 2, 0, 13
# one holds the end token, one the pad token
PROMPTS = [[5, 6, 7], [8] * 10, [9, EOS, 10], [PAD, 11, 12, 3]] * 2
SEEDS = list(range(len(PROMPTS)))
# what the engines ask of an Accelerator; the second one as on a GPU
FP32, BF16 = (
    SimpleNamespace(
        mixed_precision=kind, device=SimpleNamespace(type=device), autocast=contextlib.nullcontext
    )
    for kind, device in (("no", "cpu"), ("bf16", "cuda"))
)

both = pytest.mark.parametrize("kind", ["llama", "gpt2"])
on_this_machine = pytest.mark.parametrize("name", ["hf", "continuous"])


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> Iterator[None]:
    """Continuous batching collects garbage in every call: seconds, with all of torch imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tiny(kind: str, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    ids = {"vocab_size": V, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}
    ids["tie_word_embeddings"] = tied
    model: PreTrainedModel
    if kind == "llama":
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        model = LlamaForCausalLM(
            LlamaConfig(num_attention_heads=2, max_position_embeddings=64, **shape, **ids)
        )
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            # sharp distributions, so that a wrong position shows
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    # what a checkpoint's own generation settings may hold must not reach the rollouts
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.top_k = 1
    return model.eval()


def with_adapters(model: PreTrainedModel, kind: str) -> PeftModel:
    targets = ["q_proj", "down_proj"] if kind == "llama" else ["c_attn", "c_fc"]
    config = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    policy = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:  # they start at zero
                parameter.normal_(std=0.5)
    return policy.eval()


def sampling(temperature: float = 1.0, tokens: int = 12, rows: int = 8) -> Sampling:
    return Sampling(EOS, PAD, tokens, temperature, rows)


def engine(
    name: str, policy: PreTrainedModel | PeftModel, accelerator: object = FP32, **options: float
) -> Engine:
    settings = RolloutSettings(engine=name)  # type: ignore[arg-type]
    made = make_engine(settings, policy, sampling(**options), accelerator, Path("unused"))  # type: ignore[arg-type]
    made.update(policy)
    return made


def by_hand(model: torch.nn.Module, got: list[Generated], temperature: float) -> list[list[float]]:
    """The logprobs of the training forward."""
    batch = make_sequences(PROMPTS, [g.tokens for g in got], PAD, torch.device("cpu"))
    with torch.no_grad():
        logprobs_BR, _ = response_logprobs(model, batch, temperature)
    return [row[: len(g.tokens)].tolist() for row, g in zip(logprobs_BR, got, strict=True)]


def furthest(ours: list[list[float]], theirs: list[list[float]]) -> float:
    return max(
        abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


def assert_as_often(tokens: list[int], probability_V: torch.Tensor) -> None:
    """The tokens could be drawn with these probabilities (up to a factor), by a chi-square test."""
    seen_V = torch.bincount(torch.tensor(tokens), minlength=len(probability_V))
    expected_V = probability_V.double() / probability_V.double().sum() * len(tokens)
    assert not seen_V[expected_V == 0].any()
    rare_V = expected_V < 5  # the test holds for common classes: the others are one class
    seen = [*seen_V[~rare_V].tolist(), int(seen_V[rare_V].sum())]
    expected = [*expected_V[~rare_V].tolist(), float(expected_V[rare_V].sum())]
    classes = slice(None) if expected[-1] > 0 else slice(-1)
    assert chisquare(seen[classes], expected[classes]).pvalue > 1e-3


@both
def test_continuous_batching_is_as_greedy_as_our_decode(kind: str) -> None:
    policy = tiny(kind)
    ours = engine("hf", policy, temperature=0.0).generate(PROMPTS, SEEDS)
    theirs = engine("continuous", policy, temperature=0.0).generate(PROMPTS, SEEDS)
    assert [g.tokens for g in theirs] == [g.tokens for g in ours]
    assert [g.ended for g in theirs] == [g.ended for g in ours]
    assert furthest([g.logprobs for g in theirs], [g.logprobs for g in ours]) < 1e-5


@both
@on_this_machine
def test_logprobs_are_those_of_the_training_forward(name: str, kind: str) -> None:
    temperature, policy = 0.7, tiny(kind)
    made = engine(name, policy, temperature=temperature)
    got = made.generate(PROMPTS, SEEDS)
    assert made.same_logprobs
    assert furthest([g.logprobs for g in got], by_hand(policy, got, temperature)) < 1e-5


@both
@on_this_machine
def test_responses_end_at_the_end_token_or_at_the_limit(name: str, kind: str) -> None:
    policy = tiny(kind)
    got = [
        g
        for call in range(4)
        for g in engine(name, policy).generate(PROMPTS, [100 * call + s for s in SEEDS])
    ]
    assert {g.ended for g in got} == {True, False}, "this seed shows only one of the two ends"
    for g in got:
        assert len(g.logprobs) == len(g.tokens)
        assert EOS not in g.tokens[:-1]
        assert g.ended == (g.tokens[-1] == EOS)
        assert g.ended or len(g.tokens) == 12
    assert max(len(g.tokens) for g in got) == 12


@both
@on_this_machine
def test_tokens_are_sampled_as_often_as_they_are_probable(name: str, kind: str) -> None:
    policy = tiny(kind)
    prompt, count, temperature = [5, 6, 7], 1500, 1.5
    made = engine(name, policy, temperature=temperature, tokens=2, rows=512)
    got = made.generate([prompt] * count, list(range(count)))
    with torch.no_grad():
        first_V = (policy(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        second_V = torch.zeros(V)
        for token in range(V):
            if token != EOS:
                logits_V = policy(torch.tensor([[*prompt, token]])).logits[0, -1]
                second_V += first_V[token] * (logits_V / temperature).softmax(-1)
    assert_as_often([g.tokens[0] for g in got], first_V)
    assert_as_often([g.tokens[1] for g in got if len(g.tokens) > 1], second_V)


@both
@on_this_machine
@pytest.mark.parametrize("accelerator", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_rollout_does_not_touch_the_weights_that_are_trained(
    name: str, kind: str, accelerator: object
) -> None:
    policy = tiny(kind).train()
    before = {n: p.clone() for n, p in policy.state_dict().items()}
    attention = policy.config._attn_implementation
    random_state = torch.get_rng_state()
    made = engine(name, policy, accelerator)
    assert torch.equal(random_state, torch.get_rng_state()) or accelerator is BF16
    random_state = torch.get_rng_state()
    made.generate(PROMPTS, SEEDS)
    made.close()
    after = policy.state_dict()
    assert list(after) == list(before)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype == torch.float32
        assert torch.equal(after[key], tensor)
    assert policy.training
    assert policy.config._attn_implementation == attention
    assert torch.equal(random_state, torch.get_rng_state())


@both
@on_this_machine
def test_the_same_seeds_give_the_same_responses_and_others_give_others(
    name: str, kind: str
) -> None:
    made = engine(name, tiny(kind))
    first, again = (made.generate(PROMPTS, SEEDS) for _ in range(2))
    assert first == again
    assert first != made.generate(PROMPTS, [s + 100 for s in SEEDS])


@both
def test_results_do_not_depend_on_how_many_rows_are_decoded_at_once(kind: str) -> None:
    policy = tiny(kind)
    wide = engine("continuous", policy, temperature=0.0).generate(PROMPTS, SEEDS)
    narrow = engine("continuous", policy, temperature=0.0, rows=3).generate(PROMPTS, SEEDS)
    assert [g.tokens for g in narrow] == [g.tokens for g in wide]


@both
@on_this_machine
def test_a_new_policy_is_sampled_from_after_update(name: str, kind: str) -> None:
    policy, other = tiny(kind), tiny(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    made = engine(name, policy, temperature=0.0)
    made.update(other)
    expected = generate(
        other, PROMPTS, SEEDS, eos_id=EOS, pad_id=PAD, max_response_tokens=12, temperature=0
    )
    assert [g.tokens for g in made.generate(PROMPTS, SEEDS)] == [g.tokens for g in expected]


@both
def test_under_bf16_autocast_a_copy_decodes_that_follows_the_policy(kind: str) -> None:
    policy = tiny(kind)
    made = engine("continuous", policy, BF16)
    assert isinstance(made, ContinuousEngine)
    assert not made.same_logprobs
    assert not HfEngine(policy, sampling(), BF16).same_logprobs  # type: ignore[arg-type]
    copied = made._model
    assert copied is not policy
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.update(policy)
    for key, tensor in policy.state_dict().items():
        assert torch.equal(copied.state_dict()[key], tensor.bfloat16()), key
    got = made.generate(PROMPTS, SEEDS)
    gap = furthest([g.logprobs for g in got], by_hand(policy, got, 1.0))
    assert 0 < gap < 1.0


def test_values_come_with_our_decode_and_with_no_other() -> None:
    policy = tiny("llama")
    head = torch.nn.Linear(16, 1)
    for name, known in (("hf", True), ("continuous", False)):
        settings = RolloutSettings(engine=name)  # type: ignore[arg-type]
        made = make_engine(settings, policy, sampling(), FP32, Path("unused"), head)  # type: ignore[arg-type]
        got = made.generate(PROMPTS, SEEDS)
        assert [len(g.values) for g in got] == [len(g.tokens) * known for g in got]


@both
@on_this_machine
def test_a_rank_without_prompts_gets_no_responses(name: str, kind: str) -> None:
    assert engine(name, tiny(kind)).generate([], []) == []


@both
@on_this_machine
def test_adapters_are_sampled_from_and_stay_apart(name: str, kind: str) -> None:
    policy = with_adapters(tiny(kind), kind)
    before = {n: p.clone() for n, p in policy.state_dict().items()}
    merged = copy.deepcopy(policy).merge_and_unload()
    got = engine(name, policy, temperature=0.0).generate(PROMPTS, SEEDS)
    expected = engine("hf", merged, temperature=0.0).generate(PROMPTS, SEEDS)
    assert [g.tokens for g in got] == [g.tokens for g in expected]
    assert furthest([g.logprobs for g in got], [g.logprobs for g in expected]) < 1e-4
    assert all(torch.equal(policy.state_dict()[key], value) for key, value in before.items())


@both
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_saved_policy_is_a_plain_model_with_the_adapters_in_its_weights(
    kind: str, tied: bool, adapted: bool, tmp_path: Path
) -> None:
    plain = tiny(kind, tied)
    policy = with_adapters(plain, kind) if adapted else plain
    before = {n: p.clone() for n, p in policy.state_dict().items()}
    save_plain(policy, tmp_path / "weights")
    merged = copy.deepcopy(policy).merge_and_unload() if adapted else policy
    expected = merged.state_dict()
    assert list(plain_weights(policy)) == list(expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "weights").state_dict()
    assert list(loaded) == list(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(loaded[key], tensor, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(policy.state_dict()[key], value) for key, value in before.items())
    assert not list((tmp_path / "weights").glob("*adapter*"))


def test_a_failure_of_continuous_batching_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny("llama")
    made = engine("continuous", policy)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("kernel on fire")

    monkeypatch.setattr(policy, "forward", broken)
    with pytest.raises(StageError, match=r"0 of 8 responses: kernel on fire") as raised:
        made.generate(PROMPTS, SEEDS)
    assert "ppo.rollout.engine=hf" in str(raised.value)
    assert policy.config._attn_implementation == "sdpa"
