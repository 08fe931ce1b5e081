"""The judge that evaluate trains: a reward model of another seed, on the held-out rankings only."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from pipeline.errors import StageError
from pipeline.job import Input, Inputs, Out
from pipeline.records import Prompt, Ranking, read_jsonl
from pipeline.settings import Settings
from pipeline.statistics import Estimate
from stages.chat import encode_completion, encode_prompt
from stages.common import seed_for
from stages.label_agreement import Labels, Score
from stages.models import add_lora, load_tokenizer, merge_lora, new_reward_model
from stages.ranked_data import annotator_weights, encode_rankings, encode_to_train_on, longest_row
from stages.reward_measures import measure
from stages.reward_training import train_reward_model
from stages.rollout import score_all
from stages.shared_prefix import decide_sharing


def second_reward_model(
    settings: Settings, inputs: Inputs, labels: Labels | None, accelerator: Accelerator, out: Out
) -> tuple[Score, Estimate | None]:
    """How it scores responses, and how often it agrees with the annotators on rankings new to it.

    New to it are those that the first reward model was trained on.
    """
    assert inputs["rankings"].path is not None
    start_from: Input = inputs["sft"]
    tokenizer = load_tokenizer(start_from)
    rankings = [
        Ranking.from_row(row) for row in read_jsonl(inputs["rankings"].path / "rankings.jsonl")
    ]
    seed = seed_for(settings.run.seed, "evaluate", "judge", out.round)
    torch.manual_seed(seed)
    model = new_reward_model(start_from, settings.reward.dropout)
    max_length = longest_row(settings.reward, model)
    unseen, tally = encode_to_train_on(
        [r for r in rankings if r.split == "heldout"],
        tokenizer,
        max_length,
        settings.reward,
        annotator_weights(inputs["rankings"].path, settings.reward),
    )
    new, _ = encode_rankings(
        [r for r in (labels.rankings if labels else []) if r.split == "train"],
        tokenizer,
        max_length,
    )
    if not unseen:
        raise StageError(
            f"evaluate: the judge needs held-out rankings: {tally.summary()}",
            "Raise rank.heldout_fraction, or collect more rankings.",
        )
    out.say(f"judge: training a second reward model on {len(unseen)} held-out rankings")
    model = add_lora(model, settings.reward.lora, "reward").to(accelerator.device)
    pad_id, device = tokenizer.pad_token_id, accelerator.device
    groups = [ranking.group for ranking in unseen + new]
    share_prefix = decide_sharing(settings.reward.share_prefix, model, groups, pad_id, out)
    train_reward_model(
        model,
        unseen,
        settings.reward,
        accelerator,
        out,
        pad_id=pad_id,
        seed=seed,
        keep_checkpoints=1,
        share_prefix=share_prefix,
        evaluate=lambda _: {},
    )
    model = merge_lora(model).eval()

    def by_model(prompts: list[Prompt], responses: list[str]) -> list[float]:
        rows = [
            encode_prompt(tokenizer, list(prompt.messages))
            + encode_completion(tokenizer, response, eos=True)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return score_all(model, rows, pad_id, device).tolist()

    if not new:
        return by_model, None
    found = measure(model, new, pad_id, seed, share_prefix)
    figures = (found[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "pairs"))
    return by_model, Estimate(*figures)
