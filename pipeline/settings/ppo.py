from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config import unhashed
from pipeline.settings.model import DataSources, LoraSettings
from pipeline.settings.rewarded import RewardedSettings
from pipeline.settings.rollout import RolloutSettings


class PpoSettings(RewardedSettings):
    """Proximal policy optimisation against the reward model (arXiv 1707.06347, 2203.02155)."""

    prompts: DataSources | None = unhashed(None)
    """Prompts; null uses those of the sample step, or else of the rankings."""
    critic: Literal["separate", "shared", "lora"] | None = None
    """separate: a model of its own, begun as the reward model. shared: a head on the policy, the fast one.
    lora: adapters of policy and critic on one base. Null is lora with ppo.lora, else separate."""
    updates: int = Field(100, ge=1)
    """PPO updates: rollout, then epochs of optimisation."""
    prompts_per_step: int = Field(64, ge=1)
    """Rollouts of one update, over all ranks; one response for each prompt."""
    minibatch_rows: int | None = Field(None, ge=1)
    """Rollouts of one optimiser step, over all ranks; null is prompts_per_step."""
    rollout: RolloutSettings = RolloutSettings()
    """What samples the responses."""
    rows_per_rank: int = unhashed(64, ge=1)
    """Rollouts that one process decodes or trains on at once (memory, not result)."""
    epochs: int = Field(4, ge=1)
    """Passes over the rollouts of an update (TRL, Ziegler et al. 2019: 4)."""
    max_update_kl: float = Field(0.02, gt=0)
    """Leave out the remaining passes of an update once KL(old, new) exceeds this, in nats a token."""
    max_prompt_tokens: int = Field(256, ge=1)
    """Longer prompts are left out and counted."""
    max_response_tokens: int = Field(128, ge=1)
    """Responses are cut at this many tokens."""
    temperature: float = Field(1.0, gt=0, le=5)
    """Sampling temperature; the same one divides the logits of every logprob (verl, OpenRLHF: 1)."""
    lr: float = Field(3e-6, gt=0)
    """Peak learning rate of the policy, linear to 0 (TRL: 3e-6; small models want far more)."""
    value_lr: float | None = Field(1e-5, gt=0)
    """Peak learning rate of the critic (verl: 1e-5, OpenRLHF: 9e-6); null is lr."""
    warmup_fraction: float = Field(0.03, ge=0, le=1)
    """Fraction of the optimiser steps with a linear warm-up (OpenRLHF: 0.03)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of policy and critic are clipped to this norm, each on its own (OpenRLHF: 1)."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the per-token KL to the reference in the reward, per nat (k1; TRL: 0.05)."""
    kl_control: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: steer kl_coef towards kl_target (Ziegler et al. 2019, section 2.2)."""
    kl_target: float = Field(6.0, gt=0)
    """Target of the adaptive controller, in nats a response (Ziegler: 6)."""
    kl_horizon: int = Field(10_000, ge=1)
    """Horizon of the adaptive controller, in rollouts (Ziegler: 10,000)."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount (Ziegler, TRL, verl: 1; episodes are short)."""
    lam: float = Field(0.95, ge=0, le=1)
    """lambda of generalised advantage estimation (arXiv 1506.02438; Ziegler, TRL: 0.95)."""
    lam_value: float | None = Field(None, ge=0, le=1)
    """lambda of the returns that the critic learns; null is lam (1 suits long responses, arXiv 2503.01491)."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 - clip_low (PPO paper, eq. 7: 0.2)."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high (0.2; DAPO, arXiv 2503.14476, takes 0.28)."""
    dual_clip: float | None = Field(None, gt=1)
    """Where the advantage is negative, a ratio beyond this one teaches nothing (Ye et al., arXiv 1912.09729,
    eq. 5: 3); null is off, as in the PPO paper."""
    value_clip: float = Field(0.2, gt=0)
    """A value may move this far from its rollout value in one update (OpenAI baselines, TRL: 0.2)."""
    vf_coef: float = Field(0.1, gt=0)
    """Weight of the value loss where policy and critic share a trunk (Ziegler et al. 2019: 0.1)."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the mean entropy of a token as a bonus in the loss."""
    whiten_advantages: bool = True
    """Advantages to mean 0 and standard deviation 1 over all tokens of all ranks (arXiv 2404.10719)."""
    gold: Literal["reward_model", "rule", "rubric"] | None = None
    """What is watched on validation prompts and never optimised, to see where optimising stops to help (arXiv
    2210.10760). reward_model: ppo.gold_model, or else a second one, trained on the held-out rankings; rule:
    ppo.gold_rule; rubric: the demo's."""
    gold_model: DataSources | None = unhashed(None)
    """With gold: reward_model: the folder of one, as the reward step publishes it."""
    gold_rule: str | None = None
    """With gold: rule: its entry-point name (group prefline.rewards)."""
    keep: Literal["best_reward", "best_gold"] = "best_reward"
    """The published policy. best_reward: of the highest validation score, penalties included, minus the KL
    penalty; best_gold: of the highest gold (smoothed over neighbouring validations), where it stops rising."""
    best_of: int = unhashed(16, ge=0)
    """With gold: responses of the reference to each validation prompt, of which the best of 1, 2, 4, ... by
    the score is the baseline that PPO must beat; 0 is off."""
    ptx_coef: float = Field(0.0, ge=0)
    """Weight of the pretraining loss mixed into each step (InstructGPT, arXiv 2203.02155, eq. 2: 27.8)."""
    ptx_data: DataSources | None = unhashed(None)
    """Text for it; null uses pretrain.data."""
    ptx_rows: int = Field(16, ge=1)
    """Rows of that text in each optimiser step, over all ranks."""
    ptx_tokens: int = Field(128, ge=8)
    """Tokens of such a row."""
    value_warmup_updates: int | None = Field(None, ge=0)
    """First updates that train the critic only; null is 10, or a tenth of the updates where that is less, for
    a critic that starts from zero, else 0 (NeMo RL's example: 10)."""
    lora: LoraSettings = LoraSettings()
    """Low-rank adapters for the policy instead of full fine-tuning."""
    eval_every_updates: int = Field(10, ge=1)
    """Score the policy on validation prompts every so many updates; the best one is kept."""
    eval_prompts: int = Field(128, ge=1)
    """Validation prompts used for it."""
    checkpoint_every_updates: int = unhashed(10, ge=1)
    """Save a checkpoint every so many updates."""

    @model_validator(mode="before")
    @classmethod
    def _as_it_was_called(cls, values: Any) -> Any:
        """Run directories of before `keep` say keep_best_by."""
        if isinstance(values, dict) and "keep_best_by" in values:
            values = dict(values)
            before = f"best_{values.pop('keep_best_by')}"
            values.setdefault("keep", before)
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> PpoSettings:
        if self.lora.dropout > 0:
            raise ValueError(
                "lora.dropout must be 0 in ppo: dropout would change the probability ratio of an"
                " unchanged policy"
            )
        if self.value_warmup_updates is not None and self.value_warmup_updates >= self.updates:
            raise ValueError(
                f"value_warmup_updates {self.value_warmup_updates} leaves none of the"
                f" {self.updates} updates to the policy"
            )
        if self.kl_control == "adaptive" and self.kl_coef == 0:
            raise ValueError(
                "kl_control: adaptive multiplies kl_coef, which is 0: it would stay so"
            )
        if self.critic == "lora" and self.lora.rank == 0:
            raise ValueError("critic: lora needs adapters: set lora.rank, for instance to 8")
        if self.rollout.engine == "vllm" and self.temperature > 2:
            raise ValueError("rollout.engine: vllm serves temperatures up to 2 only")
        if len(self.gold_model or ()) > 1:
            raise ValueError("gold_model: one reward model, not several")
        if self.gold_model and self.gold != "reward_model":
            raise ValueError("gold_model belongs to gold: reward_model; give both or neither")
        if (self.gold == "rule") != (self.gold_rule is not None):
            raise ValueError("gold: rule and gold_rule belong together; give both or neither")
        if self.keep == "best_gold" and self.gold is None:
            raise ValueError("keep: best_gold needs gold: reward_model or rule, to be best by")
        if self.keep == "best_gold" and self.gold == "rubric":
            raise ValueError(
                "keep: best_gold: the rubric is what the demo's policy is judged by, so it must not choose"
                " it; use gold: reward_model"
            )
        if self.minibatch_rows and self.prompts_per_step % self.minibatch_rows:
            raise ValueError(
                f"minibatch_rows {self.minibatch_rows} does not divide"
                f" prompts_per_step {self.prompts_per_step}"
            )
        return self
