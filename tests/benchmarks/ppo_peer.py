"""The peer of the PPO benchmarks: PPOTrainer of TRL 1.12.0, the last release that has one.

Call `peers.restart_with(TRL)` before importing this module: the release that prefline uses is another
one. The peer is set up so that it does what was asked for, which it does not by itself:

- one micro-batch holds the whole rollout, because with several the accumulation of gradients ends in a
  step for each of them on the last batch of a data epoch, and num_mini_batches is ignored;
- the number of optimiser steps of every update is checked;
- the end token is given as stop_token_id, because without one it always writes to the full length;
- gradient checkpointing is off and the arithmetic is fp32 (its bf16 flag changes nothing).

It takes its old logprobs from the scores after all processors, so where the end token is prescribed its
ratios are wrong. That changes what it learns and not how long it takes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from tests.benchmarks.workload import (
    EOS,
    MAX_RESPONSE,
    PAD,
    PrescribedLengths,
    prompts,
    response_lengths,
    scalar_llama,
    small_llama,
)

TRL = "trl==1.12.0"
ROWS = 32


def make_peer(
    rows: list[list[int]] | None = None, lengths: list[int] | None = None, epochs: int = 4
) -> Callable[[], None]:
    """A function that does one whole PPO update on the benchmark's Llama.

    rows: prompts, all different; lengths: tokens of the response to each, the end token included.
    Models of policy, reference, reward and value are separate and of the same size.
    """
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rows = prompts(ROWS) if rows is None else rows
    lengths = response_lengths(len(rows)) if lengths is None else lengths
    length_of = {tuple(row): length for row, length in zip(rows, lengths, strict=True)}
    assert len(length_of) == len(rows), "the same prompt twice"
    policy, reference = small_llama(), small_llama()
    policy.generate = _prescribing(policy.generate, length_of)
    folder = tempfile.TemporaryDirectory(prefix="ppo_peer")
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=folder.name,
            per_device_train_batch_size=len(rows),
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=epochs,
            total_episodes=len(rows),
            local_rollout_forward_batch_size=len(rows),
            response_length=max(MAX_RESPONSE, *lengths),
            stop_token_id=EOS,
            missing_eos_penalty=1.0,
            temperature=1.0,
            kl_coef=0.05,
            learning_rate=3e-6,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            num_sample_generations=0,
            disable_tqdm=True,
        ),
        # the two ids are all that it reads of a tokenizer when it neither saves nor shows samples
        processing_class=SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS),
        model=policy,
        ref_model=reference,
        reward_model=scalar_llama(seed=1),
        value_model=scalar_llama(seed=2),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=_left_padded,
    )
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    # of torch's optimiser, below the wrapper of accelerate, which may skip a step
    trainer.optimizer.optimizer.register_step_post_hook(count)

    def update() -> None:
        nonlocal steps
        steps = 0
        # it prints its progress; a benchmark's last line must be its own
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            trainer.train()
        assert steps == epochs, f"{steps} optimiser steps in {epochs} epochs"
        assert folder.name  # kept until the last update

    return update


def _prescribing(generate: Callable[..., Any], length_of: dict[tuple[int, ...], int]) -> Any:
    def prescribed(input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        lengths = [
            length_of[tuple(row[mask.bool()].tolist())]
            for row, mask in zip(input_ids, attention_mask, strict=True)
        ]
        processor = PrescribedLengths(lengths, input_ids.shape[1])
        found = generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=[processor],
            **options,
        )
        responses_BR = found.sequences[:, input_ids.shape[1] :]
        ends_B = (responses_BR == EOS).int().argmax(-1) + 1
        assert ends_B.tolist() == lengths, "responses of other lengths than prescribed"
        return found

    return prescribed


def _left_padded(items: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    rows = [item["input_ids"] for item in items]
    width = max(len(row) for row in rows)
    return {"input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in rows])}
