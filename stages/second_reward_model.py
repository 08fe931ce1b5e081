"""The judge that evaluate trains: a reward model of another seed, on the held-out rankings only."""

from __future__ import annotations

from accelerate import Accelerator

from pipeline.job import Inputs, Out
from pipeline.records import Prompt
from pipeline.settings import Settings
from pipeline.statistics import Estimate
from stages.chat import encode_completion, encode_prompt
from stages.common import seed_for
from stages.heldout_model import train_on_heldout
from stages.label_agreement import Score
from stages.rollout import score_all


def second_reward_model(
    settings: Settings, inputs: Inputs, accelerator: Accelerator, out: Out
) -> tuple[Score, Estimate | None]:
    """How it scores responses, and how often it agrees with the annotators on rankings new to it.

    New to it are those that the first reward model was trained on.
    """
    seed = seed_for(settings.run.seed, "evaluate", "judge", out.round)
    made = train_on_heldout(
        settings, inputs["rankings"], inputs["sft"], accelerator, out, seed, "the judge"
    )

    def by_model(prompts: list[Prompt], responses: list[str]) -> list[float]:
        rows = [
            encode_prompt(made.tokenizer, list(prompt.messages))
            + encode_completion(made.tokenizer, response, eos=True)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return score_all(made.model, rows, made.tokenizer.pad_token_id, accelerator.device).tolist()

    return by_model, made.agreement
