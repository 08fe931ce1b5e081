"""The reward of a response as every online stage gives it: the reward model's score, normalised.

Shapes: B rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.rollout import score_all


@dataclass(frozen=True)
class Scorer:
    """A reward model and how its raw scores become rewards.

    mean, std: of the raw scores on sft samples. clip: bound of the normalised scores, both ways.
    missing_eos_penalty: subtracted where a response was cut before it ended.
    """

    model: PreTrainedModel
    eos_id: int
    pad_id: int
    mean: float
    std: float
    clip: float
    missing_eos_penalty: float
    rows_at_once: int

    def __call__(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Rewards `[B]` of responses (token ids, with the end token where they ended)."""
        device = self.model.device
        is_cut_B = torch.tensor([r[-1] != self.eos_id for r in responses], device=device)
        # the reward model was trained on responses that all have an end token; that a response was
        # cut is the penalty's business
        rows = [
            prompt + response + ([self.eos_id] if cut else [])
            for prompt, response, cut in zip(prompts, responses, is_cut_B.tolist(), strict=True)
        ]
        raw_B = score_all(self.model, rows, self.pad_id, device, self.rows_at_once)
        scores_B = ((raw_B - self.mean) / self.std).clamp(-self.clip, self.clip)
        return scores_B - self.missing_eos_penalty * is_cut_B
