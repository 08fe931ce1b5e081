"""rloo: optimise the policy against the reward model with REINFORCE and a leave-one-out baseline
(TRL's RLOOTrainer; arXiv 2402.14740).

Reads: `model` (what the policy starts from), `reference` (sft), `reward_model`, `prompts`, and
`reward_models` where settings name them. Writes a `policy`: a plain HF folder, the best one by reward
on validation prompts.

    prefline rloo RUN rloo.updates=200 rloo.responses_per_prompt=8

One update: (1) K responses to each of `rloo.prompts_per_step` prompts, from our own decode loop; (2)
scores, the same weighted sum of reward models and rules as in ppo with the same penalties, less
kl_coef times the KL of the response to the reference (k1); (3) advantage = reward - mean reward of
the other K - 1; (4) `rloo.epochs` passes of the loss on whole responses. There is no value model.

Metrics (healthy range): score (rises), kl in nats a response (k1; rises, then levels off; above ~10
the reward model is being gamed), reward = score - kl_coef * kl (rises), entropy in nats a token
(falls slowly; near 0 is collapse), response_tokens, eos_rate (> 0.9), repetition of 4-grams (stays),
alarms that hold (0), loss (says little: its gradient matters), score_std, equal_groups (share of
prompts whose responses all get the same reward and teach nothing: < 0.5), clip_fraction (0 while
epochs is 1), grad_norm, lr; validation_score, validation_kl and validation_reward decide which policy
is kept.
"""

from __future__ import annotations

from trl import RLOOConfig, RLOOTrainer

from pipeline import worker
from pipeline.job import Inputs, Metrics, Out
from pipeline.settings import Settings
from stages.online_rl import OnlineRun, OwnRollouts


class _Trainer(OwnRollouts, RLOOTrainer):  # type: ignore[misc]  # trl does not type it
    pass


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    line = OnlineRun(settings, settings.rloo, inputs, out)
    config = line.config(RLOOConfig, normalize_advantages=settings.rloo.normalize_advantages)
    return line.train(_Trainer(**line.arguments(config)))


if __name__ == "__main__":
    worker.main()
