"""The vLLM engine against a stand-in server: right answers, and every wrong one that we thought of."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from pipeline.errors import EXIT_FAILED, StageError
from pipeline.settings.rollout import RolloutSettings
from stages import vllm_client
from stages.engines import Engine, Sampling, make_engine
from stages.generation import generate
from tests.fake_vllm import FakeVllm, serve
from tests.unit.test_engines import (
    EOS,
    PAD,
    PROMPTS,
    SEEDS,
    assert_as_often,
    by_hand,
    furthest,
    tiny,
    with_adapters,
)

MAX_TOKENS = 12
both = pytest.mark.parametrize("kind", ["llama", "gpt2"])


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_client, "_BACKOFF_SECONDS", 0.01)


@pytest.fixture
def server() -> Iterator[FakeVllm]:
    with serve(tiny("llama"), EOS, PAD) as running:
        yield running


class Rank:
    """What the engine needs of an Accelerator."""

    def __init__(self, rank: int = 0) -> None:
        self.is_main_process = rank == 0
        self.mixed_precision = "no"
        self.autocast = contextlib.nullcontext
        self.device = torch.device("cpu")
        self.waits = 0

    def wait_for_everyone(self) -> None:
        self.waits += 1


def connect(
    url: str, policy: torch.nn.Module, folder: Path, rank: Rank | None = None, **options: float
) -> Engine:
    temperature = options.pop("temperature", 1.0)
    sampling = Sampling(EOS, PAD, int(options.pop("tokens", MAX_TOKENS)), temperature, 8)
    settings = RolloutSettings(engine="vllm", vllm_url=url, **options)  # type: ignore[arg-type]
    return make_engine(settings, policy, sampling, rank or Rank(), folder)  # type: ignore[arg-type]


# ---- what it does --------------------------------------------------------------------------


@both
@pytest.mark.parametrize("adapted", [False, True])
def test_the_server_samples_from_the_policy_of_the_last_update(
    kind: str, adapted: bool, tmp_path: Path
) -> None:
    policy = with_adapters(tiny(kind), kind) if adapted else tiny(kind)
    # it starts with other weights
    other = tiny(kind)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    with serve(other, EOS, PAD) as server:
        engine = connect(server.url, policy, tmp_path)
        assert not engine.same_logprobs
        for _ in range(2):
            engine.update(policy)
            got = engine.generate(PROMPTS, SEEDS)
            expected = generate(
                policy, PROMPTS, SEEDS, eos_id=EOS, pad_id=PAD, max_response_tokens=MAX_TOKENS
            )
            assert [g.tokens for g in got] == [g.tokens for g in expected]
            assert [g.ended for g in got] == [g.ended for g in expected]
            assert furthest([g.logprobs for g in got], by_hand(policy, got, 1.0)) < 1e-4
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
        assert server.weights == 2
        engine.close()
        engine.close()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_every_request_switches_off_what_would_bend_the_distribution(
    server: FakeVllm, tmp_path: Path
) -> None:
    policy = tiny("llama")
    engine = connect(server.url, policy, tmp_path, temperature=0.7)
    engine.update(policy)
    engine.generate(PROMPTS, SEEDS)
    requests = server.asked("/v1/completions")
    # several prompts in one request would share one seed
    assert sorted(r["seed"] for r in requests) == SEEDS
    assert sorted(r["prompt"] for r in requests) == sorted(PROMPTS)
    wanted = {
        "model": "tiny",
        "temperature": 0.7,
        "max_tokens": MAX_TOKENS,
        "n": 1,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": [EOS],
        "logprobs": 0,
        "return_token_ids": True,
        "add_special_tokens": False,
    }
    assert all({k: r[k] for k in wanted} == wanted for r in requests)


def test_tokens_are_sampled_as_often_as_they_are_probable(server: FakeVllm, tmp_path: Path) -> None:
    policy = tiny("llama")
    engine = connect(server.url, policy, tmp_path, temperature=1.5, tokens=1)
    engine.update(policy)
    got = engine.generate([PROMPTS[0]] * 300, list(range(300)))
    with torch.no_grad():
        expected_V = (policy(torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.5).softmax(-1)
    assert_as_often([g.tokens[0] for g in got], expected_V)


def test_weights_go_through_the_folder_of_the_settings_under_a_new_name_each_time(
    server: FakeVllm, tmp_path: Path
) -> None:
    policy = tiny("llama")
    shared = tmp_path / "shared"
    engine = connect(server.url, policy, tmp_path / "own", vllm_weights_dir=str(shared))  # type: ignore[arg-type]
    engine.update(policy)
    engine.update(policy)
    paths = [call["kwargs"]["weights_path"] for call in server.asked("/collective_rpc")]
    assert len(set(paths)) == 2
    assert all(Path(path).is_relative_to(shared) for path in paths)
    assert not (tmp_path / "own").exists()
    assert not list(shared.rglob("*.safetensors")), "the last weights were not deleted"


def test_rank_0_hands_over_the_weights_and_the_others_wait(
    server: FakeVllm, tmp_path: Path
) -> None:
    policy, ranks = tiny("llama"), [Rank(0), Rank(1)]
    engines = [connect(server.url, policy, tmp_path, rank) for rank in ranks]
    for engine in engines:
        engine.update(policy)
    assert server.weights == 1
    assert [rank.waits for rank in ranks] == [1, 1]
    assert engines[1].generate([], []) == []
    assert len(engines[1].generate(PROMPTS[:2], SEEDS[:2])) == 2


def test_a_server_that_was_not_given_the_policy_is_not_asked(
    server: FakeVllm, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="before the first update"):
        connect(server.url, tiny("llama"), tmp_path).generate(PROMPTS, SEEDS)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://host/v1", "http://", "http://host:x"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        RolloutSettings(vllm_url=url)


def test_a_slash_at_the_end_of_the_address_is_no_matter() -> None:
    assert RolloutSettings(vllm_url="http://host:1/").vllm_url == "http://host:1"


# ---- what goes wrong -----------------------------------------------------------------------


def failing(call: Callable[..., object], *arguments: object) -> str:
    """The error that people see."""
    with pytest.raises(StageError) as raised:
        call(*arguments)
    assert raised.value.exit_code == EXIT_FAILED
    return str(raised.value)


def ready(server: FakeVllm, tmp_path: Path, **options: float) -> Engine:
    policy = tiny("llama")
    engine = connect(server.url, policy, tmp_path, **options)
    engine.update(policy)
    return engine


def test_no_server_is_said_at_once_with_how_to_start_one(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(StageError) as raised:
        connect(url, tiny("llama"), tmp_path)
    assert raised.value.exit_code == EXIT_FAILED
    assert url in str(raised.value)
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve" in str(raised.value)


def test_a_server_that_dies_between_two_calls_is_said(tmp_path: Path) -> None:
    with serve(tiny("llama"), EOS, PAD) as server:
        engine = ready(server, tmp_path)
    text = failing(engine.generate, PROMPTS, SEEDS)
    assert f"{server.url}/v1/completions" in text
    assert "vllm serve" in text


@pytest.mark.parametrize("route", ["/v1/completions", "/collective_rpc"])
def test_a_slow_server_is_given_up_after_the_timeout_and_not_asked_again(
    server: FakeVllm, tmp_path: Path, route: str
) -> None:
    engine = ready(server, tmp_path, vllm_timeout_seconds=0.5, vllm_requests=2)
    before = len(server.asked(route))
    server.fault = f"slow {route}"
    call = (engine.update, tiny("llama"))
    if route == "/v1/completions":
        call = (engine.generate, PROMPTS, SEEDS)  # type: ignore[assignment]
    started = time.monotonic()
    text = failing(*call)
    assert time.monotonic() - started < 2.5
    assert f"{server.url}{route}: no answer within 0.5 s" in text
    assert "ppo.rollout.vllm_timeout_seconds" in text
    assert len(server.asked(route)) - before <= 2, "asked again"


def test_a_busy_server_is_asked_again_but_not_for_ever(server: FakeVllm, tmp_path: Path) -> None:
    engine = ready(server, tmp_path, vllm_requests=1)
    server.fault, server.failures_left = "busy /v1/completions", 2
    assert len(engine.generate(PROMPTS[:1], [0])) == 1
    before = len(server.asked("/v1/completions"))
    server.failures_left = 10**9
    assert "status 503" in failing(engine.generate, PROMPTS, SEEDS)
    assert len(server.asked("/v1/completions")) - before == 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no choices", "is not one choice with token ids"),
        ("text only", "is not one choice with token ids"),
        ("not json /v1/completions", "is not JSON"),
        ("outside", "outside the vocabulary of 13: [1000000]"),
        ("no end", "ends after 1 tokens without the end token 2"),
        ("past the end", "goes on after the end token 2"),
        ("too long", "has 13 tokens, not 1 to 12"),
        ("too few logprobs", "logprobs for"),
        ("no numbers", "logprobs that are no logprobs"),
        ("positive", "logprobs that are no logprobs"),
        ("missing /v1/completions", "status 404"),
    ],
)
def test_a_wrong_answer_never_reaches_the_training(
    server: FakeVllm, tmp_path: Path, fault: str, said: str
) -> None:
    engine = ready(server, tmp_path)
    server.fault = fault
    text = failing(engine.generate, PROMPTS, SEEDS)
    assert said in text
    assert f"{server.url}/v1/completions" in text


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing /server_info", "VLLM_SERVER_DEV_MODE=1"),
        ("raw", "raw_logprobs, which ignore the temperature"),
        ("not json /v1/models", "is not JSON"),
    ],
)
def test_a_server_started_otherwise_is_refused_before_anything_is_spent(
    server: FakeVllm, tmp_path: Path, fault: str, said: str
) -> None:
    server.fault = fault
    with pytest.raises(StageError) as raised:
        connect(server.url, tiny("llama"), tmp_path)
    assert said in str(raised.value)
    assert server.url in str(raised.value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing /collective_rpc", "VLLM_SERVER_DEV_MODE=1"),
        ("cache kept", "keeps its prefix cache"),
    ],
)
def test_weights_that_did_not_arrive_stop_the_run(
    server: FakeVllm, tmp_path: Path, fault: str, said: str
) -> None:
    engine = ready(server, tmp_path)
    server.fault = fault
    assert said in failing(engine.update, tiny("llama"))


def test_a_folder_that_the_server_does_not_see_is_said(
    server: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ready(server, tmp_path)
    monkeypatch.setattr(
        "stages.engines.save_plain", lambda policy, folder: folder.mkdir(parents=True)
    )
    text = failing(engine.update, tiny("llama"))
    assert "cannot find model weights" in text
    assert "ppo.rollout.vllm_weights_dir" in text


def test_a_server_that_only_says_that_it_took_the_weights_is_found_out(
    server: FakeVllm, tmp_path: Path
) -> None:
    engine = ready(server, tmp_path)
    engine.generate(PROMPTS, SEEDS)
    server.fault = "weights ignored"
    other = tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    engine.update(other)
    text = failing(engine.generate, PROMPTS, SEEDS)
    assert "nats a token from the policy's" in text
    assert server.url in text


def test_a_prompt_that_the_server_cannot_hold_is_said(server: FakeVllm, tmp_path: Path) -> None:
    engine = ready(server, tmp_path)
    with pytest.raises(StageError, match=r"prompt \(60 tokens\).*exceed the server's 64") as raised:
        engine.generate([[5] * 60], [0])
    assert "--max-model-len" in str(raised.value)


def test_the_accelerator_of_these_tests_is_like_the_real_one() -> None:
    from accelerate import Accelerator

    for name in vars(Rank()).keys() - {"waits"} | {"wait_for_everyone"}:
        assert hasattr(Accelerator(cpu=True), name)
