"""reward: a scalar head on the sft model, trained on whole rankings.

Reads: `model` (sft), `rankings`, and `samples` where there are any. Writes a `reward_model`: a plain
AutoModelForSequenceClassification folder with one label, `reward.json` with the normalisation beside
it. All strict pairs of a prompt are one batch element, ties are left out of the loss; the score is
read at the last real token, the end token included; afterwards scores are normalised to mean 0 and
standard deviation 1 on sft samples.

    prefline reward RUN reward.epochs=1

Metrics (healthy range): heldout_accuracy with _low and _high (0.6 to 0.8: people agree with each other
in about 0.73 of pairs; above 0.95 look for a leak), train_accuracy (far above held-out: over-fitted),
kendall_tau (> 0.1), length_correlation (|r| < 0.5, else it likes length), score_mean, score_std, heldout_pairs. With
several heads: heldout_disagreement (0 to 0.5: standard deviation over the heads of the probability that the
better one wins; below 0.01 the heads are one) and disagreement_error_correlation (above 0: where the
heads are apart they are wrong more often; 0.1 to 0.3 is usual). Of the diagnosis (`diagnosis.json` and
`worst_mistakes.jsonl` in the step's folder): human_agreement (None where nobody ranked the same), ece (near 0;
above 0.1 scores are no log odds), position_correlation (0), eos_effect (> 0.01: it sees the end token),
eos_gain and eos_preferred (> 0 and > 0.5: finished beats unfinished; else ppo.missing_eos_penalty has
to outweigh it).
"""

from __future__ import annotations

import json
from itertools import groupby

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline import worker
from pipeline.errors import StageError
from pipeline.job import Inputs, Metrics, Out
from pipeline.records import Message, Ranking, SampleGroup, Tally, read_jsonl, write_jsonl
from pipeline.settings import Settings
from pipeline.settings.reward import RewardSettings
from stages.adapters import save_reward_adapter
from stages.common import num_parameters, seed_for, start
from stages.models import (
    add_lora,
    backbone_and_head,
    contract_of,
    load_tokenizer,
    merge_lora,
    new_reward_model,
    save_model,
)
from stages.ranked_data import (
    EncodedRanking,
    annotator_weights,
    encode_group,
    encode_rankings,
    encode_to_train_on,
    longest_row,
)
from stages.reward_diagnosis import diagnose, judge, metrics_of
from stages.reward_heads import Heads, add_heads, mean_head, save_heads
from stages.reward_measures import measure
from stages.reward_training import train_reward_model
from stages.reward_votes import worst_mistakes
from stages.sharding import make_whole, place, whole
from stages.shared_prefix import GroupScorer, PromptGroup, decide_sharing, score_groups


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    accelerator = start(settings, out)
    tokenizer = load_tokenizer(inputs["model"])
    pad_id = tokenizer.pad_token_id
    assert inputs["rankings"].path is not None
    rankings = [
        Ranking.from_row(row) for row in read_jsonl(inputs["rankings"].path / "rankings.jsonl")
    ]
    seed = seed_for(settings.run.seed, "reward", out.round)
    torch.manual_seed(seed)
    model = new_reward_model(inputs["model"], settings.reward.dropout)
    add_heads(model, settings.reward.heads, seed)
    max_length = longest_row(settings.reward, model)
    weights = annotator_weights(inputs["rankings"].path, settings.reward)
    uneven = {name: weight for name, weight in sorted(weights.items()) if weight != 1}
    out.derived["annotator_weights"] = uneven
    unknown = settings.reward.annotator_weights.keys() - {r.annotator for r in rankings}
    if unknown:
        # not an error: in a later round they may have ranked
        names = ", ".join(sorted(unknown))
        out.say(f"reward.annotator_weights: no ranking is by {names}")
    train, heldout = _split(rankings, settings.reward, weights, tokenizer, max_length, out)
    model = add_lora(model, settings.reward.lora, "reward")
    for part in backbone_and_head(model):
        place(part, accelerator)
    everything = [ranking.group for ranking in train + heldout]
    share_prefix = decide_sharing(settings.reward.share_prefix, model, everything, pad_id, out)

    def quality(model: nn.Module, rankings: list[EncodedRanking]) -> Metrics:
        return measure(model, rankings, pad_id, seed, share_prefix)

    def heldout_accuracy(model: nn.Module) -> Metrics:
        with whole(*backbone_and_head(model)):
            return {"heldout_accuracy": quality(model, heldout)["accuracy"]}

    model = train_reward_model(
        model,
        train,
        settings.reward,
        accelerator,
        out,
        pad_id=pad_id,
        seed=seed,
        keep_checkpoints=settings.launch.keep_checkpoints,
        share_prefix=share_prefix,
        evaluate=heldout_accuracy,
    )

    model.eval()
    make_whole(*backbone_and_head(model))
    scorer = GroupScorer(model, pad_id, share_prefix)
    samples = _groups_to_normalise_on(
        inputs, rankings, tokenizer, max_length, settings.reward.normalise_on
    )
    raw_NH = score_groups(scorer, samples)
    raw_N = raw_NH.mean(1)
    mean, std = float(raw_N.mean()), float(raw_N.std(unbiased=False))
    if not std > 0:
        raise StageError(
            "reward: the model gives every response the same score",
            "Look at reward.lr and the data.",
        )
    found = quality(model, heldout)
    diagnosis = _diagnose(scorer, rankings, tokenizer, max_length, (mean, std), seed, out)
    train_accuracy = quality(model, train)["accuracy"]
    weight_HD, bias_H = mean_head(model)
    if out.rank == 0:
        if isinstance(model, PeftModel):
            save_reward_adapter(model, out.artifact, inputs["model"].digest)
        if settings.reward.heads > 1:
            heads = Heads(weight_HD, bias_H, raw_NH.mean(0), torch.tensor(std))
            save_heads(heads, out.artifact)
    model = merge_lora(model)
    if out.rank == 0:
        save_model(model, tokenizer, out.artifact)
        normalisation = {"score_mean": mean, "score_std": std, "score_position": "last token"}
        (out.artifact / "reward.json").write_text(json.dumps(normalisation, sort_keys=True))
    out.contract.update(contract_of(tokenizer, model))
    out.contract.update(score_position="last token", score_mean=mean, score_std=std)
    num_tokens = settings.reward.epochs * sum(scorer.cost(ranking.group) for ranking in train)
    out.cost["tokens"] += num_tokens
    out.cost["flops"] += 6.0 * num_tokens * num_parameters(model)
    metrics = {
        "heldout_accuracy": found["accuracy"],
        "heldout_accuracy_low": found["accuracy_low"],
        "heldout_accuracy_high": found["accuracy_high"],
        "train_accuracy": train_accuracy,
        "kendall_tau": found["kendall_tau"],
        "length_correlation": found["length_correlation"],
        "heldout_pairs": found["pairs"],
        "rankings_trained": sum(len(ranking.votes) for ranking in train),
        "score_mean": mean,
        "score_std": std,
        **diagnosis,
    }
    if settings.reward.heads > 1:
        metrics["heldout_disagreement"] = found["disagreement"]
        metrics["disagreement_error_correlation"] = found["disagreement_error_correlation"]
    return metrics


def _split(
    rankings: list[Ranking],
    settings: RewardSettings,
    weights: dict[str, float],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    out: Out,
) -> tuple[list[EncodedRanking], list[EncodedRanking]]:
    """What to train on and what to measure with."""

    def checked(split: str, encoded: list[EncodedRanking], tally: Tally) -> list[EncodedRanking]:
        out.say(f"{split} rankings: {tally.summary()}")
        out.derived[f"{split}_rankings_dropped"] = dict(tally.reasons)
        if not any(len(set(vote.ranks)) > 1 for ranking in encoded for vote in ranking.votes):
            raise StageError(
                f"reward: no {split} ranking can be used: {tally.summary()}",
                "At least one prompt needs two responses that were not ranked equal.",
            )
        return encoded

    def of(split: str) -> list[Ranking]:
        return [ranking for ranking in rankings if ranking.split == split]

    train = encode_to_train_on(of("train"), tokenizer, max_length, settings, weights)
    heldout = encode_rankings(of("heldout"), tokenizer, max_length)
    return checked("train", *train), checked("heldout", *heldout)


def _diagnose(
    scorer: GroupScorer,
    rankings: list[Ranking],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    normalisation: tuple[float, float],
    seed: int,
    out: Out,
) -> Metrics:
    """Look closer at the held-out rankings. The files stay beside the artifact: they are about it."""
    mean, std = normalisation

    def score(groups: list[PromptGroup]) -> list[list[float]]:
        scores_N = score_groups(scorer, groups).mean(1).cpu()
        return [x_K.tolist() for x_K in scores_N.split([len(g.responses) for g in groups])]

    heldout = [ranking for ranking in rankings if ranking.split == "heldout"]
    judged = judge(heldout, score, tokenizer, max_length)
    found = diagnose(judged, std, seed)
    if out.rank == 0:
        text = json.dumps(found, indent=1, sort_keys=True)
        (out.work / "diagnosis.json").write_text(text + "\n", encoding="utf-8")
        write_jsonl(out.work / "worst_mistakes.jsonl", worst_mistakes(judged, std, mean))
    return metrics_of(found)


def _groups_to_normalise_on(
    inputs: Inputs,
    rankings: list[Ranking],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    count: int,
) -> list[PromptGroup]:
    """Prompts with sft samples or, where nothing was sampled, with the responses of the rankings."""
    pairs: list[tuple[list[Message], str]]
    if "samples" in inputs and inputs["samples"].path is not None:
        groups = [
            SampleGroup.from_row(row)
            for row in read_jsonl(inputs["samples"].path / "samples.jsonl")
        ]
        pairs = [(list(g.prompt.messages), r.text) for g in groups for r in g.responses]
    else:
        pairs = [(list(r.messages), text) for r in rankings for text in r.responses]
    # evenly over the whole set, not its beginning
    pairs = pairs[:: max(1, len(pairs) // count)]
    found = []
    for messages, own in groupby(pairs, key=lambda pair: pair[0]):
        prompt, responses = encode_group(tokenizer, messages, [text for _, text in own])
        fits = [ids for ids in responses if len(prompt) + len(ids) <= max_length]
        if fits:
            found.append(PromptGroup(prompt, fits))
    return found


if __name__ == "__main__":
    worker.main()
