from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import Strict, unhashed
from pipeline.settings.model import LoraSettings


class RewardGate(Strict):
    """What a reward model must be before a policy is optimised against it; see docs/evaluation.md."""

    min_accuracy: float | None = unhashed(None, ge=0, le=1)
    """Least held-out accuracy; null stops only what is surely worse than a coin (its interval ends below 0.5)."""
    max_length_correlation: float | None = unhashed(None, ge=0, le=1)
    """Largest correlation of score and length, without its sign; null is any."""
    require_eos: bool = unhashed(True)
    """Whether the score must change when the end token is cut off."""
    force: bool = unhashed(False)
    """Go on through a closed gate; manifest and report say so."""


class RewardSettings(Strict):
    """The reward model: a scalar head on the sft model, trained on whole rankings."""

    loss: Literal["pairwise", "plackett_luce"] = "pairwise"
    """pairwise: all strict pairs of a ranking as one batch element (InstructGPT, arXiv 2203.02155, eq. 1);
    plackett_luce: the likelihood of the whole order, summed over the orders that a tie leaves open."""
    soft_labels: bool = False
    """pairwise only: rankings of the same responses by several annotators become one, whose pairs have the
    share of votes as label, a tie counting one half (Christiano et al. 2017, arXiv 1706.03741, 2.2.3)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """pairwise only: probability that a label is the wrong way round (the same paper allows for 0.1)."""
    margin: float = Field(0.0, ge=0)
    """pairwise only: subtracted inside the sigmoid, times the levels between the two ranks (Llama 2, arXiv
    2307.09288, eq. 2); in nats."""
    centering: float = Field(0.0, ge=0)
    """Weight of the mean over pairs of (score + score)^2, which holds scores near 0 (arXiv 2312.09244; TRL
    suggests 0.01)."""
    off_prompt: float = Field(0.0, ge=0)
    """Weight of a second loss: the best response of a ranking must score higher behind its own prompt than
    behind a similar one. A small model otherwise learns to score without reading the prompt (measured).
    Where no other prompt fits it is left out and counted."""
    annotator_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weight of an annotator's rankings in training, by the name in `rankings.jsonl`, times what the rank step
    found (`rank.weigh_by`); 1 where not given, 0 leaves them out. Held-out rankings all count the same."""
    heads: int = Field(1, ge=1, le=64)
    """Scalar heads on the one trunk, each trained on its own bootstrap of the rankings; the published score
    is their mean, and their spread says how sure it is (arXiv 2203.07472; 4 or 5 are common)."""
    epochs: int = Field(1, ge=1)
    """Passes over the rankings (InstructGPT: 1; more overfit quickly)."""
    prompts_per_step: int = Field(16, ge=1)
    """Rankings of one optimiser step, over all ranks."""
    accumulation_steps: int = Field(1, ge=1)
    """Least number of micro-batches into which a rank divides its rankings."""
    share_prefix: bool = True
    """Read a prompt once for all its responses, where that saves enough and the model can (tried at the
    start): the same numbers up to rounding, with long prompts in about half the time."""
    max_length: int = Field(1024, ge=8)
    """Longest prompt plus response in tokens; longer responses are left out of a ranking and counted."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    """Fraction of the steps with a linear warm-up; cosine decay to zero follows."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW weight decay, on matrices only."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the hidden state below the scalar head, in training only."""
    lora: LoraSettings = LoraSettings()
    """Low-rank adapters instead of full fine-tuning."""
    gate: RewardGate = RewardGate()
    """What stops the line before the policy."""
    normalise_on: int = Field(1024, ge=2)
    """Scores are normalised to mean 0 and standard deviation 1 on at least so many sft samples (where there
    are so many), evenly over the whole set and fewer than twice as many."""
    eval_every_steps: int = Field(50, ge=1)
    """Held-out accuracy every so many steps, and at the end."""
    checkpoint_every_steps: int = unhashed(50, ge=1)
    """Save a checkpoint every so many steps."""

    @model_validator(mode="after")
    def _pairs_only(self) -> RewardSettings:
        if self.loss != "pairwise":
            for name in ("soft_labels", "label_smoothing", "margin"):
                if getattr(self, name):
                    raise ValueError(f"{name} belongs to loss pairwise, not to {self.loss}")
        return self
