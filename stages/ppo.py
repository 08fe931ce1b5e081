"""ppo: optimise the policy against the reward model, held near the reference by a KL penalty.

Reads: `model` (what the policy starts from), `reference` (sft), `reward_model`, `prompts`; and, where
settings name them, `reward_models`, `gold_model` or `rankings` (to train one), `ptx`. Writes a `policy`: a
plain HF folder, the best one on validation prompts.

    prefline ppo RUN ppo.updates=200 ppo.kl_coef=0.05

One update: (1) one response for each of `ppo.prompts_per_step` prompts; (2) scores, reference
logprobs and values; (3) KL-penalised rewards, advantages, whitening; (4) `ppo.epochs` passes of
clipped policy and value losses. `stages.critics` has the three kinds of critic.

Metrics (healthy range): score (rises), score/NAME of each source where there are several, kl in nats
a response (rises, then levels off; above ~10 the reward model is being gamed), kl_k3 (the same,
never negative), reward = score - kl_coef * kl (rises), response_tokens, eos_rate (> 0.9), repetition
of 4-grams (stays), distinct_responses (near 1: no two are the same; 0: all are), explained_variance
(towards 1), value_error (falls), entropy in nats a token
(falls slowly; near 0 is collapse), clip_fraction (0.02 to 0.3), dual_clip_fraction (with
ppo.dual_clip; near 0), ratio_max (< 3), approx_kl old to new (< 0.02 a token), epochs_done,
policy_loss, value_loss, *_grad_norm, alarms that hold (0);
engine_kl of a sampling engine that is not the trainer's forward (< 0.01 nats a token);
validation_score, validation_kl, validation_reward (and validation_gold) decide which policy is kept.
With ppo.gold: gold_peak_update with _low and _high (where gold was highest: the last one while it still
rises), gold_drop from there to the end (0) and gold_fell (false; true: optimised too far).
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline import worker
from pipeline.job import Inputs, Metrics, Out
from pipeline.settings import Settings
from stages import ppo_math
from stages.alarms import Alarms
from stages.chat import decode_response
from stages.checkpoints import (
    Checkpointer,
    load_optimizer,
    load_trainable,
    optimizer_tensors,
)
from stages.common import (
    adamw,
    clip_gradients,
    epoch_order,
    exact_div,
    gather_list,
    num_parameters,
    permutation,
    seed_for,
    set_lr,
    start,
    stop_if_asked,
    sum_over_ranks,
    warmup_linear,
)
from stages.critics import TokenOutputs
from stages.experience import (
    Experience,
    Models,
    Rollout,
    roll_out,
    rollout_metrics,
    to_experience,
)
from stages.frontier import baseline_cost, best_of_n_baseline, describe, validation_row
from stages.keeping import Keeper
from stages.models import contract_of, merge_lora, positions, save_model
from stages.over_optimisation import mean
from stages.ppo_models import load_models
from stages.prompts import PromptIds, encode_prompts, load_prompts, longest_prompt, of_split
from stages.ptx import PtxRows
from stages.rollout import Sequences, in_micro_batches
from stages.sharding import accumulate, make_whole, most
from stages.stops import check_finite, check_policy


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    accelerator = start(settings, out)
    models = load_models(settings, inputs, accelerator, out)
    agent = models.agent
    prompts = load_prompts(inputs["prompts"], settings, out)
    max_tokens = longest_prompt(
        settings.ppo.max_prompt_tokens,
        settings.ppo.max_response_tokens,
        positions(agent.policy),
        out,
    )
    train, validation = (
        encode_prompts(of_split(prompts, split, settings), models.tokenizer, max_tokens, out)
        for split in ("train", "validation")
    )
    validation = validation[: settings.ppo.eval_prompts]
    ptx = None
    if "ptx" in inputs:
        ptx = PtxRows(
            inputs["ptx"], settings, positions(agent.policy), models.tokenizer, accelerator, out
        )
    loop = _Loop(settings, models, (train, validation), ptx, accelerator, out)
    try:
        loop.run()
    finally:
        models.engine.close()

    load_trainable(agent.policy_parameters(), loop.keeper.best)
    make_whole(agent.policy)
    policy = merge_lora(agent.policy)
    if out.rank == 0:
        save_model(policy, models.tokenizer, out.artifact)
    out.contract.update(contract_of(models.tokenizer, policy))
    metrics = {"updates": settings.ppo.updates, **loop.keeper.metrics}
    if models.gold is not None:
        metrics |= describe(settings, loop.baseline, metrics, out)
    return metrics


class _Loop:
    """The state that PPO carries from update to update; all of it is in a checkpoint."""

    def __init__(
        self,
        settings: Settings,
        models: Models,
        prompts: tuple[list[PromptIds], list[PromptIds]],
        ptx: PtxRows | None,
        accelerator: Accelerator,
        out: Out,
    ) -> None:
        ppo = settings.ppo
        self.settings, self.ppo, self.models, self.agent = settings, ppo, models, models.agent
        self.train, self.validation = prompts
        self.ptx = ptx
        self.accelerator, self.out = accelerator, out
        self.minibatch_rows = ppo.minibatch_rows or ppo.prompts_per_step
        self.num_minibatches = exact_div(
            ppo.prompts_per_step, self.minibatch_rows, "ppo.prompts_per_step"
        )
        exact_div(self.minibatch_rows, out.world_size, "ppo.minibatch_rows")
        self.steps_per_update = ppo.epochs * self.num_minibatches
        self.warmup_updates = (
            ppo.value_warmup_updates
            if ppo.value_warmup_updates is not None
            else min(10, ppo.updates // 10) * self.agent.from_zero
        )
        self.policy_parameters = self.agent.policy_parameters()
        self.value_parameters = self.agent.value_parameters()
        self.policy_optimizer = adamw(self.policy_parameters.values(), ppo.lr, 0.0, eps=1e-5)
        self.value_optimizer = adamw(
            self.value_parameters.values(), ppo.value_lr or ppo.lr, 0.0, eps=1e-5
        )
        self.checkpoints = Checkpointer(out, settings.launch.keep_checkpoints, accelerator)
        self.alarms = Alarms("ppo", 2 * ppo.kl_target, 2 * ppo.max_update_kl)
        self.kl_coef = ppo.kl_coef
        self.update = 0
        self.keeper = Keeper(self.policy_parameters, ppo.keep, ppo.updates)
        self.baseline: dict[str, Any] | None = None
        self._tell()

    def _tell(self) -> None:
        ppo, out = self.ppo, self.out
        out.derived.update(
            critic=self.agent.kind,
            prompts_per_step=ppo.prompts_per_step,
            minibatch_rows=self.minibatch_rows,
            optimizer_steps=ppo.updates * self.steps_per_update,
            value_warmup_updates=self.warmup_updates,
            train_prompts=len(self.train),
            validation_prompts=len(self.validation),
        )
        out.say(
            f"{ppo.updates} updates x {ppo.prompts_per_step} rollouts, {ppo.epochs} epochs x"
            f" {self.num_minibatches} minibatches, {len(self.train)} prompts, {self.agent.kind} critic"
        )

    def run(self) -> None:
        begun = self._resume()
        self.models.engine.update(self.agent.policy)
        if self.models.gold is not None and self.ppo.best_of:
            self.baseline = best_of_n_baseline(
                self.settings, self.models, self.validation, self.accelerator, self.out
            )
        if not begun:
            if self.baseline:
                for name, value in baseline_cost(self.baseline, self.models).items():
                    self.out.cost[name] += value
            # the start is a candidate too: a policy that PPO only harms is not published
            self.out.log(0, self._validate(0))
        while self.update < self.ppo.updates:
            stop_if_asked(self.accelerator, self.out, self._save)
            # 1 respond, 2 score
            rollout = self._roll_out(
                [self.train[i] for i in self._picked()], "rollout", self.update
            )
            row = rollout_metrics(rollout, self.kl_coef)
            # before anything is trained on it
            check_finite(self.out, self.update + 1, **row)
            # 3 rewards and advantages
            experience = to_experience(rollout, self.kl_coef, self.ppo)
            row["explained_variance"] = ppo_math.explained_variance(
                rollout.values_BR, experience.returns_BR, rollout.batch.valid_BR
            ).item()
            # 4 optimise
            row |= self._optimise(experience)
            check_finite(self.out, self.update + 1, **row)
            self.models.engine.update(self.agent.policy)
            self.update += 1
            if self.ppo.kl_control == "adaptive":
                self.kl_coef = ppo_math.adaptive_kl(
                    self.kl_coef,
                    row["kl"],
                    self.ppo.kl_target,
                    self.ppo.prompts_per_step,
                    self.ppo.kl_horizon,
                )
            for alarm in self.alarms.check(self.update, row):
                self.out.say(f"WARNING at update {self.update}: {alarm}")
            row["alarms"] = len(self.alarms.holding)
            check_policy(self.out, self.update, row, self.ppo, self.alarms)
            last = self.update == self.ppo.updates
            if self.update % self.ppo.eval_every_updates == 0 or last:
                row |= self._validate(self.update)
            self.out.log(self.update, row)
            self.out.progress(self.update, self.ppo.updates, "update")
            if self.update % self.ppo.checkpoint_every_updates == 0 and not last:
                self._save()
        self.out.derived["alarms"] = self.alarms.said

    def _seed(self, *purpose: Any) -> int:
        return seed_for(self.settings.run.seed, "ppo", self.out.round, *purpose)

    def _picked(self) -> list[int]:
        """Prompts of this update: shuffled passes over all of them, without end."""
        count = self.ppo.prompts_per_step
        return epoch_order(
            len(self.train),
            self.update * count,
            count,
            self.settings.run.seed,
            "ppo",
            self.out.round,
            "prompts",
        )

    def _roll_out(
        self, prompts: list[PromptIds], *purpose: Any, with_gold: bool = False
    ) -> Rollout:
        seeds = [self._seed(*purpose, i) for i in range(len(prompts))]
        rollout = roll_out(self.models, prompts, seeds, self.ppo, self.accelerator, with_gold)
        self.out.cost["tokens"] += int(rollout.batch.response_tokens_B.sum())
        # the policy reads each token once while it decodes; reference, critic and reward model once
        self._spend(rollout, 2 * 4)
        return rollout

    def _spend(self, rollout: Rollout, flops_per_weight: int) -> None:
        lengths_B = rollout.batch.prompt_tokens_B + rollout.batch.response_tokens_B
        size = num_parameters(self.agent.policy)
        self.out.cost["flops"] += float(lengths_B.sum()) * flops_per_weight * size

    def _optimise(self, experience: Experience) -> Metrics:
        """`epochs` passes over the rollout; averages over the steps done, for the log."""
        ppo, rows = self.ppo, []
        for epoch in range(ppo.epochs):
            order = permutation(
                ppo.prompts_per_step, self.settings.run.seed, "ppo", self.update, epoch
            )
            for number in range(self.num_minibatches):
                at = number * self.minibatch_rows
                step = epoch * self.num_minibatches + number
                rows.append(self._minibatch(experience, order[at : at + self.minibatch_rows], step))
            moved = [row.get("approx_kl", 0.0) for row in rows[-self.num_minibatches :]]
            if sum(moved) / len(moved) > ppo.max_update_kl:
                break
        self._spend(experience.rollout, 6 * (epoch + 1) * (1 if self.agent.kind == "shared" else 2))
        found = {
            key: max(row[key] for row in rows)
            if key.endswith("_max")
            else sum(row[key] for row in rows) / len(rows)
            for key in rows[0]
        }
        lr = 0.0 if self.update < self.warmup_updates else self._lr(ppo.lr, self.warmup_updates, 0)
        return {**found, "epochs_done": epoch + 1, "lr": lr}

    def _lr(self, peak: float, from_update: int, step: int) -> float:
        """Linear warm-up and decay over the optimiser steps of the updates `from_update` on."""
        total = (self.ppo.updates - from_update) * self.steps_per_update
        done = (self.update - from_update) * self.steps_per_update + step
        return peak * warmup_linear(max(0, done), total, self.ppo.warmup_fraction)

    def _minibatch(self, experience: Experience, rows: list[int], step: int) -> Metrics:
        """One optimiser step of policy and critic over the minibatch rows of all ranks."""
        ppo, accelerator = self.ppo, self.accelerator
        batch = experience.rollout.batch
        lengths_B = batch.prompt_tokens_B + batch.response_tokens_B
        device, vocab_size = lengths_B.device, self.agent.policy.config.vocab_size
        num_valid = int(batch.response_tokens_B[torch.tensor(rows, device=device)].sum())
        own = rows[accelerator.process_index :: accelerator.num_processes]
        rows_at_once = ppo.rows_per_rank
        if self.ptx:
            # text is shared out over the same micro-batches: enough of them for both
            rows_at_once = min(rows_at_once, self.ptx.rollouts_at_once(len(own), vocab_size))
        parts = list(in_micro_batches(lengths_B[own].tolist(), rows_at_once, device, vocab_size))
        train_policy = self.update >= self.warmup_updates
        passes = self.agent.passes if train_policy else self.agent.passes[:1]
        ptx_parts: list[Sequences | None] = [None] * len(parts)
        if self.ptx and train_policy:
            ptx_parts = self.ptx.split(self.update * self.steps_per_update + step, len(parts))
        num_passes = most(len(parts), accelerator)
        sums: dict[str, Tensor] = {}
        # pass by pass, not part by part: ranks with different numbers of parts would otherwise issue
        # the collectives of two passes in different orders, and wait for each other without end
        for module in passes:
            for number in range(num_passes):
                # beyond its own part a rank keeps the others company: the first part again, for nothing
                spare = number >= len(parts)
                picked = [own[i] for i in parts[0 if spare else number]]
                ptx = None if spare else ptx_parts[number]
                with accumulate(module, last=number == num_passes - 1):
                    with accelerator.autocast():
                        outputs = module(batch.rows(picked), ptx)
                    loss, found = self._loss(outputs, experience, picked, num_valid, train_policy)
                    # gradients are averaged over ranks, while num_valid counts the tokens of all
                    accelerator.backward(loss * (0.0 if spare else accelerator.num_processes))
                for name, value in found.items() if not spare else ():
                    before = sums.get(name, torch.zeros_like(value))
                    sums[name] = (
                        torch.maximum(before, value) if name == "ratio_max" else before + value
                    )
        norms = {}
        if train_policy:
            set_lr(self.policy_optimizer, self._lr(ppo.lr, self.warmup_updates, step))
            norms["policy_grad_norm"] = clip_gradients(
                self.policy_parameters.values(), ppo.max_grad_norm
            )
            self.policy_optimizer.step()
        set_lr(self.value_optimizer, self._lr(ppo.value_lr or ppo.lr, 0, step))
        norms["value_grad_norm"] = clip_gradients(self.value_parameters.values(), ppo.max_grad_norm)
        self.value_optimizer.step()
        for optimizer in (self.policy_optimizer, self.value_optimizer):
            optimizer.zero_grad(set_to_none=True)
        return {**self._gathered(sums, num_valid), **norms}

    def _loss(
        self,
        outputs: TokenOutputs,
        experience: Experience,
        rows: list[int],
        num_valid: int,
        train_policy: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch: of policy, critic or both; sums over its tokens for the log."""
        ppo, rollout = self.ppo, experience.rollout
        valid_BR = rollout.batch.rows(rows).valid_BR
        index = torch.tensor(rows, device=valid_BR.device)

        def own(x_BR: Tensor) -> Tensor:
            return x_BR[index, : valid_BR.shape[1]]

        loss = torch.zeros((), device=valid_BR.device)
        found: dict[str, Tensor] = {}
        if outputs.values_BR is not None:
            returns_BR = own(experience.returns_BR)
            value_loss = ppo_math.value_loss(
                outputs.values_BR,
                own(rollout.values_BR),
                returns_BR,
                valid_BR,
                ppo.value_clip,
                num_valid,
            )
            loss = loss + value_loss * (ppo.vf_coef if self.agent.kind == "shared" else 1.0)
            error_BR = torch.where(valid_BR, outputs.values_BR - returns_BR, 0.0)
            found |= {"value_loss": value_loss, "value_error": error_BR.square().sum()}
        if outputs.logprobs_BR is not None:
            assert outputs.entropy_BR is not None
            policy = ppo_math.policy_loss(
                outputs.logprobs_BR,
                own(rollout.logprobs_BR),
                own(experience.advantages_BR),
                valid_BR,
                ppo.clip_low,
                ppo.clip_high,
                num_valid,
                None if experience.weights_BR is None else own(experience.weights_BR),
                ppo.dual_clip,
            )
            entropy = torch.where(valid_BR, outputs.entropy_BR, 0.0).sum()
            policy_loss = policy.loss - ppo.entropy_coef * entropy / num_valid
            if outputs.ptx_logprobs_BR is not None:
                assert self.ptx is not None
                ptx_loss = -outputs.ptx_logprobs_BR.sum() / self.ptx.tokens_per_step
                policy_loss = policy_loss + ppo.ptx_coef * ptx_loss
                found["ptx_loss"] = ptx_loss
            # a policy in wait still takes part in the exchange of gradients
            loss = loss + policy_loss * (1.0 if train_policy else 0.0)
            found |= {
                "policy_loss": policy.loss,
                "clip_fraction": policy.clipped,
                "approx_kl": policy.approx_kl,
                "entropy": entropy,
                "ratio_max": policy.ratio_max,
            }
            if ppo.dual_clip is not None:
                found["dual_clip_fraction"] = policy.dual_clipped
        return loss, {name: value.detach().float() for name, value in found.items()}

    def _gathered(self, sums: dict[str, Tensor], num_valid: int) -> Metrics:
        """Sums over the micro-batches of all ranks; means over tokens where they are such."""
        ratio_max = sums.pop("ratio_max", None)
        names = list(sums)
        totals = sum_over_ranks(self.accelerator)(torch.stack([sums[name] for name in names]))
        found = dict(zip(names, totals.tolist(), strict=True))
        means = ("clip_fraction", "dual_clip_fraction", "approx_kl", "entropy", "value_error")
        for name in means:
            if name in found:
                found[name] /= num_valid
        if ratio_max is not None:
            found["ratio_max"] = max(gather_list([ratio_max.item()], self.accelerator))
        return found

    # look, choose, save ---------------------------------------------------------------------

    def _validate(self, update: int) -> Metrics:
        """Score the policy on validation prompts, always with the same random numbers; keep the best."""
        # prompts and seeds stay the same, so that only the policy makes a difference
        rollout = self._roll_out(self.validation, "validation", with_gold=True)
        row = rollout_metrics(rollout, self.ppo.kl_coef)
        # the fixed coefficient: an adaptive one would compare updates by different measures
        # and an estimate below 0, which few prompts can give, is no bonus
        penalty = self.ppo.kl_coef * max(row["kl"], 0.0)
        found = {
            "validation_score": row["score"],
            "validation_kl": row["kl"],
            "validation_reward": row["score"] - penalty,
        }
        check_finite(self.out, update, **row)
        if self.models.gold is not None:
            each = validation_row(rollout)
            found["validation_gold"] = mean(each["gold"])
            self.out.validation(update, **each)
        self.keeper.offer(update, found)
        self._show(update, rollout)
        return found

    def _show(self, update: int, rollout: Rollout, count: int = 3) -> None:
        for i in range(min(count, len(self.validation))):
            tokens = rollout.batch.rows([i]).responses_BR[0].tolist()
            self.out.sample(
                update,
                prompt=self.validation[i].prompt.text,
                response=decode_response(self.models.tokenizer, tokens),
                score=rollout.scores_B[i].item(),
            )

    def _save(self) -> None:
        self.checkpoints.save(
            self.update,
            {
                "policy": self.policy_parameters,
                "value": self.value_parameters,
                "policy_optimizer": optimizer_tensors(self.policy_optimizer),
                "value_optimizer": optimizer_tensors(self.value_optimizer),
                **self.keeper.tensors(),
            },
            {
                **self.keeper.state(),
                "kl_coef": self.kl_coef,
                "alarms": self.alarms.state(),
                "cost": self.out.cost,
            },
        )

    def _resume(self) -> bool:
        """Whether there was a checkpoint to go on from."""
        found = self.checkpoints.load_latest()
        if found is None:
            return False
        load_trainable(self.policy_parameters, found.tensors["policy"])
        load_trainable(self.value_parameters, found.tensors["value"])
        load_optimizer(self.policy_optimizer, found.tensors.get("policy_optimizer", {}))
        load_optimizer(self.value_optimizer, found.tensors["value_optimizer"])
        self.keeper.restore(found.tensors, found.state)
        self.alarms.restore(found.state["alarms"])
        self.kl_coef = found.state["kl_coef"]
        self.out.cost.update(found.state["cost"])
        self.update = found.step
        return True


if __name__ == "__main__":
    worker.main()
