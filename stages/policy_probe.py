"""One batch of responses, and what the policy stages do with it: what `stages.policy_costs` measures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.records import Prompt
from pipeline.settings.model import LoraSettings
from pipeline.settings.ppo import PpoSettings
from stages.bench import Bench
from stages.common import adamw, clip_gradients
from stages.critics import Agent, ValuePass, lora, separate, shared, zero_head
from stages.experience import Experience, Models, roll_out, rollout_metrics, to_experience
from stages.generation import Generated
from stages.models import add_adapter, add_lora, backbone_and_head
from stages.ppo_math import policy_loss, value_loss
from stages.probes import Seconds, measure, spread
from stages.prompts import PromptIds
from stages.rewards import RewardModel, Rewards
from stages.rollout import (
    all_logprobs,
    in_micro_batches,
    make_sequences,
    rows_to_score,
    score_rows,
)
from stages.stage_costs import mean, round_up


class Probe:
    """One batch of prompts with responses of the expected lengths, and what is measured on it."""

    def __init__(self, bench: Bench, most: int, rows: int, adapters: LoraSettings) -> None:
        work = bench.work
        self.bench, self.adapters = bench, adapters
        self.lengths = work.expected(most)
        self.prompt = mean([len(ids) for ids in work.prompt_ids])
        self.row = self.prompt + mean(self.lengths)
        count = bench.affordable_rows(rows, self.row)
        self.prompts = [work.prompt_ids[i * len(work.prompt_ids) // count] for i in range(count)]
        # the order of prompts must not be that of lengths
        sizes = spread(self.lengths, count)
        sizes = [sizes[(i * 7919) % count] for i in range(count)]
        self.responses = [
            [(5 + i * 31 + t * 7) % len(work.tokenizer) for t in range(n)]
            for i, n in enumerate(sizes)
        ]
        pad_id = work.tokenizer.pad_token_id
        self.batch = make_sequences(self.prompts, self.responses, pad_id, bench.device)

    @property
    def longest(self) -> int:
        return round_up(max(len(p) for p in self.prompts)) + max(self.lengths)

    def per_row(self, seconds: Seconds) -> Seconds:
        return seconds * (self.bench.scale / len(self.prompts))

    def logprobs(self, model: nn.Module, rows_at_once: int) -> Seconds:
        """The reference (or the policy once more) reads a row."""

        def read() -> None:
            with torch.no_grad(), self.bench.accelerator.autocast():
                all_logprobs(model, self.batch, 1.0, rows_at_once)

        return self.per_row(measure(read, self.bench.device, 0.4))

    def scores(self, rows_at_once: int) -> Seconds:
        """A reward model reads a row."""
        tokenizer = self.bench.work.tokenizer
        rows, _ = rows_to_score(self.prompts, self.responses, tokenizer.eos_token_id)
        parts = backbone_and_head(self.bench.classifier())

        def read() -> None:
            with self.bench.accelerator.autocast():
                score_rows(*parts, rows, tokenizer.pad_token_id, self.bench.device, rows_at_once)

        return self.per_row(measure(read, self.bench.device, 0.3))

    def rollout(self, agent: Agent, ppo: PpoSettings) -> tuple[Seconds, Experience]:
        """What PPO does with a response that is there: reference, critic and reward model read it, and
        rewards become advantages."""
        bench = self.bench
        scorer = RewardModel("reward_model", 1.0, *backbone_and_head(bench.classifier()), 0.0, 1.0)
        sources = [scorer] * (bool(ppo.reward_weight) + len(ppo.reward_models or ()))
        reference = None if self.adapters.rank else bench.policy()
        rewards = Rewards(sources, {})
        engine = _Canned(self.responses, agent.value_head is not None, bench.bf16)
        models = Models(agent, engine, reference, rewards, None, bench.work.tokenizer)
        prompts = [
            PromptIds(Prompt(({"role": "user", "content": ""},), "train"), p) for p in self.prompts
        ]
        found: list[Experience] = []

        def roll() -> None:
            rollout = roll_out(models, prompts, [0] * len(prompts), ppo, bench.accelerator)
            rollout_metrics(rollout, ppo.kl_coef)
            found.append(to_experience(rollout, ppo.kl_coef, ppo))

        return self.per_row(measure(roll, bench.device, 1.0)), found[-1]

    def step(
        self, agent: Agent, rows_at_once: int, experience: Experience | None = None
    ) -> tuple[Seconds, Seconds]:
        """A row trained on, by all passes of policy and critic; and the optimisers' step."""
        device = self.bench.device
        lengths_B = self.batch.prompt_tokens_B + self.batch.response_tokens_B
        vocabulary = self.bench.config.vocab_size
        optimizers = [
            adamw(list(p.values()), 1e-6, 0.0)
            for p in (agent.policy_parameters(), agent.value_parameters())
        ]

        def learn() -> None:
            for module in agent.passes:
                for rows in in_micro_batches(lengths_B.tolist(), rows_at_once, device, vocabulary):
                    self._backward(module, rows, experience)

        def finish() -> None:
            for optimizer in optimizers:
                clip_gradients([p for g in optimizer.param_groups for p in g["params"]], 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        learned = measure(learn, device, 1.2)
        learn()
        return self.per_row(learned), measure(finish, device, 0.2) * self.bench.scale

    def _backward(self, module: nn.Module, rows: list[int], experience: Experience | None) -> None:
        batch = self.batch.rows(rows)
        with self.bench.accelerator.autocast():
            outputs = module(batch)
        valid_BR, loss = batch.valid_BR, torch.zeros((), device=self.bench.device)
        count, width = int(batch.response_tokens_B.sum()), valid_BR.shape[1]
        logprobs_BR, values_BR = outputs.logprobs_BR, outputs.values_BR

        def own(x_BR: torch.Tensor) -> torch.Tensor:
            return x_BR[torch.tensor(rows, device=x_BR.device), :width]

        if experience is None:
            assert logprobs_BR is not None
            loss = -logprobs_BR.sum() / count
        elif logprobs_BR is not None:
            old_BR, advantages_BR = (
                own(experience.rollout.logprobs_BR),
                own(experience.advantages_BR),
            )
            loss = policy_loss(logprobs_BR, old_BR, advantages_BR, valid_BR, 0.2, 0.2, count).loss
        if experience is not None and values_BR is not None:
            old_BR, returns_BR = own(experience.rollout.values_BR), own(experience.returns_BR)
            loss = loss + value_loss(values_BR, old_BR, returns_BR, valid_BR, 0.2, count)
        self.bench.accelerator.backward(loss)


class _Canned:
    """An engine that has its answers ready: what it takes to write them is measured elsewhere."""

    def __init__(self, responses: list[list[int]], with_values: bool, bf16: bool) -> None:
        self.same_logprobs = not bf16
        self._responses, self._with_values = responses, with_values

    def generate(self, prompts: list[list[int]], seeds: list[int]) -> list[Generated]:
        return [
            Generated(ids, [-1.0] * len(ids), False, [0.0] * len(ids) * self._with_values)
            for ids in self._responses
        ]

    def update(self, policy: Any) -> None:
        pass

    def close(self) -> None:
        pass


def make_agent(bench: Bench, kind: str, adapters: LoraSettings) -> Agent:
    """Policy and critic of the kind that ppo would train, with random weights."""
    policy: Any = add_lora(bench.policy(), adapters, "policy")
    if kind == "shared":
        return shared(policy, 1.0)
    if kind == "lora":
        add_adapter(policy, "value")
        agent = lora(policy, zero_head(policy), 1.0)
    else:
        backbone, head = backbone_and_head(bench.classifier())
        agent = separate(policy, ValuePass(backbone, head), 1.0)
    for part in agent.passes:
        part.eval()
    return agent
