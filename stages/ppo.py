"""ppo: optimise the policy against the reward model, held near the reference by a KL penalty.

Reads: `model` (what the policy starts from), `reference` (sft), `reward_model`, `prompts`.
Writes a `policy`: a plain HF folder, the best one by reward on validation prompts.

    prefline ppo RUN ppo.updates=200 ppo.kl_coef=0.05

One update: (1) one response for each of `ppo.prompts_per_step` prompts; (2) reward-model scores,
reference logprobs and values; (3) KL-penalised rewards, advantages, whitening; (4) `ppo.epochs` passes
of clipped policy and value losses. The value model starts as the reward model.

Metrics (healthy range): score (rises), kl in nats a response (rises, then levels off; above ~10 the
reward model is being gamed), reward = score - kl_coef * kl (rises), entropy in nats a token (falls
slowly; near 0 is collapse), response_tokens, eos_rate (> 0.9), clip_fraction (0.02 to 0.3),
ratio_max, approx_kl old to new (< 0.02 a token), explained_variance (towards 1), policy_loss,
value_loss, *_grad_norm; validation_score, validation_kl, validation_reward decide which policy is kept.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline import worker
from pipeline.job import Inputs, Metrics, Out
from pipeline.records import canonical_json
from pipeline.settings import Settings
from stages import ppo_math
from stages.chat import decode_response
from stages.checkpoints import (
    Checkpointer,
    Tensors,
    load_optimizer,
    load_trainable,
    optimizer_tensors,
    trainable_tensors,
)
from stages.common import (
    adamw,
    check_finite,
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
from stages.experience import Models, Rollout, roll_out
from stages.models import (
    add_lora,
    backbone_and_head,
    contract_of,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    merge_lora,
    positions,
    save_model,
)
from stages.prompts import PromptIds, encode_prompts, load_prompts, longest_prompt, of_split
from stages.rollout import ValueModel, in_micro_batches, response_logprobs


class Experience(NamedTuple):
    """A rollout with what the losses need: whitened advantages and returns, `[B, R]`."""

    rollout: Rollout
    advantages_BR: Tensor
    returns_BR: Tensor


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    accelerator = start(settings, out)
    models = _load_models(settings, inputs, accelerator)
    prompts = load_prompts(inputs["prompts"], settings, out)
    max_tokens = longest_prompt(
        settings.ppo.max_prompt_tokens,
        settings.ppo.max_response_tokens,
        positions(models.reference),
        out,
    )
    train, validation = (
        encode_prompts(of_split(prompts, split, settings), models.tokenizer, max_tokens, out)
        for split in ("train", "validation")
    )
    validation = validation[: settings.ppo.eval_prompts]
    loop = _Loop(settings, models, train, validation, accelerator, out)
    loop.run()

    load_trainable(models.policy, loop.best)
    policy = merge_lora(models.policy)
    if out.rank == 0:
        save_model(policy, models.tokenizer, out.artifact)
    out.contract.update(contract_of(models.tokenizer, policy))
    return {"updates": settings.ppo.updates, **loop.best_metrics}


def _load_models(settings: Settings, inputs: Inputs, accelerator: Accelerator) -> Models:
    device = accelerator.device
    tokenizer = load_tokenizer(inputs["model"])
    torch.manual_seed(seed_for(settings.run.seed, "ppo", "adapters"))
    policy = add_lora(load_causal_lm(inputs["model"]), settings.ppo.lora, "policy").to(device)
    reference = load_causal_lm(inputs["reference"]).to(device).eval().requires_grad_(False)
    reward = load_reward_model(inputs["reward_model"]).to(device).eval().requires_grad_(False)
    contract = inputs["reward_model"].contract
    mean, std = contract["score_mean"], contract["score_std"]
    value = ValueModel(*backbone_and_head(load_reward_model(inputs["reward_model"])), mean, std)
    value = value.to(device)
    # dropout would make the ratio of an unchanged policy differ from 1
    policy.eval()
    value.eval()
    return Models(
        policy=policy,
        reference=reference,
        reward=reward,
        value=value,
        wrapped_policy=accelerator.prepare_model(policy),
        wrapped_value=accelerator.prepare_model(value),
        tokenizer=tokenizer,
        score_mean=mean,
        score_std=std,
    )


class _Loop:
    """The state that PPO carries from update to update; all of it is in a checkpoint."""

    def __init__(
        self,
        settings: Settings,
        models: Models,
        train: list[PromptIds],
        validation: list[PromptIds],
        accelerator: Accelerator,
        out: Out,
    ) -> None:
        ppo = settings.ppo
        self.settings, self.ppo, self.models = settings, ppo, models
        self.train, self.validation = train, validation
        self.accelerator, self.out = accelerator, out
        self.minibatch_rows = ppo.minibatch_rows or ppo.prompts_per_step
        self.num_minibatches = exact_div(
            ppo.prompts_per_step, self.minibatch_rows, "ppo.prompts_per_step"
        )
        exact_div(self.minibatch_rows, out.world_size, "ppo.minibatch_rows")
        self.total_steps = ppo.updates * ppo.epochs * self.num_minibatches
        self.policy_optimizer = adamw(models.policy, ppo.lr, 0.0, eps=1e-5)
        self.value_optimizer = adamw(models.value, ppo.value_lr or ppo.lr, 0.0, eps=1e-5)
        self.checkpoints = Checkpointer(out, settings.launch.keep_checkpoints, accelerator)
        self.sizes = {
            "policy": num_parameters(models.policy),
            "value": num_parameters(models.value),
        }
        self.kl_coef = ppo.kl_coef
        self.update = 0
        self.best: Tensors = {}
        self.best_metrics: Metrics = {"validation_reward": -math.inf}
        out.derived.update(
            prompts_per_step=ppo.prompts_per_step,
            minibatch_rows=self.minibatch_rows,
            optimizer_steps=self.total_steps,
            train_prompts=len(train),
            validation_prompts=len(validation),
        )
        out.say(
            f"{ppo.updates} updates x {ppo.prompts_per_step} rollouts, {ppo.epochs} epochs x"
            f" {self.num_minibatches} minibatches, {len(train)} prompts"
        )

    def run(self) -> None:
        if not self._resume():
            # the start is a candidate too: a policy that PPO only harms is not published
            self.out.log(0, self._validate(0))
        while self.update < self.ppo.updates:
            stop_if_asked(self.accelerator, self.out, self._save)
            # 1 respond, 2 score
            rollout = self._roll_out(
                [self.train[i] for i in self._picked()], "rollout", self.update
            )
            row = self._rollout_metrics(rollout)
            # 3 rewards and advantages
            experience = self._experience(rollout)
            row["explained_variance"] = ppo_math.explained_variance(
                rollout.values_BR, experience.returns_BR, rollout.batch.valid_BR
            ).item()
            # 4 optimise
            row |= self._optimise(experience)
            self._spend(rollout, 6 * self.ppo.epochs * sum(self.sizes.values()))
            check_finite(self.update + 1, "ppo", **row)
            self.update += 1
            if self.ppo.kl_control == "adaptive":
                self.kl_coef = ppo_math.adaptive_kl(
                    self.kl_coef,
                    row["kl"],
                    self.ppo.kl_target,
                    self.ppo.prompts_per_step,
                    self.ppo.kl_horizon,
                )
            last = self.update == self.ppo.updates
            if self.update % self.ppo.eval_every_updates == 0 or last:
                row |= self._validate(self.update)
            self.out.log(self.update, row)
            self.out.progress(self.update, self.ppo.updates, "update")
            if self.update % self.ppo.checkpoint_every_updates == 0 and not last:
                self._save()

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

    def _roll_out(self, prompts: list[PromptIds], *purpose: Any) -> Rollout:
        seeds = [self._seed(*purpose, i) for i in range(len(prompts))]
        rollout = roll_out(self.models, [p.ids for p in prompts], seeds, self.ppo, self.accelerator)
        self.out.cost["tokens"] += int(rollout.batch.response_tokens_B.sum())
        # the policy reads each token once while it decodes, the other three score it
        self._spend(rollout, 2 * self.sizes["policy"] + 6 * self.sizes["value"])
        return rollout

    def _spend(self, rollout: Rollout, flops_per_token: int) -> None:
        lengths_B = rollout.batch.prompt_tokens_B + rollout.batch.response_tokens_B
        self.out.cost["flops"] += float(lengths_B.sum()) * flops_per_token

    def _experience(self, rollout: Rollout) -> Experience:
        valid_BR = rollout.batch.valid_BR
        rewards_BR = ppo_math.kl_penalised_rewards(
            rollout.scores_B, rollout.logprobs_BR, rollout.ref_logprobs_BR, valid_BR, self.kl_coef
        )
        advantages_BR, returns_BR = ppo_math.gae_advantages(
            rewards_BR, rollout.values_BR, valid_BR, self.ppo.gamma, self.ppo.lam
        )
        if self.ppo.whiten_advantages:
            # over the rows of all ranks: every rank holds the whole rollout
            advantages_BR = ppo_math.whiten(advantages_BR, valid_BR)
        return Experience(rollout, advantages_BR, returns_BR)

    def _optimise(self, experience: Experience) -> Metrics:
        """`epochs` passes over the rollout; averages over all their tokens for the log."""
        ppo = self.ppo
        totals: dict[str, float] = {}
        step = self.update * ppo.epochs * self.num_minibatches
        for epoch in range(ppo.epochs):
            order = permutation(
                ppo.prompts_per_step, self.settings.run.seed, "ppo", self.update, epoch
            )
            for at in range(0, ppo.prompts_per_step, self.minibatch_rows):
                factor = warmup_linear(step, self.total_steps, ppo.warmup_fraction)
                set_lr(self.policy_optimizer, ppo.lr * factor)
                set_lr(self.value_optimizer, (ppo.value_lr or ppo.lr) * factor)
                stats = self._minibatch(experience, order[at : at + self.minibatch_rows])
                for name, value in stats.items():
                    best = max(totals.get(name, 0.0), value)
                    totals[name] = best if name.endswith("_max") else totals.get(name, 0.0) + value
                step += 1
        steps = ppo.epochs * self.num_minibatches
        row = {k: v if k.endswith("_max") else v / steps for k, v in totals.items()}
        return {**row, "lr": ppo.lr * factor}

    def _minibatch(self, experience: Experience, rows: list[int]) -> Metrics:
        """One optimiser step of policy and value model over the minibatch rows of all ranks."""
        ppo, models, accelerator = self.ppo, self.models, self.accelerator
        rollout, world = experience.rollout, accelerator.num_processes
        lengths_B = rollout.batch.prompt_tokens_B + rollout.batch.response_tokens_B
        index = torch.tensor(rows, device=lengths_B.device)
        num_valid = int(rollout.batch.response_tokens_B[index].sum())
        own = rows[accelerator.process_index :: world]
        parts = list(in_micro_batches(lengths_B[own].tolist(), ppo.rows_per_rank, lengths_B.device))
        train_policy = self.update >= ppo.value_warmup_updates
        sums = torch.zeros(6, device=lengths_B.device)
        ratio_max = 0.0
        for number, part in enumerate(parts):
            with contextlib.ExitStack() as stack:
                if number < len(parts) - 1:
                    # gradients are exchanged once, in the last micro-batch
                    stack.enter_context(accelerator.no_sync(models.wrapped_policy))
                    stack.enter_context(accelerator.no_sync(models.wrapped_value))
                stack.enter_context(accelerator.autocast())
                stats = self._backward(experience, [own[i] for i in part], num_valid, train_policy)
            sums += stats
            ratio_max = max(ratio_max, stats[5].item())
        policy_norm = value_norm = 0.0
        if train_policy:
            policy_norm = clip_gradients(models.policy, ppo.max_grad_norm)
            self.policy_optimizer.step()
        value_norm = clip_gradients(models.value, ppo.max_grad_norm)
        self.value_optimizer.step()
        self.policy_optimizer.zero_grad(set_to_none=True)
        self.value_optimizer.zero_grad(set_to_none=True)
        totals = sum_over_ranks(accelerator)(sums).tolist()
        return {
            "policy_loss": totals[0],
            "value_loss": totals[1],
            "clip_fraction": totals[2] / num_valid,
            "approx_kl": totals[3] / num_valid,
            "entropy": totals[4] / num_valid,
            "ratio_max": max(gather_list([ratio_max], accelerator)),
            "policy_grad_norm": policy_norm,
            "value_grad_norm": value_norm,
        }

    def _backward(
        self, experience: Experience, rows: list[int], num_valid: int, train_policy: bool
    ) -> Tensor:
        """Add one micro-batch's gradients; (policy loss, value loss, clipped, kl, entropy, ratio)."""
        ppo, models = self.ppo, self.models
        rollout, world = experience.rollout, self.accelerator.num_processes
        batch = rollout.batch.rows(rows)
        valid_BR = batch.valid_BR
        R = valid_BR.shape[1]

        def own(x_BR: Tensor) -> Tensor:
            return x_BR[torch.tensor(rows, device=x_BR.device), :R]

        values_BR = models.wrapped_value(batch.tokens_BT, batch.predict_BR)
        value_loss = ppo_math.value_loss(
            values_BR,
            own(rollout.values_BR),
            own(experience.returns_BR),
            valid_BR,
            ppo.value_clip,
            num_valid,
        )
        # gradients are averaged over ranks, while num_valid counts the tokens of all of them
        self.accelerator.backward(value_loss * world)
        logprobs_BR, entropy_BR = response_logprobs(
            models.wrapped_policy, batch, ppo.temperature, with_entropy=True
        )
        loss = ppo_math.policy_loss(
            logprobs_BR,
            own(rollout.logprobs_BR),
            own(experience.advantages_BR),
            valid_BR,
            ppo.clip_low,
            ppo.clip_high,
            num_valid,
        )
        if train_policy:
            self.accelerator.backward(loss.loss * world)
        assert entropy_BR is not None
        entropy = torch.where(valid_BR, entropy_BR, 0.0).sum()
        parts = (loss.loss, value_loss, loss.clipped, loss.approx_kl, entropy, loss.ratio_max)
        return torch.stack([part.detach().float() for part in parts])

    # look, choose, save ---------------------------------------------------------------------

    def _rollout_metrics(self, rollout: Rollout) -> Metrics:
        valid_BR = rollout.batch.valid_BR
        kl = ppo_math.kl_estimates(rollout.logprobs_BR, rollout.ref_logprobs_BR, valid_BR)
        score, kl_nats = rollout.scores_B.mean().item(), kl.k1_BR.sum(-1).mean().item()
        return {
            "score": score,
            "kl": kl_nats,
            "kl_k3": kl.k3_BR.sum(-1).mean().item(),
            "reward": score - self.kl_coef * kl_nats,
            "kl_coef": self.kl_coef,
            "response_tokens": rollout.batch.response_tokens_B.float().mean().item(),
            "eos_rate": rollout.ended_B.float().mean().item(),
        }

    def _validate(self, update: int) -> Metrics:
        """Score the policy on validation prompts, always with the same random numbers; keep the best."""
        # prompts and seeds stay the same, so that only the policy makes a difference
        rollout = self._roll_out(self.validation, "validation")
        row = self._rollout_metrics(rollout)
        # the fixed coefficient: an adaptive one would compare updates by different measures
        # and an estimate below 0, which few prompts can give, is no bonus
        reward = row["score"] - self.ppo.kl_coef * max(row["kl"], 0.0)
        found = {
            "validation_score": row["score"],
            "validation_kl": row["kl"],
            "validation_reward": reward,
        }
        if reward > self.best_metrics["validation_reward"]:
            self.best = {
                k: v.detach().clone() for k, v in trainable_tensors(self.models.policy).items()
            }
            self.best_metrics = {"best_update": update, **found}
        self._show(update, rollout)
        return found

    def _show(self, update: int, rollout: Rollout, count: int = 3) -> None:
        if self.out.rank != 0:
            return
        with (self.out.work / "samples.jsonl").open("a", encoding="utf-8") as file:
            for i in range(min(count, len(self.validation))):
                tokens = rollout.batch.rows([i]).responses_BR[0].tolist()
                row = {
                    "step": update,
                    "prompt": self.validation[i].prompt.text,
                    "response": decode_response(self.models.tokenizer, tokens),
                    "score": rollout.scores_B[i].item(),
                }
                file.write(canonical_json(row) + "\n")

    def _save(self) -> None:
        self.checkpoints.save(
            self.update,
            {
                "policy": trainable_tensors(self.models.policy),
                "value": trainable_tensors(self.models.value),
                "policy_optimizer": optimizer_tensors(self.policy_optimizer),
                "value_optimizer": optimizer_tensors(self.value_optimizer),
                "best": self.best,
            },
            {"kl_coef": self.kl_coef, "best_metrics": self.best_metrics, "cost": self.out.cost},
        )

    def _resume(self) -> bool:
        """Whether there was a checkpoint to go on from."""
        found = self.checkpoints.load_latest()
        if found is None:
            return False
        device = self.accelerator.device
        load_trainable(self.models.policy, found.tensors["policy"])
        load_trainable(self.models.value, found.tensors["value"])
        load_optimizer(self.policy_optimizer, found.tensors.get("policy_optimizer", {}))
        load_optimizer(self.value_optimizer, found.tensors["value_optimizer"])
        self.best = {name: tensor.to(device) for name, tensor in found.tensors["best"].items()}
        self.best_metrics = found.state["best_metrics"]
        self.kl_coef = found.state["kl_coef"]
        self.out.cost.update(found.state["cost"])
        self.update = found.step
        return True


if __name__ == "__main__":
    worker.main()
