"""What grpo and rloo share: TRL's trainers on our ids, our decode loop and our reward.

TRL would tokenise text, sample from one generator for all rows and score decoded text. Here prompts
are the ids that every stage sees, each response has a random stream of its own (so that a resumed run
and another number of processes give the same ones), and the reward model reads the very ids.

Shapes: B rows, R response tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from pipeline.job import Inputs, Metrics, Out
from pipeline.settings import Settings
from pipeline.settings.grpo import GrpoSettings
from pipeline.settings.rloo import RlooSettings
from stages.alarms import Alarms
from stages.chat import decode_response
from stages.checkpoints import Tensors, load_trainable, trainable_tensors
from stages.common import epoch_order, gather_list, num_parameters, own_share, seed_for, start
from stages.engines import HfEngine, Sampling
from stages.models import (
    add_lora,
    contract_of,
    load_causal_lm,
    load_tokenizer,
    positions,
)
from stages.prompts import PromptIds, encode_prompts, load_prompts, longest_prompt, of_split
from stages.rewards import load_learned, load_rewards
from stages.rollout import all_logprobs, make_sequences, mean_repetition
from stages.stops import check_policy, distinct_responses
from stages.trl_checkpoints import LineCallback, Schedule
from stages.trl_runs import make_config, publish, quiet, train

ConfigT = TypeVar("ConfigT", bound=TrainingArguments)
_SHOWN = 3


class OwnRollouts:
    """Goes before a trainer of TRL's among the bases: prompts are ids, `line` answers them."""

    line: OnlineRun

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, Any]:
        return prompts, None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> Any:
        return self.line.respond(prompt_ids)


class OnlineRun:
    """One run of grpo or rloo; with the Trainer's own state, all that a checkpoint holds."""

    trainer: Trainer

    def __init__(
        self, settings: Settings, own: GrpoSettings | RlooSettings, inputs: Inputs, out: Out
    ) -> None:
        self.settings, self.own, self.out = settings, own, out
        self.accelerator: Accelerator = start(settings, out)
        device = self.accelerator.device
        self.tokenizer = load_tokenizer(inputs["model"])
        torch.manual_seed(seed_for(settings.run.seed, out.stage, "adapters"))
        plain = load_causal_lm(inputs["model"])
        self.size = num_parameters(plain)
        self.policy = add_lora(plain, own.lora, "policy")
        self.reference = load_causal_lm(inputs["reference"]).to(device).requires_grad_(False)
        learned = None
        if "reward_model" in inputs:
            learned = load_learned(inputs["reward_model"], own.reward_weight, device)
        contract = contract_of(self.tokenizer, plain)
        self.rewards = load_rewards(
            own, learned, inputs, contract, own.max_response_tokens, out, device
        )
        self.reward_size = sum(num_parameters(m.backbone) for m in self.rewards.models)
        self.alarms = Alarms(out.stage)
        found = load_prompts(inputs["prompts"], settings, out)
        max_tokens = longest_prompt(
            own.max_prompt_tokens, own.max_response_tokens, positions(plain), out
        )
        self.train_prompts, validation = (
            encode_prompts(of_split(found, split, settings), self.tokenizer, max_tokens, out)
            for split in ("train", "validation")
        )
        self.validation: list[PromptIds] = validation[: own.eval_prompts]
        # TRL knows a prompt by its ids only; rules see the conversation
        self.messages = {
            tuple(p.ids): list(p.prompt.messages) for p in (*self.train_prompts, *self.validation)
        }
        self.best: Tensors = {}
        self.best_metrics: Metrics = {"validation_reward": -math.inf}

    # ---- the Trainer ---------------------------------------------------------------------

    def config(self, kind: type[ConfigT], **special: Any) -> ConfigT:
        """The arguments of the trainer; `special`: what only this one knows."""
        own, name = self.own, self.out.stage
        rows = own.prompts_per_step * own.responses_per_prompt
        steps = own.updates * own.epochs
        self.out.derived.update(
            responses_per_step=rows,
            optimizer_steps=steps,
            train_prompts=len(self.train_prompts),
            validation_prompts=len(self.validation),
        )
        return make_config(
            kind,
            self.settings,
            own,
            self.out,
            self.accelerator,
            steps=steps,
            rows=rows,
            rows_key=f"{name}.prompts_per_step x {name}.responses_per_prompt",
            schedule="linear",
            # one row of the log is one update
            logging_steps=own.epochs,
            num_generations=own.responses_per_prompt,
            num_iterations=own.epochs,
            max_completion_length=own.max_response_tokens,
            temperature=own.temperature,
            epsilon=own.clip_low,
            epsilon_high=own.clip_high,
            shuffle_dataset=False,
            # the Trainer would read the reference from the policy's folder: see `train`
            beta=0.0,
            **special,
        )

    def arguments(self, config: TrainingArguments) -> dict[str, Any]:
        """What the trainer is made of."""
        own, out = self.own, self.out
        schedule = Schedule(
            own.updates,
            own.checkpoint_every_updates,
            own.eval_every_updates,
            self.settings.launch.keep_checkpoints,
            own.epochs,
            "update",
            # the start is a candidate too: a policy that is only harmed is not published
            measure_start=True,
        )
        self.callback = LineCallback(out, schedule, self._row_of, self._validate, extra=self)
        seed = self.settings.run.seed
        order = epoch_order(
            len(self.train_prompts),
            0,
            own.updates * own.prompts_per_step,
            seed,
            out.stage,
            out.round,
            "prompts",
        )
        ids = [prompt.ids for prompt in self.train_prompts]
        return {
            "model": self.policy,
            "reward_funcs": self._score,
            "args": config,
            "train_dataset": Dataset.from_dict({"prompt": [ids[i] for i in order]}),
            "processing_class": self.tokenizer,
            "callbacks": [self.callback],
        }

    def train(self, trainer: Any) -> Metrics:
        """Train, publish the best policy, and say how it did."""
        own, out = self.own, self.out
        self.trainer = trainer
        trainer.line = self
        sampling = Sampling.of(own, self.tokenizer)
        self.engine = HfEngine(self.policy, sampling, trainer.accelerator)
        quiet(trainer, out)
        if isinstance(self.policy, PeftModel) and "ref" in self.policy.peft_config:
            # a copy of the fresh adapters, for a reference that we give ourselves
            self.policy.delete_adapter("ref")
        _number_positions(self.policy)
        if own.kl_coef:
            add_fused_lm_head(self.reference, temperature=own.temperature)
            _number_positions(self.reference)
            trainer.beta, trainer.ref_model = own.kl_coef, self.reference
        out.say(
            f"{own.updates} updates x {own.prompts_per_step} prompts x {own.responses_per_prompt}"
            f" responses, {own.epochs} epochs, {len(self.train_prompts)} prompts"
        )
        train(trainer, self.callback, out, own.epochs)
        load_trainable(self.policy, self.best)
        publish(trainer, self.tokenizer, out)
        out.derived["alarms"] = self.alarms.said
        return {"updates": own.updates, **self.best_metrics}

    # ---- rollouts ------------------------------------------------------------------------

    def respond(self, prompts: list[list[int]]) -> list[list[int]]:
        """One response to each prompt of this rank (a prompt comes once for each response)."""
        update = self.trainer.state.global_step // self.own.epochs
        first = self.trainer.accelerator.process_index * len(prompts)
        places = range(first, first + len(prompts))
        responses = self._generate(prompts, [self._seed("rollout", update, i) for i in places])
        read = sum(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        written = sum(len(response) for response in responses)
        counts = gather_list([(read, written)], self.trainer.accelerator)
        self.out.cost["tokens"] += sum(n for _, n in counts)
        # decode, then training; reference and reward model read once
        per_token = (2 + 6 * self.own.epochs) * self.size
        per_token += 2 * num_parameters(self.reference) + 2 * self.reward_size
        self.out.cost["flops"] += float(per_token * sum(n for n, _ in counts))
        return responses

    def _seed(self, *purpose: Any) -> int:
        return seed_for(self.settings.run.seed, self.out.stage, self.out.round, *purpose)

    def _generate(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        return [g.tokens for g in self.engine.generate(prompts, seeds)]

    def _scores(
        self, prompts: list[list[int]], responses: list[list[int]]
    ) -> tuple[list[float], dict[str, Tensor]]:
        """The rewards of responses (token ids, with the end token where they ended), and what each source
        gave them, by name."""
        own, device = self.own, self.accelerator.device
        messages = [self.messages[tuple(prompt)] for prompt in prompts]
        with torch.no_grad(), self.trainer.accelerator.autocast():
            scores_B, parts_B = self.rewards.score(
                prompts, messages, responses, self.tokenizer, device, own, own.rows_per_rank
            )
        return scores_B.tolist(), parts_B

    @property
    def _score(self) -> Any:
        def score(
            prompts: list[list[int]],
            completions: list[str],
            completion_ids: list[list[int]],
            log_metric: Any,
            **_: Any,
        ) -> list[float]:
            """TRL calls it, and names the metric after it."""
            ended = [ids[-1] == self.tokenizer.eos_token_id for ids in completion_ids]
            log_metric("eos_rate", sum(ended) / len(ended))
            log_metric("repetition", mean_repetition(completion_ids))
            log_metric("distinct_responses", distinct_responses(completion_ids))
            scores, parts_B = self._scores(prompts, completion_ids)
            if len(parts_B) > 1:
                for name, part_B in parts_B.items():
                    log_metric(f"score/{name}", part_B.mean().item())
            return scores

        return score

    # ---- look, choose, save --------------------------------------------------------------

    def _row_of(self, logs: Metrics) -> Metrics:
        """Our names and units: kl is nats a response, TRL's is nats a token."""
        tokens, score = logs["completions/mean_length"], logs["rewards/score/mean"]
        row = {"score": score, **{k: v for k, v in logs.items() if k.startswith("score/")}}
        if "kl" in logs:
            kl = logs["kl"] * tokens
            row |= {"kl": kl, "reward": score - self.own.kl_coef * kl}
        row |= {
            "entropy": logs["entropy"],
            "response_tokens": tokens,
            "eos_rate": logs["eos_rate"],
            "repetition": logs["repetition"],
            "distinct_responses": logs["distinct_responses"],
            "loss": logs["loss"],
            "score_std": logs["rewards/score/std"],
            "equal_groups": logs["frac_reward_zero_std"],
            "clip_fraction": logs["clip_ratio/region_mean"],
            "grad_norm": logs["grad_norm"],
            "lr": logs["learning_rate"],
        }
        update = self.trainer.state.global_step // self.own.epochs
        for alarm in self.alarms.check(update, row):
            self.out.say(f"WARNING at update {update}: {alarm}")
        row["alarms"] = len(self.alarms.holding)
        check_policy(self.out, update, row, self.own, self.alarms)
        return row

    def _validate(self, update: int) -> Metrics:
        """Score the policy on validation prompts, always with the same random numbers; keep the best."""
        accelerator = self.trainer.accelerator
        share = own_share(len(self.validation), accelerator)
        prompts = [self.validation[i].ids for i in share]
        rows: list[tuple[list[int], float, float]] = []
        if prompts:
            # the seeds of ppo: both start from the same responses, and can be compared
            run_seed, round = self.settings.run.seed, self.out.round
            seeds = [seed_for(run_seed, "ppo", round, "validation", i) for i in share]
            responses = self._generate(prompts, seeds)
            scores, _ = self._scores(prompts, responses)
            rows = list(zip(responses, scores, self._kl(prompts, responses), strict=True))
        rows = gather_list(rows, accelerator)
        score = math.fsum(row[1] for row in rows) / len(rows)
        kl = math.fsum(row[2] for row in rows) / len(rows)
        # an estimate below 0, which few prompts can give, is no bonus
        reward = score - self.own.kl_coef * max(kl, 0.0)
        found = {"validation_score": score, "validation_kl": kl, "validation_reward": reward}
        if reward > self.best_metrics["validation_reward"]:
            self.best = {k: v.detach().clone() for k, v in trainable_tensors(self.policy).items()}
            self.best_metrics = {"best_update": update, **found}
        self._show(update, rows[:_SHOWN])
        return found

    def _kl(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        """sum_t log p/q of each response, on the policy's own samples (k1), in nats."""
        device, pad_id = self.policy.device, self.tokenizer.pad_token_id
        batch = make_sequences(prompts, responses, pad_id, device)

        def logprobs_under(model: nn.Module) -> Tensor:
            return all_logprobs(model, batch, self.own.temperature, self.own.rows_per_rank)

        training = self.policy.training
        self.policy.eval()
        with self.trainer.accelerator.autocast():
            difference_BR = logprobs_under(self.policy) - logprobs_under(self.reference)
        self.policy.train(training)
        kl: list[float] = torch.where(batch.valid_BR, difference_BR, 0.0).sum(-1).tolist()
        return kl

    def _show(self, update: int, rows: list[tuple[list[int], float, float]]) -> None:
        for prompt, (tokens, score, _) in zip(self.validation, rows, strict=False):
            text = decode_response(self.tokenizer, tokens)
            self.out.sample(update, prompt=prompt.prompt.text, response=text, score=score)

    def write(self, folder: Path) -> None:
        """Into a checkpoint: the best policy so far, and what it cost."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.best.items()}
        save_file(tensors, folder / "best.safetensors")
        state = {
            "best_metrics": self.best_metrics,
            "cost": self.out.cost,
            "alarms": self.alarms.state(),
        }
        (folder / "line.json").write_text(json.dumps(state), encoding="utf-8")

    def read(self, folder: Path) -> None:
        """From a checkpoint: what `write` wrote."""
        state = json.loads((folder / "line.json").read_text(encoding="utf-8"))
        self.best = load_file(folder / "best.safetensors", device=str(self.accelerator.device))
        self.best_metrics = state["best_metrics"]
        self.out.cost.update(state["cost"])
        self.alarms.restore(state["alarms"])


def _number_positions(model: PreTrainedModel | PeftModel) -> None:
    """Count positions from the first real token in every forward with a mask and without positions.

    TRL's training forward pads prompts on the left and passes a mask only; a model with learned
    positions would then be trained at other positions than it generates at. RoPE hides this.
    """

    def count(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("position_ids") is None:
            kwargs = {**kwargs, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        return args, kwargs

    model.register_forward_pre_hook(count, with_kwargs=True)
