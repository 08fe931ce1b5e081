"""grpo: optimise the policy against the reward model, each response compared with the others to its
prompt (TRL's GRPOTrainer; arXiv 2402.03300).

Reads: `model` (what the policy starts from), `reference` (sft), `reward_model`, `prompts`, and
`reward_models` where settings name them. Writes a `policy`: a plain HF folder, the best one by reward
on validation prompts.

    prefline grpo RUN grpo.updates=200 grpo.responses_per_prompt=8

One update: (1) K responses to each of `grpo.prompts_per_step` prompts, from our own decode loop; (2)
scores, the same weighted sum of reward models and rules as in ppo with the same penalties; (3)
advantage = score - mean of the group, over its deviation; (4) `grpo.epochs` passes of the clipped
loss with kl_coef times the KL to the reference (k3) in it. There is no value model.

Metrics (healthy range): score (rises), kl in nats a response (k3; rises, then levels off), reward =
score - kl_coef * kl, entropy in nats a token (falls slowly; near 0 is collapse), response_tokens,
eos_rate (> 0.9), repetition of 4-grams (stays), alarms that hold (0), loss (says little: its gradient
matters), score_std, equal_groups (share of prompts whose responses all score the same and teach
nothing: < 0.5), clip_fraction (0 while epochs is 1), grad_norm, lr; validation_score, validation_kl
(k1) and validation_reward decide which policy is kept.
"""

from __future__ import annotations

from typing import Any

from trl import GRPOConfig, GRPOTrainer

from pipeline import worker
from pipeline.job import Inputs, Metrics, Out
from pipeline.settings import Settings
from stages.online_rl import OnlineRun, OwnRollouts


class _Trainer(OwnRollouts, GRPOTrainer):  # type: ignore[misc]  # trl does not type it
    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> Any:
        # TRL computes old logprobs itself, where it needs them
        return super()._generate_single_turn(prompt_ids), None


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    line = OnlineRun(settings, settings.grpo, inputs, out)
    config = line.config(
        GRPOConfig, loss_type=settings.grpo.loss, scale_rewards=settings.grpo.scale_rewards
    )
    return line.train(_Trainer(**line.arguments(config)))


if __name__ == "__main__":
    worker.main()
