"""dpo: optimise the policy on the rankings themselves, without a reward model (TRL's DPOTrainer).

Reads: `model` (what the policy starts from), `reference` (sft), `rankings`. Writes a `policy`: a plain
HF folder; adapters are merged into it. Every strict pair of a ranking is an example, ties are left out
and counted; rankings that are held out are never trained on, and measure what was learned.

    prefline dpo RUN dpo.beta=0.1

Metrics (healthy range): loss in nats a pair (falls from 0.69), rewards/accuracies (rises from 0.5) and
rewards/margins (rises) of the training pairs; heldout_loss, heldout_accuracy (0.6 to 0.8, people agree
with each other in about 0.73 of pairs) and heldout_margin; a rising heldout_loss is over-fitting: fewer
epochs or a lower lr. rewards/chosen (falling far below 0 together with rewards/rejected: both responses
become improbable, a larger beta helps), entropy in nats a token (near 0 is collapse), grad_norm, lr;
pairs, heldout_pairs, steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

from pipeline import worker
from pipeline.job import Inputs, Metrics, Out
from pipeline.settings import Settings
from stages.common import epoch_order, seed_for, start
from stages.models import add_lora, load_causal_lm, load_tokenizer, positions
from stages.preferences import (
    Pair,
    encode_pairs,
    load_examples,
    pair_logprobs,
    preference_metrics,
)
from stages.trl_checkpoints import LineCallback, Schedule
from stages.trl_runs import check_rows, make_config, make_trainer, publish, train

_LOGGED = (
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "entropy",
)


class _Trainer(DPOTrainer):  # type: ignore[misc]  # trl does not type it
    """TRL's trainer on ids of ours: the text would be tokenised another way than everywhere else."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    accelerator = start(settings, out)
    own = settings.dpo
    tokenizer = load_tokenizer(inputs["model"])
    torch.manual_seed(seed_for(settings.run.seed, "dpo", "adapters"))
    plain = load_causal_lm(inputs["model"])
    num_parameters = plain.num_parameters()
    max_length = min(own.max_length, positions(plain) or own.max_length)
    best_worst = own.pairs == "best_worst"
    pairs, heldout = (
        load_examples(
            inputs["rankings"],
            split,
            lambda rankings: encode_pairs(rankings, tokenizer, max_length, best_worst),
            "pair",
            out,
        )
        for split in ("train", "heldout")
    )
    heldout = heldout[: own.eval_pairs]
    steps = own.max_steps or math.ceil(own.epochs * len(pairs) / own.minibatch_rows)
    order = epoch_order(
        len(pairs), 0, steps * own.minibatch_rows, settings.run.seed, "dpo", out.round, "pairs"
    )
    out.derived.update(steps=steps, pairs=len(pairs), parameters=num_parameters)

    reference = load_causal_lm(inputs["reference"]).to(accelerator.device).requires_grad_(False)
    pad_id = tokenizer.pad_token_id
    ref_logprobs = pair_logprobs(reference, heldout, pad_id, accelerator.device)
    callback = LineCallback(
        out,
        Schedule(
            steps,
            own.checkpoint_every_steps,
            own.eval_every_steps,
            settings.launch.keep_checkpoints,
            measure_start=True,
        ),
        _row_of,
        lambda _: measure(trainer.model, heldout, ref_logprobs, own.beta, pad_id),
    )
    trainer = make_trainer(
        _Trainer,
        add_lora(plain, own.lora, "policy"),
        _config(settings, steps, out, accelerator),
        Dataset.from_list([_row(pairs[i]) for i in order]),
        tokenizer,
        callback,
        out,
        ref_model=reference,
    )
    num_compared = sum(len(p.chosen) + len(p.rejected) for p in pairs)
    check_rows(trainer, [_row(p) for p in pairs], {"completion_mask": num_compared}, out)
    out.say(f"{num_parameters:,} parameters, {steps} steps on {len(pairs)} pairs")
    train(trainer, callback, out)
    publish(trainer, tokenizer, out)
    num_tokens = sum(
        2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in map(pairs.__getitem__, order)
    )
    out.cost["tokens"] += num_tokens
    # forward and backward of the policy (frozen weights need no gradient), forward of the reference
    out.cost["flops"] += (6.0 if own.lora.rank else 8.0) * num_parameters * num_tokens
    return {
        **{key: value for key, value in callback.last.items() if key != "lr"},
        "pairs": len(pairs),
        "heldout_pairs": len(heldout),
        "steps": steps,
    }


def _config(settings: Settings, steps: int, out: Out, accelerator: Accelerator) -> DPOConfig:
    return make_config(
        DPOConfig,
        settings,
        settings.dpo,
        out,
        accelerator,
        steps=steps,
        rows=settings.dpo.minibatch_rows,
        rows_key="dpo.minibatch_rows",
        schedule="linear",
        train_sampling_strategy="sequential",
        beta=settings.dpo.beta,
        max_length=None,
    )


def _row(pair: Pair) -> dict[str, list[int]]:
    """As TRL's collator wants it."""
    return {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}


def _row_of(logs: Metrics) -> Metrics:
    return {
        "loss": logs["loss"],
        **{key: logs[key] for key in _LOGGED},
        "grad_norm": logs["grad_norm"],
        "lr": logs["learning_rate"],
    }


def measure(
    model: nn.Module,
    pairs: list[Pair],
    ref_logprobs: tuple[Tensor, Tensor],
    beta: float,
    pad_id: int,
) -> Metrics:
    """What the policy makes of held-out pairs."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    found = preference_metrics(pair_logprobs(model, pairs, pad_id, device), ref_logprobs, beta)
    model.train(training)
    return {f"heldout_{name}": value for name, value in found.items()}


if __name__ == "__main__":
    worker.main()
