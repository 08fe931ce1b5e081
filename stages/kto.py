"""kto: optimise the policy on responses that are desirable or not, without a reward model (TRL's KTOTrainer).

Reads: `model` (what the policy starts from), `reference` (sft), `rankings`. Writes a `policy`: a plain
HF folder; adapters are merged into it. A response that stands above more of its ranking than below is
desirable, one that stands below more is not, the middle is left out and counted (`encode_labels`).
Rankings that are held out are never trained on, and measure what was learned.

    prefline kto RUN kto.beta=0.1

A gain counts from the reference point: an estimate of KL(policy || reference) from prompts with the
response of another one, which has no gradient (the paper, eq. 7).

Metrics (healthy range): loss (falls from about half the mean weight), kl: the reference point in nats a
response (0 at first, then some), rewards/margins of desirable over undesirable responses (rises);
heldout_accuracy of pairs, the same pairs as in dpo (0.6 to 0.8), heldout_margin, heldout_loss (falls from
0.5; rising is over-fitting: fewer epochs or a lower lr), heldout_kl. rewards/chosen are those of desirable
responses, rewards/rejected of the others (both falling far below 0: a larger beta or a lower lr), entropy
in nats a token (near 0 is collapse), grad_norm, lr; responses, desirable, heldout_pairs, steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from trl import KTOConfig, KTOTrainer

from pipeline import worker
from pipeline.errors import StageError
from pipeline.job import Inputs, Metrics, Out
from pipeline.settings import Settings
from stages.common import epoch_order, seed_for, start
from stages.models import add_lora, load_causal_lm, load_tokenizer, positions
from stages.preferences import (
    Labelled,
    Pair,
    encode_labels,
    encode_pairs,
    kto_metrics,
    load_examples,
    mismatched,
    pair_logprobs,
)
from stages.trl_checkpoints import LineCallback, Schedule
from stages.trl_runs import check_rows, make_config, make_trainer, publish, train

# a micro-batch without one of the two kinds has no such reward
_LOGGED = (
    "kl",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "entropy",
)


class _Trainer(KTOTrainer):  # type: ignore[misc]  # trl does not type it
    """TRL's trainer on ids of ours: the text would be tokenised another way than everywhere else."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    accelerator = start(settings, out)
    own = settings.kto
    tokenizer = load_tokenizer(inputs["model"])
    torch.manual_seed(seed_for(settings.run.seed, "kto", "adapters"))
    plain = load_causal_lm(inputs["model"])
    num_parameters = plain.num_parameters()
    max_length = min(own.max_length, positions(plain) or own.max_length)
    responses = load_examples(
        inputs["rankings"],
        "train",
        lambda rankings: encode_labels(rankings, tokenizer, max_length),
        "response",
        out,
    )
    heldout = load_examples(
        inputs["rankings"],
        "heldout",
        lambda rankings: encode_pairs(rankings, tokenizer, max_length),
        "pair",
        out,
    )[: own.eval_pairs]
    desirable_weight = _desirable_weight(settings, responses, out)
    steps = own.max_steps or math.ceil(own.epochs * len(responses) / own.minibatch_rows)
    order = epoch_order(
        len(responses),
        0,
        steps * own.minibatch_rows,
        settings.run.seed,
        "kto",
        out.round,
        "responses",
    )
    out.derived.update(steps=steps, parameters=num_parameters)
    rows = _rows([responses[i] for i in order], own.minibatch_rows)

    reference = load_causal_lm(inputs["reference"]).to(accelerator.device).requires_grad_(False)
    measure = _Measure(heldout, reference, own.beta, max_length, tokenizer.pad_token_id)
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
        lambda _: measure(trainer.model),
    )
    trainer = make_trainer(
        _Trainer,
        add_lora(plain, own.lora, "policy"),
        _config(settings, steps, max_length, desirable_weight, out, accelerator),
        Dataset.from_list(rows),
        tokenizer,
        callback,
        out,
        ref_model=reference,
    )
    num_tokens = sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)
    expected = {
        "completion_mask": sum(len(row["completion_ids"]) for row in rows),
        # another prompt's response may not fit behind this one: it is cut
        "KL_completion_mask": sum(
            min(len(row["KL_completion_ids"]), max_length - len(row["prompt_ids"])) for row in rows
        ),
    }
    check_rows(trainer, rows, expected, out)
    out.say(f"{num_parameters:,} parameters, {steps} steps on {len(responses)} responses")
    train(trainer, callback, out)
    publish(trainer, tokenizer, out)
    out.cost["tokens"] += num_tokens
    # forward and backward of the policy (frozen weights need no gradient), forward of the reference;
    # and a forward of each on the prompts with another response
    out.cost["flops"] += (10.0 if own.lora.rank else 12.0) * num_parameters * num_tokens
    return {
        **{key: value for key, value in callback.last.items() if key != "lr"},
        "responses": len(responses),
        "desirable": out.derived["desirable"],
        "heldout_pairs": len(heldout),
        "steps": steps,
    }


def _desirable_weight(settings: Settings, responses: list[Labelled], out: Out) -> float:
    """The weight of a desirable response; says how many there are of each kind.

    Raises:
        StageError: all are of one kind.
    """
    desirable = sum(example.desirable for example in responses)
    undesirable = len(responses) - desirable
    if not desirable or not undesirable:
        kind = "desirable" if desirable else "undesirable"
        raise StageError(
            f"kto: all of the {len(responses)} responses that can be used are {kind}",
            "Raise kto.max_length, so that the others are not left out.",
        )
    own = settings.kto
    weight = own.desirable_weight or own.undesirable_weight * undesirable / desirable
    out.derived.update(desirable=desirable, undesirable=undesirable, desirable_weight=weight)
    out.say(f"{desirable} desirable responses (weight {weight:.3g}), {undesirable} undesirable")
    return weight


def _rows(responses: list[Labelled], minibatch_rows: int) -> list[dict[str, Any]]:
    """As TRL's collator wants them, in the order of training.

    The response for the reference point is that of the row before, within the rows of one optimiser
    step: a function of the order alone, so neither ranks nor a resume change it.
    """
    rows = []
    for i, example in enumerate(responses):
        begin = i - i % minibatch_rows
        other = responses[begin + (i - begin - 1) % minibatch_rows]
        rows.append(
            {
                "prompt_ids": example.prompt,
                "completion_ids": example.response,
                "KL_completion_ids": other.response,
                "label": example.desirable,
            }
        )
    return rows


def _config(
    settings: Settings,
    steps: int,
    max_length: int,
    desirable_weight: float,
    out: Out,
    accelerator: Accelerator,
) -> KTOConfig:
    return make_config(
        KTOConfig,
        settings,
        settings.kto,
        out,
        accelerator,
        steps=steps,
        rows=settings.kto.minibatch_rows,
        rows_key="kto.minibatch_rows",
        schedule="linear",
        train_sampling_strategy="sequential",
        beta=settings.kto.beta,
        desirable_weight=desirable_weight,
        undesirable_weight=settings.kto.undesirable_weight,
        max_length=max_length,
    )


def _row_of(logs: Metrics) -> Metrics:
    return {
        "loss": logs["loss"],
        **{key: logs[key] for key in _LOGGED if key in logs},
        "grad_norm": logs["grad_norm"],
        "lr": logs["learning_rate"],
    }


class _Measure:
    """What the policy makes of held-out pairs; what the reference makes of them is computed once."""

    def __init__(
        self,
        pairs: list[Pair],
        reference: PreTrainedModel,
        beta: float,
        max_length: int,
        pad_id: int,
    ) -> None:
        self._rows = pairs, mismatched(pairs, max_length)
        self._beta, self._pad_id = beta, pad_id
        self._ref_logprobs = [
            pair_logprobs(reference, rows, pad_id, reference.device) for rows in self._rows
        ]

    def __call__(self, model: nn.Module) -> Metrics:
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        logprobs, other = (pair_logprobs(model, rows, self._pad_id, device) for rows in self._rows)
        model.train(training)
        found = kto_metrics(
            logprobs, self._ref_logprobs[0], other, self._ref_logprobs[1], self._beta
        )
        return {f"heldout_{name}": value for name, value in found.items()}


if __name__ == "__main__":
    worker.main()
