"""ppo_same, ppo_fast, ppo_fast_bf16: one whole PPO update of ours against PPOTrainer of TRL 1.12.0.

    python -m tests.benchmarks.ppo same
    python -m tests.benchmarks.ppo fast [--bf16]

32 rollouts of prescribed lengths, 4 epochs of one optimiser step, a 7 M Llama. An update is all of
it: decoding, scores, reference logprobs, values, advantages, four epochs of losses and steps.

same: the same algorithm, a critic of its own. fast: the critic is a head on the policy's trunk and
its values come with the decoding (`ppo.critic=shared`), which is another algorithm: policy and critic
share features. Do not quote it as like for like.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

from tests.benchmarks import peers

if __name__ == "__main__":
    # before transformers is imported
    peers.restart_with("trl==1.12.0")

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pipeline.records import Prompt
from pipeline.settings.ppo import PpoSettings
from stages import critics
from stages.attention import use_attention_in_fp32
from stages.common import adamw
from stages.engines import HfEngine, Sampling
from stages.experience import Models, roll_out, to_experience
from stages.models import backbone_and_head
from stages.ppo import _Loop
from stages.prompts import PromptIds
from stages.rewards import RewardModel, Rewards
from tests.benchmarks import common, limits, workload
from tests.benchmarks.workload import EOS, MAX_RESPONSE, PAD

_ROWS = 32
_EPOCHS = 4
_PROMPTS = workload.prompts(_ROWS)
_LENGTHS = workload.response_lengths(_ROWS)


def make_loop(critic: str, precision: str = "no", **settings: Any) -> tuple[_Loop, Models]:
    """The loop of the ppo stage on random models, without prompts, files or validation."""
    AcceleratorState._reset_state()
    accelerator: Any = Accelerator(mixed_precision=precision, cpu=True)
    if precision == "bf16":
        # the state behind an Accelerator is one for the process, and the peer's says fp32
        accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    # as common.start does
    use_attention_in_fp32(precision == "bf16")
    ppo = PpoSettings(
        **{
            "updates": 1000,
            "prompts_per_step": _ROWS,
            "epochs": _EPOCHS,
            "max_update_kl": 1e9,
            "max_response_tokens": MAX_RESPONSE,
            "value_warmup_updates": 0,
            **settings,
        }
    )
    policy = workload.small_llama()
    reference, reward = workload.small_llama(), workload.scalar_llama(1)
    if critic == "shared":
        agent = critics.shared(policy, ppo.temperature)
    else:
        value = critics.ValuePass(*backbone_and_head(workload.scalar_llama(2)))
        agent = critics.separate(policy, value, ppo.temperature)
    agent.passes = [accelerator.prepare_model(part) for part in agent.passes]
    sampling = Sampling(EOS, PAD, MAX_RESPONSE, ppo.temperature, ppo.rows_per_rank)
    for model in (reference, reward):
        model.requires_grad_(False)
    models = Models(
        agent,
        HfEngine(policy, sampling, accelerator, agent.value_head),
        reference,
        Rewards([RewardModel("reward_model", 1.0, *backbone_and_head(reward), 0.0, 1.0)], {}),
        None,
        SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS),  # type: ignore[arg-type]
    )
    loop: Any = object.__new__(_Loop)
    loop.settings = SimpleNamespace(run=SimpleNamespace(seed=0))
    loop.ppo, loop.models, loop.agent, loop.ptx = ppo, models, agent, None
    loop.accelerator = accelerator
    loop.out = SimpleNamespace(cost={"flops": 0.0, "tokens": 0})
    loop.minibatch_rows, loop.num_minibatches, loop.steps_per_update = _ROWS, 1, ppo.epochs
    loop.warmup_updates, loop.update = 0, 500
    loop.policy_parameters = agent.policy_parameters()
    loop.value_parameters = agent.value_parameters()
    loop.policy_optimizer = adamw(loop.policy_parameters.values(), ppo.lr, 0.0, eps=1e-5)
    loop.value_optimizer = adamw(loop.value_parameters.values(), ppo.lr, 0.0, eps=1e-5)
    return loop, models


def ours(critic: str, precision: str) -> common.Step:
    loop, models = make_loop(critic, precision)
    prompts = [
        PromptIds(Prompt(({"role": "user", "content": str(i)},)), ids)
        for i, ids in enumerate(_PROMPTS)
    ]
    lengths = dict(enumerate(_LENGTHS))

    def update() -> None:
        with workload.prescribed(lengths):
            rollout = roll_out(models, prompts, list(range(_ROWS)), loop.ppo, loop.accelerator)
        assert sorted(rollout.batch.response_tokens_B.tolist()) == sorted(_LENGTHS)
        row = loop._optimise(to_experience(rollout, 0.05, loop.ppo))
        assert row["epochs_done"] == _EPOCHS

    return update


def peer() -> common.Step:
    from tests.benchmarks.ppo_peer import make_peer

    # TRL 1.12 asks for no precision of its own: it would take over the bf16 of our side
    AcceleratorState._reset_state()
    return make_peer(_PROMPTS, _LENGTHS, _EPOCHS)


def floor_flops(critic: str) -> float:
    """No padding, nothing twice: decoding, reference and reward model once, `epochs` trainings.

    A backward pass costs twice its forward. The critic of its own reads everything once more and
    is trained; one on the trunk costs nothing beside it.
    """
    model = workload.small_llama()
    full = [len(p) + n for p, n in zip(_PROMPTS, _LENGTHS, strict=True)]
    body = limits.forward_flops(model, full, 0)
    with_head = limits.forward_flops(model, full, sum(_LENGTHS))
    forward_only = with_head + with_head + body  # decoding, reference, reward model
    training = 3 * _EPOCHS * with_head
    return forward_only + training + (0 if critic == "shared" else body + 3 * _EPOCHS * body)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("same", "fast"))
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    kind = "separate" if options.kind == "same" else "shared"
    name = f"ppo_{options.kind}" + ("_bf16" if options.bf16 else "")
    common.compare(
        name,
        lambda: ours(kind, "bf16" if options.bf16 else "no"),
        peer,
        floor_flops=floor_flops(kind),
        repeats=options.repeats,
        precision="bf16" if options.bf16 else "fp32",
    )
