"""The ppo step whole, on a tiny run: what it steps, clips, rounds, repeats and resumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeline import worker
from pipeline.errors import Stopped
from pipeline.job import Inputs
from stages import ppo
from stages.experience import Experience
from stages.models import load_causal_lm, load_reward_model
from tests.tiny_models import KINDS, exact_logprob
from tests.tiny_ppo import make_inputs, make_job, rows_of, run_ppo

both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def inputs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Inputs]:
    made: dict[str, Inputs] = {}

    def inputs(kind: str) -> Inputs:
        if kind not in made:
            made[kind] = make_inputs(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return inputs


@contextmanager
def before_each_step(look: Callable[[list[Tensor]], None]) -> Iterator[None]:
    """Calls `look(parameters of the optimiser)` before every optimiser step, gradients in place."""

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        look([p for group in optimizer.param_groups for p in group["params"]])

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def same_result(one: Path, other: Path) -> bool:
    file = Path("artifact.tmp") / "model.safetensors"
    return (one / file).read_bytes() == (other / file).read_bytes()


# ---- steps ---------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_every_update_makes_epochs_times_minibatches_steps(
    inputs_of: Callable[[str], Inputs], tmp_path: Path, kind: str, critic: str
) -> None:
    """Of 5 prompts 4 are taken at a time: a pass over the data ends inside of updates 2, 3 and 4."""
    work, steps = tmp_path / "run", Counter[int]()

    def look(_: list[Tensor]) -> None:
        steps[len(rows_of(work))] += 1  # one row was logged before the first update

    with before_each_step(look):
        job = make_job(
            work, inputs_of(kind), critic=critic, updates=5, value_warmup_updates=0, rows_per_rank=1
        )
        run_ppo(job)
    # epochs x minibatches, of policy and of critic
    assert steps == dict.fromkeys(range(1, 6), 2 * 2 * 2)
    assert [row["epochs_done"] for row in rows_of(work)[1:]] == [2] * 5


def test_a_far_move_ends_the_update_after_the_epoch(
    inputs_of: Callable[[str], Inputs], tmp_path: Path
) -> None:
    steps: list[int] = []
    job = make_job(tmp_path / "run", inputs_of("llama"), max_update_kl=1e-9, epochs=4)
    with before_each_step(lambda parameters: steps.append(len(parameters))):
        run_ppo(job)
    # in the first minibatch of an update nothing has moved; in its second something has
    assert [row["epochs_done"] for row in rows_of(tmp_path / "run")[1:]] == [1, 1, 1]
    assert len(steps) == 3 * 1 * 2 * 2


@pytest.mark.timeout(120)
def test_fewer_prompts_than_a_batch_are_used_more_than_once(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, "llama", train=3, validation=1)
    job = make_job(tmp_path / "run", inputs, prompts_per_step=8, minibatch_rows=4)
    run_ppo(job)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [0, 1, 2, 3]


@both
def test_a_learning_rate_of_nothing_changes_nothing(
    inputs_of: Callable[[str], Inputs], tmp_path: Path, kind: str
) -> None:
    inputs = inputs_of(kind)
    run_ppo(make_job(tmp_path / "run", inputs, lr=1e-30))
    start, *rows = rows_of(tmp_path / "run")
    for row in rows:
        assert row["ratio_max"] == pytest.approx(1.0, abs=1e-5)
        assert row["clip_fraction"] == 0
        assert row["approx_kl"] == pytest.approx(0.0, abs=1e-7)
        assert row["kl"] == pytest.approx(0.0, abs=1e-5)
        assert row["kl_k3"] == pytest.approx(0.0, abs=1e-9)
        assert row["policy_grad_norm"] > 0.1
    assert rows[-1]["validation_reward"] == start["validation_reward"]
    assert inputs["model"].path is not None
    before = load_file(inputs["model"].path / "model.safetensors")
    after = load_file(tmp_path / "run" / "artifact.tmp" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---- the same again ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(
    inputs_of: Callable[[str], Inputs], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """An uninterrupted run with every kind of state: two optimisers and an adaptive coefficient."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("whole") / "run"
            run_ppo(make_job(made[kind], inputs_of(kind), **ADAPTIVE))
        return made[kind]

    return run


ADAPTIVE = {"kl_control": "adaptive", "kl_target": 0.2, "kl_horizon": 16}


@both
def test_the_same_seed_gives_the_same_bits(
    inputs_of: Callable[[str], Inputs], whole: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    # whatever ran before in this process
    torch.manual_seed(torch.seed())
    run_ppo(make_job(tmp_path / "again", inputs_of(kind), **ADAPTIVE))
    assert rows_of(tmp_path / "again") == rows_of(whole(kind))
    assert same_result(tmp_path / "again", whole(kind))
    run_ppo(make_job(tmp_path / "other", inputs_of(kind), seed=2, **ADAPTIVE))
    assert rows_of(tmp_path / "other") != rows_of(whole(kind))


@both
@pytest.mark.parametrize("stop_before", [0, 1, 2])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    inputs_of: Callable[[str], Inputs],
    whole: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    stop_before: int,
) -> None:
    whole(kind)  # made now if no test before needed it: not under the patch
    job = make_job(tmp_path / "run", inputs_of(kind), **ADAPTIVE)
    asked = iter([False] * stop_before + [True])
    monkeypatch.setattr(worker, "stop_requested", lambda: next(asked))
    with pytest.raises(Stopped):
        run_ppo(job)
    assert rows_of(tmp_path / "run") == rows_of(whole(kind))[: stop_before + 1]
    monkeypatch.setattr(worker, "stop_requested", lambda: False)
    # a process of its own would know nothing of this one
    torch.manual_seed(torch.seed())
    run_ppo(job)
    assert rows_of(tmp_path / "run") == rows_of(whole(kind))
    assert same_result(tmp_path / "run", whole(kind))


def test_the_adaptive_coefficient_follows_the_measured_kl(whole: Callable[[str], Path]) -> None:
    rows = rows_of(whole("llama"))[1:]
    coefs, expected = [row["kl_coef"] for row in rows], [0.05]
    for row in rows[:-1]:
        # Ziegler et al. 2019, section 2.2, with the target of 0.2 nats a response
        error = max(-0.2, min(0.2, row["kl"] / 0.2 - 1))
        expected.append(expected[-1] * (1 + error * 4 / 16))
    assert coefs == pytest.approx(expected, rel=1e-12)
    assert len(set(coefs)) == 3


# ---- rollouts and gradients -----------------------------------------------------------------------------


def first_gradients(job: Any) -> list[Tensor]:
    """Flat gradients of policy and critic at the first optimiser step."""
    found: list[Tensor] = []

    def look(parameters: list[Tensor]) -> None:
        flat = [p.grad.flatten() for p in parameters if p.grad is not None]
        found.append(torch.cat(flat).clone())

    with before_each_step(look):
        run_ppo(job)
    return found[:2]


def watch_experience(monkeypatch: pytest.MonkeyPatch) -> list[Experience]:
    """What every update of the runs to come learns from."""
    seen: list[Experience] = []
    original = ppo.to_experience

    def to_experience(*args: Any) -> Experience:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(ppo, "to_experience", to_experience)
    return seen


@both
def test_a_rollout_is_what_each_row_is_alone(
    inputs_of: Callable[[str], Inputs],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Logprobs, values, and the score of the last token with the penalty of a response cut short."""
    seen, inputs = watch_experience(monkeypatch), inputs_of(kind)
    changes = {"missing_eos_penalty": 0.7, "score_clip": 0.5}
    run_ppo(make_job(tmp_path / "run", inputs, updates=1, prompts_per_step=8, **changes))
    rollout, policy = seen[0].rollout, load_causal_lm(inputs["model"])
    reward = load_reward_model(inputs["reward_model"])
    end = policy.config.eos_token_id
    assert policy.config.pad_token_id != end
    ended = rollout.ended_B.tolist()
    assert 0 < sum(ended) < len(ended), "both kinds of row are needed"
    batch = rollout.batch
    clipped = 0
    for b, tokens in enumerate(batch.tokens_BT.tolist()):
        P, R = int(batch.prompt_tokens_B[b]), int(batch.response_tokens_B[b])
        prompt, response = tokens[:P], tokens[P : P + R]
        # the end token belongs to the response, and only there
        assert (response[-1] == end) == ended[b]
        assert end not in response[:-1]
        assert R == 10 or ended[b]
        row = prompt + response + ([] if ended[b] else [end])
        with torch.no_grad():
            hidden_TH = reward.base_model(input_ids=torch.tensor([row]))[0][0]
            raw_T = reward.score(hidden_TH).squeeze(-1)
            logprobs = [
                float(exact_logprob(policy, prompt + response[:r], [response[r]], 0.8))
                for r in range(R)
            ]
        score = (float(raw_T[-1]) - 0.1) / 0.5
        clipped += abs(score) > 0.5
        expected = max(-0.5, min(0.5, score)) - 0.7 * (not ended[b])
        assert float(rollout.scores_B[b]) == pytest.approx(expected, abs=1e-4)
        assert rollout.logprobs_BR[b, :R].tolist() == pytest.approx(logprobs, abs=1e-4)
        assert rollout.ref_logprobs_BR[b, :R].tolist() == pytest.approx(logprobs, abs=1e-4)
        values = [(float(raw_T[P - 1 + r]) - 0.1) / 0.5 for r in range(R)]
        assert rollout.values_BR[b, :R].tolist() == pytest.approx(values, abs=1e-4)
        for x_BR in (rollout.logprobs_BR, rollout.ref_logprobs_BR, rollout.values_BR):
            assert x_BR[b, R:].abs().sum() == 0
    assert clipped, "some score must be clipped"


ONE_STEP = {"updates": 1, "epochs": 1, "minibatch_rows": 4, "max_grad_norm": 1e9}


@both
def test_padding_changes_neither_gradients_nor_metrics(
    inputs_of: Callable[[str], Inputs], tmp_path: Path, kind: str
) -> None:
    """With one row at a time there is no padding at all; with all at once there is."""
    gradients, rows = [], []
    for rows_per_rank in (1, 3, 64):
        work = tmp_path / str(rows_per_rank)
        job = make_job(work, inputs_of(kind), rows_per_rank=rows_per_rank, **ONE_STEP)
        gradients.append(first_gradients(job))
        rows.append(rows_of(work))
    assert 2 < rows[0][1]["response_tokens"] < 10, "lengths must differ for this to prove anything"
    for other, other_rows in zip(gradients[1:], rows[1:], strict=True):
        for one, two in zip(gradients[0], other, strict=True):
            assert (one - two).norm() / one.norm() < 1e-5
        for row, other_row in zip(rows[0], other_rows, strict=True):
            assert row == pytest.approx(other_row, rel=1e-4, abs=1e-6)


@both
def test_the_first_gradient_is_that_of_the_definition(
    inputs_of: Callable[[str], Inputs],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """- mean over all tokens of A grad log p, and of (V - return) grad V: row by row, by hand."""
    seen = watch_experience(monkeypatch)
    inputs = inputs_of(kind)
    found = first_gradients(make_job(tmp_path / "run", inputs, rows_per_rank=3, **ONE_STEP))
    policy, critic = load_causal_lm(inputs["model"]), load_reward_model(inputs["reward_model"])
    batch = seen[0].rollout.batch
    policy_loss = value_loss = torch.zeros(())
    for b, tokens in enumerate(batch.tokens_BT.tolist()):
        P, R = int(batch.prompt_tokens_B[b]), int(batch.response_tokens_B[b])
        prompt, response = tokens[:P], tokens[P : P + R]
        hidden_TH = critic.base_model(input_ids=torch.tensor([prompt + response]))[0][0]
        for r in range(R):
            logprob = exact_logprob(policy, prompt + response[:r], [response[r]], 0.8)
            policy_loss = policy_loss - logprob * seen[0].advantages_BR[b, r]
            # the raw score of the state before the token, normalised as the scores are
            value = (critic.score(hidden_TH[P - 1 + r]).squeeze() - 0.1) / 0.5
            value_loss = value_loss + 0.5 * (value - seen[0].returns_BR[b, r]) ** 2
    count = int(batch.response_tokens_B.sum())
    for loss, model, gradient in (
        (policy_loss, policy, found[0]),
        (value_loss, critic, found[1]),
    ):
        model.zero_grad()
        (loss / count).backward()
        assert gradient.norm() == pytest.approx(norm_of(model), rel=1e-4)


def norm_of(model: nn.Module) -> float:
    return (
        float(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)) ** 0.5
    )


# ---- clipping and precision ----------------------------------------------------------------


@both
def test_gradients_are_clipped_before_every_step(
    inputs_of: Callable[[str], Inputs], tmp_path: Path, kind: str
) -> None:
    norms: list[float] = []

    def look(parameters: list[Tensor]) -> None:
        squares = [float(p.grad.square().sum()) for p in parameters if p.grad is not None]
        norms.append(sum(squares) ** 0.5)

    with before_each_step(look):
        run_ppo(make_job(tmp_path / "run", inputs_of(kind), max_grad_norm=1e-3))
    assert len(norms) == 3 * 2 * 2 * 2
    assert max(norms) <= 1e-3 * (1 + 1e-4)
    for row in rows_of(tmp_path / "run")[1:]:
        # the log tells what was there before
        assert row["policy_grad_norm"] > 0.1
        assert row["value_grad_norm"] > 0.1


@both
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_that_was_asked_for_is_that_of_the_training_forward(
    inputs_of: Callable[[str], Inputs], tmp_path: Path, kind: str, precision: str
) -> None:
    computed: Counter[torch.dtype] = Counter()
    scalar: Counter[torch.dtype] = Counter()
    kept: Counter[torch.dtype] = Counter()

    def forward(module: nn.Module, _: Any, output: Any) -> None:
        # the matrices of the blocks; GPT-2 has a class of its own for them
        if torch.is_grad_enabled() and type(module).__name__ in ("Linear", "Conv1D"):
            # the critic's one number for each token stays in full
            (scalar if output.shape[-1] == 1 else computed)[output.dtype] += 1

    def look(parameters: list[Tensor]) -> None:
        kept.update(p.dtype for p in parameters)
        kept.update(p.grad.dtype for p in parameters if p.grad is not None)

    handle = register_module_forward_hook(forward)
    try:
        with before_each_step(look):
            job = make_job(tmp_path / "run", inputs_of(kind), precision, lr=1e-6)
            run_ppo(job)
    finally:
        handle.remove()
    wanted = torch.bfloat16 if precision == "bf16" else torch.float32
    assert set(computed) == {wanted}
    assert set(scalar) == {torch.float32}
    # master weights and gradients stay as they are, after rollouts too
    assert set(kept) == {torch.float32}
    weights = load_file(tmp_path / "run" / "artifact.tmp" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    optimizer = tmp_path / "run" / "checkpoints" / "step-00000002" / "policy_optimizer.safetensors"
    assert {tensor.dtype for tensor in load_file(optimizer).values()} == {torch.float32}
    # the ratio of an unchanged policy: exact in fp32, within a bf16 forward's rounding otherwise
    limit = 0.02 if precision == "bf16" else 1e-6
    assert all(row["approx_kl"] < limit for row in rows_of(tmp_path / "run")[1:])
