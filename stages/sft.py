"""sft: supervised fine-tuning on prompts and demonstrations (TRL's SFTTrainer).

Reads: `model` (pretrain, or the user's) and `data` (demonstrations: see stages/data.py). Writes a
`model`: a plain HF folder; adapters are merged into it. Only what the assistant says is trained, its
end token included, in every turn; the number of trained tokens is checked against the data.

    prefline sft RUN sft.epochs=3

Metrics (healthy range): loss and heldout_loss in nats a trained token (fall together; heldout_loss
rising while loss falls is over-fitting: fewer epochs), token_accuracy (rises), grad_norm (steady),
lr, trained_tokens (of one pass over the examples), examples, heldout_examples, steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from pipeline import worker
from pipeline.errors import ConfigError, DataError, StageError
from pipeline.job import Inputs, Metrics, Out
from pipeline.records import Message, Tally, content_id
from pipeline.settings import Settings
from stages.chat import TrainingRow, decode_response, encode_conversation, encode_prompt
from stages.common import (
    epoch_order,
    own_share,
    pad_right,
    seed_for,
    start,
    sum_over_ranks,
)
from stages.data import Conversation, is_heldout, read_demonstrations
from stages.generation import generate
from stages.models import (
    add_lora,
    load_causal_lm,
    load_tokenizer,
    positions,
    repairs_of,
)
from stages.sharding import whole
from stages.trl_checkpoints import LineCallback, Schedule
from stages.trl_runs import make_config, make_trainer, publish, train

_HELDOUT_ROWS = 512
_HELDOUT_ROWS_AT_ONCE = 16
_SAMPLES = 3
_SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Examples:
    """Rows to train on, held-out rows, and prompts whose answers are looked at."""

    train: list[TrainingRow]
    heldout: list[TrainingRow]
    prompts: list[list[Message]]


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    accelerator = start(settings, out)
    tokenizer = load_tokenizer(inputs["model"])
    for note in repairs_of(tokenizer):
        out.say(f"model.base: {note}")
    torch.manual_seed(seed_for(settings.run.seed, "sft", "weights"))
    plain = load_causal_lm(inputs["model"])
    num_parameters = plain.num_parameters()
    _check_length(plain, settings)
    examples = _examples(settings, inputs, tokenizer, out)
    model = add_lora(plain, settings.sft.lora, "causal")

    steps, order = _order(settings, len(examples.train))
    out.derived.update(steps=steps, rows=len(examples.train), parameters=num_parameters)
    own = settings.sft
    callback = LineCallback(
        out,
        Schedule(
            steps,
            own.checkpoint_every_steps,
            own.eval_every_steps,
            settings.launch.keep_checkpoints,
        ),
        _row_of,
        # the Trainer sets Accelerate up anew: its accelerator is the one that holds from here on
        lambda step: _evaluate(
            settings, trainer.model, examples, tokenizer, trainer.accelerator, step, out
        ),
    )
    trainer = _trainer(
        settings, model, tokenizer, examples, steps, order, callback, out, accelerator
    )
    trained_tokens = check_trained_tokens(trainer, examples.train)
    out.say(f"{num_parameters:,} parameters, {steps} steps on {len(examples.train)} examples")
    train(trainer, callback, out)
    publish(trainer, tokenizer, out)
    num_tokens = sum(len(examples.train[row].ids) for row in order)
    out.cost["tokens"] += num_tokens
    # frozen weights need no gradient of their own: 4 instead of 6 operations per weight and token
    per_token = 4.0 if settings.sft.lora.rank else 6.0
    out.cost["flops"] += per_token * num_parameters * num_tokens
    return {
        **{key: value for key, value in callback.last.items() if key != "lr"},
        "trained_tokens": trained_tokens,
        "examples": len(examples.train),
        "heldout_examples": len(examples.heldout),
        "steps": steps,
    }


# ---- data ----------------------------------------------------------------------------------


def _check_length(model: PreTrainedModel, settings: Settings) -> None:
    limit = positions(model)
    if limit is not None and settings.sft.max_length > limit:
        raise ConfigError(
            f"sft.max_length {settings.sft.max_length} is more than the {limit} tokens that the"
            " model can read",
            "Lower sft.max_length, or raise model.max_length of a new model.",
        )


def _examples(
    settings: Settings, inputs: Inputs, tokenizer: PreTrainedTokenizerBase, out: Out
) -> Examples:
    own = settings.sft
    conversations, tally = read_demonstrations(inputs["data"].sources, own.max_examples)
    kept: list[tuple[Conversation, list[TrainingRow]]] = []
    encoded = Tally(merged=tally.merged, reasons=tally.reasons, first=tally.first)
    for number, conversation in enumerate(conversations, 1):
        try:
            rows = encode_conversation(tokenizer, conversation)
        except DataError as error:
            encoded.drop(error.message, f"demonstration {number}")
            continue
        if max(len(row.ids) for row in rows) > own.max_length:
            encoded.drop(_too_long(own.max_length), f"demonstration {number}")
            continue
        encoded.use()
        kept.append((conversation, rows))
    too_long = encoded.reasons.pop(_too_long(own.max_length), 0)
    encoded.check("sft.data", own.max_bad_fraction)
    # length is a matter of the setting, not a fault of the data: counted, and no reason to stop
    if too_long:
        encoded.reasons[_too_long(own.max_length)] = too_long
    out.say(f"demonstrations: {encoded.summary()}")
    out.derived["demonstrations_dropped"] = dict(encoded.reasons)
    return _split(kept, own.heldout_fraction)


def _too_long(max_length: int) -> str:
    return f"longer than sft.max_length {max_length}"


def _split(kept: list[tuple[Conversation, list[TrainingRow]]], fraction: float) -> Examples:
    heldout = [item for item in kept if is_heldout(item[0], fraction)]
    train = [item for item in kept if not is_heldout(item[0], fraction)]
    # a handful of examples can all fall on one side
    if not heldout and len(train) > 1:
        heldout = [train.pop()]
    if not train or not heldout:
        raise DataError(
            f"sft.data: {len(kept)} demonstrations are too few to train on and to hold some out",
            "Two different prompts are the least.",
        )
    # by content: which ones are looked at does not depend on their place in the file
    heldout.sort(key=lambda item: content_id(item[0]))
    prompts = [_first_prompt(conversation) for conversation, _ in heldout[:_SAMPLES]]
    return Examples(
        [row for _, rows in train for row in rows],
        [row for _, rows in heldout for row in rows][:_HELDOUT_ROWS],
        prompts,
    )


def _first_prompt(conversation: Conversation) -> list[Message]:
    return conversation[: next(i for i, m in enumerate(conversation) if m["role"] == "assistant")]


def _order(settings: Settings, count: int) -> tuple[int, list[int]]:
    """Optimiser steps, and the row of every position of every step.

    One long sequence of shuffled passes: a step is never short, the same rows make a step whatever
    the number of processes, and the order is a pure function of (seed, epoch, position).
    """
    own = settings.sft
    steps = own.max_steps or math.ceil(own.epochs * count / own.minibatch_rows)
    return steps, epoch_order(
        count, 0, steps * own.minibatch_rows, settings.run.seed, "sft", "rows"
    )


# ---- trainer -------------------------------------------------------------------------------


def _trainer(
    settings: Settings,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    steps: int,
    order: list[int],
    callback: LineCallback,
    out: Out,
    accelerator: Accelerator,
) -> SFTTrainer:
    config = make_config(
        SFTConfig,
        settings,
        settings.sft,
        out,
        accelerator,
        steps=steps,
        rows=settings.sft.minibatch_rows,
        rows_key="sft.minibatch_rows",
        schedule="cosine",
        train_sampling_strategy="sequential",
        max_length=None,
    )
    rows = Dataset.from_dict(
        {
            "input_ids": [row.ids for row in examples.train],
            "labels": [_labels(row) for row in examples.train],
        }
    )
    return make_trainer(SFTTrainer, model, config, rows.select(order), tokenizer, callback, out)


def _row_of(logs: Metrics) -> Metrics:
    return {
        "loss": logs["loss"],
        "grad_norm": logs["grad_norm"],
        "lr": logs["learning_rate"],
        "token_accuracy": logs["mean_token_accuracy"],
    }


def _labels(row: TrainingRow) -> list[int]:
    return [token if on else -100 for token, on in zip(row.ids, row.trained, strict=True)]


def check_trained_tokens(trainer: SFTTrainer, rows: list[TrainingRow]) -> int:
    """Tokens that the trainer's own collator marks for training in one pass; they must be the
    assistants' tokens, no more and no fewer.

    Raises:
        StageError: the counts differ, or rows went missing on the way to the trainer.
    """
    expected = sum(sum(row.trained) for row in rows)
    positions = trainer.args.max_steps * trainer.args.train_batch_size
    positions *= trainer.args.gradient_accumulation_steps * trainer.args.world_size
    found = 0
    for at in range(0, len(rows), 64):
        part = [{"input_ids": r.ids, "labels": _labels(r)} for r in rows[at : at + 64]]
        # a label is compared with the prediction one place before it: the first is never used
        found += int((trainer.data_collator(part)["labels"][:, 1:] != -100).sum())
    if found != expected or len(trainer.train_dataset) != positions:
        raise StageError(
            f"sft: the trainer would train {found} tokens, the completions have {expected};"
            f" it has {len(trainer.train_dataset)} rows instead of {positions}",
            "This is a fault of the toolkit or of a new trl version; please report it.",
        )
    return found


# ---- evaluation ----------------------------------------------------------------------------


def _evaluate(
    settings: Settings,
    model: nn.Module,
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    step: int,
    out: Out,
) -> Metrics:
    """Held-out loss over all ranks, every trained token weighing the same; and three answers."""
    with whole(model):
        if out.rank == 0:
            _show(settings, model, examples.prompts, tokenizer, step, out)
        loss = heldout_loss(model, examples.heldout, tokenizer.pad_token_id, accelerator)
    return {"heldout_loss": loss}


@torch.no_grad()
def heldout_loss(
    model: nn.Module, rows: list[TrainingRow], pad_id: int, accelerator: Accelerator
) -> float:
    """Mean loss of a trained token of the rows, in nats."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64)
    mine = [rows[i] for i in own_share(len(rows), accelerator)]
    for at in range(0, len(mine), _HELDOUT_ROWS_AT_ONCE):
        part = mine[at : at + _HELDOUT_ROWS_AT_ONCE]
        ids_BT = pad_right([row.ids for row in part], pad_id, device)
        labels_BT = pad_right([_labels(row) for row in part], -100, device)[:, 1:]
        mask_BT = pad_right([[1] * len(row.ids) for row in part], 0, device)
        with accelerator.autocast():
            logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
        losses = nn.functional.cross_entropy(
            logits_BTV[:, :-1].float().flatten(0, 1), labels_BT.flatten(), reduction="none"
        )
        totals += torch.tensor([losses.double().sum().item(), (labels_BT != -100).sum().item()])
    model.train(training)
    total, count = sum_over_ranks(accelerator)(totals.float().to(accelerator.device)).tolist()
    return total / count


def _show(
    settings: Settings,
    model: nn.Module,
    prompts: list[list[Message]],
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    out: Out,
) -> None:
    """Append the model's answers to held-out prompts to samples.jsonl."""
    found = generate(
        model,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        [seed_for(settings.run.seed, "sft", "show", i) for i in range(len(prompts))],
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        max_response_tokens=min(_SAMPLE_TOKENS, settings.sft.max_length),
        temperature=0.8,
    )
    for prompt, generated in zip(prompts, found, strict=True):
        text = decode_response(tokenizer, generated.tokens)
        out.sample(step, prompt=prompt[-1]["content"], text=text)


if __name__ == "__main__":
    worker.main()
