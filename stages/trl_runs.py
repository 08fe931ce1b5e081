"""A trainer of TRL as a stage: its arguments, its start and resume, its result. For sft, dpo, kto, grpo,
rloo.

What TRL turns on by default and a stage must not: gradient checkpointing (a fifth of the speed on a
small model), bf16 wherever a GPU is expected, saving by its own rules, logging a NaN loss as 0.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from pipeline.errors import StageError, Stopped
from pipeline.job import Out
from pipeline.settings import Settings
from stages.common import exact_div, seed_for
from stages.models import contract_of, merge_lora, save_model
from stages.sharding import compute_by_autocast, make_whole
from stages.trl_checkpoints import LineCallback, newest_whole

ConfigT = TypeVar("ConfigT", bound=TrainingArguments)
TrainerT = TypeVar("TrainerT", bound=Trainer)


class TrainedByTrl(Protocol):
    """The settings that every stage of TRL's has."""

    @property
    def accumulation_steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup_fraction(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...


def make_config(
    kind: type[ConfigT],
    settings: Settings,
    own: TrainedByTrl,
    out: Out,
    accelerator: Accelerator,
    *,
    steps: int,
    rows: int,
    rows_key: str,
    schedule: str,
    **special: Any,
) -> ConfigT:
    """The arguments of one of TRL's trainers.

    steps: optimiser steps. rows: of one step, over all ranks; `rows_key` is the setting that says so.
    schedule: of the learning rate after the warm-up, by transformers' name. special: what only this
    trainer knows.

    Raises:
        ConfigError: the rows cannot be divided among ranks and micro-batches.
    """
    rows_per_rank = exact_div(rows, out.world_size * own.accumulation_steps, rows_key)
    out.derived["rows_per_rank"] = rows_per_rank
    on_cpu = accelerator.device.type == "cpu"
    with warnings.catch_warnings():
        # trl 1.16 turns on what transformers 5.23 calls by another name; this is how to turn it off
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
        return kind(
            output_dir=str(out.checkpoints),
            max_steps=steps,
            per_device_train_batch_size=rows_per_rank,
            gradient_accumulation_steps=own.accumulation_steps,
            learning_rate=own.lr,
            lr_scheduler_type=schedule,
            warmup_steps=round(steps * own.warmup_fraction),
            weight_decay=own.weight_decay,
            max_grad_norm=own.max_grad_norm,
            bf16=settings.model.precision == "bf16",
            use_cpu=on_cpu,
            gradient_checkpointing=False,
            seed=seed_for(settings.run.seed, out.stage) % 2**31,
            # our callback says when; the Trainer's own rotation is off
            save_strategy="no",
            # on, it would log a NaN loss as 0
            logging_nan_inf_filter=False,
            ddp_timeout=settings.launch.timeout_seconds,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=not on_cpu,
            **{"logging_steps": 1, **special},
        )


def make_trainer(
    kind: type[TrainerT],
    model: nn.Module,
    config: Any,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    callback: LineCallback,
    out: Out,
    **special: Any,
) -> TrainerT:
    """One of TRL's trainers on rows in the order of training, without its own printing.

    special: what only this trainer knows.
    """
    trainer = kind(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[callback],
        **special,
    )
    quiet(trainer, out)
    compute_by_autocast(trainer)
    return trainer


def quiet(trainer: Trainer, out: Out) -> None:
    """Take the Trainer's own printing out, and make sure that it sees all the ranks.

    Raises:
        StageError: it sees another number of processes than were started.
    """
    trainer.remove_callback(PrinterCallback)
    if trainer.args.world_size != out.world_size:
        raise StageError(
            f"{out.step}: {out.world_size} processes were started, but the Trainer sees"
            f" {trainer.args.world_size}"
        )


def check_rows(
    trainer: Trainer, rows: Sequence[dict[str, Any]], expected: dict[str, int], out: Out
) -> None:
    """The trainer's own collator must hand over each response whole, and train nothing else.

    expected: tokens that each mask of the collated `rows` has to let through, all rows together.

    Raises:
        StageError: it does not.
    """
    found = Counter[str]()
    for at in range(0, len(rows), 64):
        batch = trainer.data_collator(rows[at : at + 64])
        found.update({mask: int(batch[mask].sum()) for mask in expected})
    for mask, tokens in expected.items():
        if found[mask] != tokens:
            raise StageError(
                f"{out.stage}: the trainer would compare {found[mask]} tokens ({mask}), the"
                f" responses have {tokens}",
                "This is a fault of the toolkit or of a new trl version; please report it.",
            )


def train(trainer: Trainer, callback: LineCallback, out: Out, steps_per_row: int = 1) -> None:
    """Train from the newest whole checkpoint on, or from the start.

    Raises:
        Stopped: a signal came; everything is saved.
    """
    checkpoint = newest_whole(out)
    done = int(checkpoint.name.rpartition("-")[2]) // steps_per_row if checkpoint else None
    if checkpoint:
        out.say(f"continuing from {checkpoint.name}")
        out.resumed_from = done
        callback.read_extra(checkpoint)
    out.rewind(done)
    with warnings.catch_warnings():
        # trl 1.16 asks transformers 5.23 under the old name, in every step
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if callback.stopped:
        raise Stopped(f"{out.step}: stopped by a signal; everything is saved")


def publish(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, out: Out) -> PreTrainedModel:
    """Save the trained model as a plain folder, adapters merged, and state its contract."""
    model: torch.nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    make_whole(model)
    merged = merge_lora(model)
    if out.rank == 0:
        save_model(merged, tokenizer, out.artifact)
    out.contract.update(contract_of(tokenizer, merged))
    return merged
