"""A second reward model: another seed, trained on the held-out rankings, which the first never saw."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import StageError
from pipeline.job import Input, Out
from pipeline.records import Ranking, read_jsonl
from pipeline.settings import Settings
from pipeline.statistics import Estimate
from stages.label_agreement import read_labels
from stages.models import add_lora, load_tokenizer, merge_lora, new_reward_model
from stages.ranked_data import (
    EncodedRanking,
    annotator_weights,
    encode_rankings,
    encode_to_train_on,
    longest_row,
)
from stages.reward_measures import measure
from stages.reward_training import train_reward_model
from stages.shared_prefix import GroupScorer, decide_sharing, score_groups


class HeldoutModel(NamedTuple):
    """A trained model with the normalisation of its scores over the rankings' responses.

    agreement: share of the pairs that it orders as people do, in rankings that the first model was trained
    on and this one has not seen; None where there are none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    mean: float
    std: float
    agreement: Estimate | None


def train_on_heldout(
    settings: Settings,
    rankings: Input,
    start_from: Input,
    accelerator: Accelerator,
    out: Out,
    seed: int,
    purpose: str,
) -> HeldoutModel:
    """Train it in the folder of `out`, from where it goes on after a stop.

    Agreement is that with people, or with simulated annotators where nobody else ranked.

    Raises:
        StageError: no held-out ranking can be used.
    """
    assert rankings.path is not None
    tokenizer = load_tokenizer(start_from)
    rows = [Ranking.from_row(row) for row in read_jsonl(rankings.path / "rankings.jsonl")]
    torch.manual_seed(seed)
    model: nn.Module = new_reward_model(start_from, settings.reward.dropout)
    max_length = longest_row(settings.reward, model)
    weights = annotator_weights(rankings.path, settings.reward)
    heldout = [row for row in rows if row.split == "heldout"]
    own, tally = encode_to_train_on(heldout, tokenizer, max_length, settings.reward, weights)
    if not own:
        raise StageError(
            f"{out.step}: {purpose} needs held-out rankings: {tally.summary()}",
            "Raise rank.heldout_fraction, or collect more rankings.",
        )
    labels = read_labels(rankings)
    train = [row for row in labels.rankings if row.split == "train"] if labels else []
    unseen, _ = encode_rankings(train, tokenizer, max_length)
    out.say(f"{purpose}: training a second reward model on {len(own)} held-out rankings")
    model = add_lora(model, settings.reward.lora, "reward").to(accelerator.device)
    pad_id = tokenizer.pad_token_id
    groups = [ranking.group for ranking in own + unseen]
    share_prefix = decide_sharing(settings.reward.share_prefix, model, groups, pad_id, out)
    train_reward_model(
        model,
        own,
        settings.reward,
        accelerator,
        out,
        pad_id=pad_id,
        seed=seed,
        keep_checkpoints=1,
        share_prefix=share_prefix,
        evaluate=lambda _: {},
    )
    merged = merge_lora(model).eval()
    mean, std = _normalisation(merged, own + unseen, pad_id, share_prefix)
    if not unseen:
        return HeldoutModel(merged, tokenizer, mean, std, None)
    found = measure(merged, unseen, pad_id, seed, share_prefix)
    figures = (found[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "pairs"))
    return HeldoutModel(merged, tokenizer, mean, std, Estimate(*figures))


def _normalisation(
    model: nn.Module, rankings: list[EncodedRanking], pad_id: int, share_prefix: bool
) -> tuple[float, float]:
    groups = {ranking.prompt_id: ranking.group for ranking in rankings}
    scores = score_groups(GroupScorer(model, pad_id, share_prefix), list(groups.values())).mean(1)
    std = float(scores.std(unbiased=False))
    return float(scores.mean()), std if std > 0 else 1.0
