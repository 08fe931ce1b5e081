"""reward: a scalar head on the sft model, trained on whole rankings.

Reads: `model` (sft), `rankings`, and `samples` where there are any. Writes a `reward_model`: a plain
AutoModelForSequenceClassification folder with one label, `reward.json` with the normalisation beside
it. All strict pairs of a prompt are one batch element, ties are left out of the loss; the score is
read at the last real token, the end token included; afterwards scores are normalised to mean 0 and
standard deviation 1 on sft samples.

    prefline reward RUN reward.epochs=1

Metrics (healthy range): heldout_accuracy with _low and _high (0.6 to 0.8: people agree with each other
in about 0.73 of pairs; above 0.95 look for a leak), train_accuracy (far above held-out: over-fitted),
kendall_tau (> 0.1), length_correlation (|r| < 0.5, else it likes length), score_mean, score_std, pairs.
"""

from __future__ import annotations

import json

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline import worker
from pipeline.errors import StageError
from pipeline.job import Inputs, Metrics, Out
from pipeline.records import Ranking, SampleGroup, read_jsonl
from pipeline.settings import Settings
from stages.chat import encode_completion, encode_prompt
from stages.common import num_parameters, seed_for, start
from stages.models import (
    add_lora,
    contract_of,
    load_tokenizer,
    merge_lora,
    new_reward_model,
    save_model,
)
from stages.reward_training import (
    RankedRows,
    encode_rankings,
    longest_row,
    measure,
    train_reward_model,
)
from stages.rollout import score_all

_NORMALISE_ON = 1024


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    accelerator = start(settings, out)
    tokenizer = load_tokenizer(inputs["model"])
    assert inputs["rankings"].path is not None
    rankings = [
        Ranking.from_row(row) for row in read_jsonl(inputs["rankings"].path / "rankings.jsonl")
    ]
    seed = seed_for(settings.run.seed, "reward", out.round)
    torch.manual_seed(seed)
    model = new_reward_model(inputs["model"], settings.reward.dropout)
    max_length = longest_row(settings.reward, model)
    train, heldout = _split(rankings, tokenizer, max_length, out)
    model = add_lora(model, settings.reward.lora, "reward").to(accelerator.device)
    pad_id = tokenizer.pad_token_id

    def evaluate(model: nn.Module) -> Metrics:
        found = measure(model, heldout, pad_id, accelerator.device, seed)
        return {"heldout_accuracy": found["accuracy"]}

    model = train_reward_model(
        model,
        train,
        settings.reward,
        accelerator,
        out,
        pad_id=pad_id,
        seed=seed,
        keep_checkpoints=settings.launch.keep_checkpoints,
        evaluate=evaluate,
    )

    model.eval()
    rows = _rows_to_normalise_on(inputs, rankings, tokenizer, max_length)
    scores = score_all(model, rows, pad_id, accelerator.device)
    mean, std = float(scores.mean()), float(scores.std(unbiased=False))
    if not std > 0:
        raise StageError(
            "reward: the model gives every response the same score",
            "Look at reward.lr and the data.",
        )
    quality = measure(model, heldout, pad_id, accelerator.device, seed)
    train_accuracy = measure(model, train, pad_id, accelerator.device, seed)["accuracy"]
    model = merge_lora(model)
    if out.rank == 0:
        save_model(model, tokenizer, out.artifact)
        normalisation = {"score_mean": mean, "score_std": std, "score_position": "last token"}
        (out.artifact / "reward.json").write_text(json.dumps(normalisation, sort_keys=True))
    out.contract.update(contract_of(tokenizer, model))
    out.contract.update(score_position="last token", score_mean=mean, score_std=std)
    num_tokens = settings.reward.epochs * sum(len(row) for r in train for row in r.rows)
    out.cost["tokens"] += num_tokens
    out.cost["flops"] += 6.0 * num_tokens * num_parameters(model)
    return {
        "heldout_accuracy": quality["accuracy"],
        "heldout_accuracy_low": quality["accuracy_low"],
        "heldout_accuracy_high": quality["accuracy_high"],
        "train_accuracy": train_accuracy,
        "kendall_tau": quality["kendall_tau"],
        "length_correlation": quality["length_correlation"],
        "heldout_pairs": quality["pairs"],
        "rankings_trained": len(train),
        "score_mean": mean,
        "score_std": std,
    }


def _split(
    rankings: list[Ranking], tokenizer: PreTrainedTokenizerBase, max_length: int, out: Out
) -> tuple[list[RankedRows], list[RankedRows]]:
    parts = []
    for split in ("train", "heldout"):
        own = [r for r in rankings if r.split == split]
        encoded, tally = encode_rankings(own, tokenizer, max_length)
        out.say(f"{split} rankings: {tally.summary()}")
        out.derived[f"{split}_rankings_dropped"] = dict(tally.reasons)
        if not encoded:
            raise StageError(
                f"reward: no {split} ranking can be used: {tally.summary()}",
                "At least one prompt needs two responses that were not ranked equal.",
            )
        parts.append(encoded)
    return parts[0], parts[1]


def _rows_to_normalise_on(
    inputs: Inputs,
    rankings: list[Ranking],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[list[int]]:
    """Prompt + response rows of sft samples or, where nothing was sampled, of the rankings."""
    if "samples" in inputs and inputs["samples"].path is not None:
        groups = [
            SampleGroup.from_row(row)
            for row in read_jsonl(inputs["samples"].path / "samples.jsonl")
        ]
        pairs = [(list(g.prompt.messages), r.text) for g in groups for r in g.responses]
    else:
        pairs = [(list(r.messages), text) for r in rankings for text in r.responses]
    # evenly over the whole set, not its beginning
    pairs = pairs[:: max(1, len(pairs) // _NORMALISE_ON)]
    rows = (
        encode_prompt(tokenizer, messages) + encode_completion(tokenizer, text, eos=True)
        for messages, text in pairs
    )
    return [row for row in rows if len(row) <= max_length]


if __name__ == "__main__":
    worker.main()
