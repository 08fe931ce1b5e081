"""Rollout engines: what samples the responses of PPO, behind one small interface.

hf is our decode loop (stages/generation.py). continuous is the paged batching of transformers, with
finished rows replaced at once. vllm is a server of the user's. docs/engines.md compares them.

All sample from softmax(logits / temperature), unfiltered, end at the end token or after
`max_response_tokens`, and never touch the weights that are trained.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from pipeline.errors import ConfigError, StageError
from pipeline.settings.online import OnlineSettings
from pipeline.settings.ppo import PpoSettings
from pipeline.settings.rollout import RolloutSettings
from stages.common import seed_for
from stages.generation import Generated, generate
from stages.rollout import make_sequences, response_logprobs
from stages.sharding import in_shards, state_of, whole
from stages.vllm_client import VllmClient

_PAGE_TOKENS = 16  # of the paged cache; large pages are mostly empty at short responses
_PREFILL_TOKENS = 1024  # of one forward of the continuous engine
_CHECKED_ROWS = 4  # responses of a rollout whose logprobs are compared with the policy's


@dataclass(frozen=True)
class Sampling:
    """What every engine samples: see `stages.generation.generate`.

    rows_at_once: responses decoded at the same time by one process (memory, not result).
    """

    eos_id: int
    pad_id: int
    max_response_tokens: int
    temperature: float
    rows_at_once: int

    @classmethod
    def of(cls, own: PpoSettings | OnlineSettings, tokenizer: PreTrainedTokenizerBase) -> Sampling:
        """As the settings of ppo, grpo or rloo ask for it."""
        return cls(
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            max_response_tokens=own.max_response_tokens,
            temperature=own.temperature,
            rows_at_once=own.rows_per_rank,
        )


class Engine(Protocol):
    """Samples responses from the policy as it was at the last `update`.

    same_logprobs: True where `Generated.logprobs` may stand for those of the trainer's own forward
    (measured in fp32: 1e-6). Where False, the trainer recomputes them, and weighs its loss by
    `ppo_math.truncated_importance` of the two. `Generated.values` is empty where an engine has none.
    """

    same_logprobs: bool

    def generate(self, prompts: list[list[int]], seeds: list[int]) -> list[Generated]:
        """One response for each prompt of this process, in their order; not before `update`."""
        ...

    def update(self, policy: PreTrainedModel | PeftModel) -> None:
        """Sample from these weights from now on; called by all processes, at the start too."""
        ...

    def close(self) -> None:
        """Give back what the engine holds; it can be called twice."""
        ...


def make_engine(
    settings: RolloutSettings,
    policy: PreTrainedModel | PeftModel,
    sampling: Sampling,
    accelerator: Accelerator,
    folder: Path,
    value_head: nn.Module | None = None,
) -> Engine:
    """The engine that the settings ask for. Call its `update(policy)` before the first `generate`.

    policy: not wrapped for several processes. folder: for weights on their way to a server.
    value_head: see `stages.generation.generate`; only hf reads it.

    Raises:
        StageError: the vLLM server cannot be reached, or was started otherwise than we need.
        ConfigError: continuous with a policy in shards.
    """
    if settings.engine == "continuous":
        if in_shards(policy):
            raise ConfigError(
                "ppo.rollout.engine: continuous cannot sample from a policy in shards, because it"
                " computes in a thread of its own",
                "Use ppo.rollout.engine=hf or vllm, or launch.profile=ddp.",
            )
        return ContinuousEngine(policy, sampling, accelerator)
    if settings.engine == "vllm":
        return VllmEngine(settings, policy, sampling, accelerator, folder)
    return HfEngine(policy, sampling, accelerator, value_head)


def _in_full(accelerator: Accelerator) -> bool:
    """Whether to decode in fp32: bf16 makes no CPU decode faster, and its rounding depends on the
    shape of the batch, so that its logprobs are not those of a whole forward."""
    return accelerator.mixed_precision == "no" or accelerator.device.type == "cpu"


class HfEngine:
    """Our decode loop on the policy itself, with the trainer's autocast on a GPU.

    Where training is in bf16 its logprobs are not those of the training forward, and the ratio of an
    unchanged policy has to be 1: they are computed again.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        sampling: Sampling,
        accelerator: Accelerator,
        value_head: nn.Module | None = None,
    ) -> None:
        self.same_logprobs = accelerator.mixed_precision == "no"
        self._in_full = _in_full(accelerator)
        self._policy, self._sampling, self._value_head = policy, sampling, value_head
        self._accelerator = accelerator

    def generate(self, prompts: list[list[int]], seeds: list[int]) -> list[Generated]:
        s = self._sampling
        with nullcontext() if self._in_full else self._accelerator.autocast():
            return generate(
                self._policy,
                prompts,
                seeds,
                eos_id=s.eos_id,
                pad_id=s.pad_id,
                max_response_tokens=s.max_response_tokens,
                temperature=s.temperature,
                rows_at_once=s.rows_at_once,
                value_head=self._value_head,
            )

    def update(self, policy: PreTrainedModel | PeftModel) -> None:
        self._policy = policy

    def close(self) -> None:
        pass


class ContinuousEngine:
    """Continuous batching of transformers (`generate_batch` and what stands behind it).

    It runs the policy itself, but where training is in bf16 on a GPU a bf16 copy: its worker thread
    does not see the trainer's autocast, and casting the policy would train bf16 weights for good.
    The random numbers belong to a call, not to a row: the same prompts and seeds in the same order
    give the same responses.
    """

    def __init__(
        self, policy: PreTrainedModel | PeftModel, sampling: Sampling, accelerator: Accelerator
    ) -> None:
        self.same_logprobs = accelerator.mixed_precision == "no"
        self._in_full = _in_full(accelerator)
        self._sampling = sampling
        self._model = _plain(policy)
        if not self._in_full:
            copy = AutoModelForCausalLM.from_config(_plain(policy).config, dtype=torch.bfloat16)
            self._model = copy.to(policy.device).eval().requires_grad_(False)

    def update(self, policy: PreTrainedModel | PeftModel) -> None:
        if self._in_full:
            self._model = _plain(policy)
        else:
            with whole(policy):
                self._model.load_state_dict(plain_weights(policy))

    def generate(self, prompts: list[list[int]], seeds: list[int]) -> list[Generated]:
        if not prompts:
            return []
        was_training = self._model.training
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        # it seeds torch's global generator
        with torch.random.fork_rng(devices=devices):
            try:
                return self._run(prompts, seed_for(len(seeds), *seeds))
            finally:
                self._model.train(was_training)

    def _run(self, prompts: list[list[int]], seed: int) -> list[Generated]:
        s = self._sampling
        rows = min(len(prompts), s.rows_at_once)
        longest = max(len(prompt) for prompt in prompts) + s.max_response_tokens
        sampled = {"temperature": s.temperature} if s.temperature > 0 else {}
        manager = self._model.init_continuous_batching(
            # nothing of the model's own generation_config: it may hold penalties and filters
            generation_config=GenerationConfig(
                max_new_tokens=s.max_response_tokens,
                do_sample=s.temperature > 0,
                eos_token_id=s.eos_id,
                pad_token_id=s.pad_id,
                **sampled,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE_TOKENS,
                num_blocks=rows * math.ceil(longest / _PAGE_TOKENS) + 1,
                max_batch_tokens=max(rows, _PREFILL_TOKENS),
                max_requests_per_batch=rows,
                return_logprobs=True,
                seed=seed,
                # flash attention reads half precision only
                auto_switch_to_flash=self._model.dtype != torch.float32,
            ),
        )
        try:
            # before the start, so that the batches do not depend on how fast the thread wakes up
            names = manager.add_requests(prompts, max_new_tokens=s.max_response_tokens)
            manager.warmup()
            manager.start()
            found: dict[str, GenerationOutput] = {}
            while len(found) < len(names):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    break
                if result is not None and result.is_finished():
                    found[result.request_id] = result
        finally:
            manager.stop(block=True)
            manager.destroy()
        failed = [found[n].error if n in found else "no result" for n in names]
        if problem := next((text for n, text in zip(names, failed, strict=True) if text), None):
            raise StageError(
                f"continuous batching gave {len(names) - sum(map(bool, failed))} of {len(names)}"
                f" responses: {problem}",
                "This model may not be supported by it; use ppo.rollout.engine=hf.",
            )
        return [
            Generated(r.generated_tokens, r.logprobs, r.generated_tokens[-1] == s.eos_id)
            for r in (found[name] for name in names)
        ]

    def close(self) -> None:
        pass


class VllmEngine:
    """A vLLM server; rank 0 hands it the weights, every rank asks for its own responses."""

    same_logprobs = False

    def __init__(
        self,
        settings: RolloutSettings,
        policy: PreTrainedModel | PeftModel,
        sampling: Sampling,
        accelerator: Accelerator,
        folder: Path,
    ) -> None:
        self._client = VllmClient(settings.vllm_url, settings.vllm_timeout_seconds)
        self._client.connect()
        self._requests = settings.vllm_requests
        self._sampling, self._accelerator = sampling, accelerator
        self._vocab_size = int(policy.get_input_embeddings().weight.shape[0])
        chosen = Path(settings.vllm_weights_dir) if settings.vllm_weights_dir else folder
        # absolute: the server was started elsewhere
        self._folder = chosen.resolve() / "vllm-weights"
        self._max_gap = settings.vllm_max_gap
        self._policy = policy
        self._updates = 0

    def update(self, policy: PreTrainedModel | PeftModel) -> None:
        self._policy = policy
        # a fresh name each time: neither side may find what it cached under the last one
        current = self._folder / str(self._updates)
        with whole(policy):
            if self._accelerator.is_main_process:
                shutil.rmtree(current, ignore_errors=True)
                save_plain(policy, current)
        if self._accelerator.is_main_process:
            self._client.load_weights(current)
            # the server has read it: the next one may be long in coming
            shutil.rmtree(current)
        self._updates += 1
        self._accelerator.wait_for_everyone()

    def generate(self, prompts: list[list[int]], seeds: list[int]) -> list[Generated]:
        assert self._updates, "the server may hold any weights before the first update"
        s = self._sampling

        def respond(prompt: list[int], seed: int) -> Generated:
            return self._client.complete(
                prompt,
                seed,
                eos_id=s.eos_id,
                vocab_size=self._vocab_size,
                max_response_tokens=s.max_response_tokens,
                temperature=s.temperature,
            )

        generated = _in_threads(respond, prompts, seeds, self._requests)
        self._check(prompts[:_CHECKED_ROWS], generated[:_CHECKED_ROWS])
        return generated

    @torch.no_grad()
    def _check(self, prompts: list[list[int]], generated: list[Generated]) -> None:
        """Refuse logprobs that are not the policy's.

        A server may say that it took weights and yet compute with others: vLLM 0.32 on a CPU keeps
        a packed copy of an output layer that is tied to the embeddings.
        """
        if not generated:
            return
        s, device = self._sampling, self._policy.device
        batch = make_sequences(prompts, [g.tokens for g in generated], s.pad_id, device)
        # temperature 0 takes the best token, and reports it at temperature 1
        with self._accelerator.autocast():
            logprobs_BR, _ = response_logprobs(self._policy, batch, s.temperature or 1.0)
        theirs = torch.tensor([x for g in generated for x in g.logprobs], device=device)
        gap = (logprobs_BR[batch.valid_BR] - theirs).abs().mean().item()
        if not gap <= self._max_gap:
            raise StageError(
                f"{self._client.url}: the server's logprobs are {gap:.3g} nats a token from the"
                f" policy's, on average (ppo.rollout.vllm_max_gap is {self._max_gap:g})",
                "It does not compute with the weights that it was given: see docs/engines.md.",
            )

    def close(self) -> None:
        if self._accelerator.is_main_process:
            shutil.rmtree(self._folder, ignore_errors=True)


def _in_threads(
    function: Callable[[list[int], int], Generated],
    prompts: list[list[int]],
    seeds: list[int],
    threads: int,
) -> list[Generated]:
    """`function` of each (prompt, seed), in their order; the first error ends it all."""
    over = Event()

    def guarded(prompt: list[int], seed: int) -> Generated:
        # a dead server is not asked for all the remaining prompts
        if over.is_set():
            raise CancelledError
        try:
            return function(prompt, seed)
        except BaseException:
            over.set()
            raise

    pool = ThreadPoolExecutor(threads)
    try:
        jobs = [pool.submit(guarded, *both) for both in zip(prompts, seeds, strict=True)]
        errors = [job.exception() for job in jobs]
    finally:
        over.set()
        pool.shutdown()
    for error in errors:
        if error is not None and not isinstance(error, CancelledError):
            raise error
    return [job.result() for job in jobs]


# ---- weights -------------------------------------------------------------------------------


def _plain(policy: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model that holds the adapters, or the policy itself."""
    model = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    assert isinstance(model, PreTrainedModel)
    return model


@torch.no_grad()
def plain_weights(policy: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """The state dict of the policy without adapters: the active ones are added in copies.

    Not `merge_adapter`: what it adds to the policy cannot be taken back to the last bit.
    """
    model = _plain(policy)
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    weights: dict[str, Tensor] = {}
    for key, tensor in state_of(model).items():
        owner = next((name for name in adapted if key.startswith(f"{name}.")), None)
        if owner is None:
            weights[key] = tensor
            continue
        inner = key.removeprefix(f"{owner}.")
        if not inner.startswith("base_layer."):
            continue  # a part of an adapter
        if inner == "base_layer.weight":
            for adapter in adapted[owner].active_adapters:
                tensor = tensor + adapted[owner].get_delta_weight(adapter).to(tensor)
        weights[f"{owner}.{inner.removeprefix('base_layer.')}"] = tensor
    return weights


def save_plain(policy: PreTrainedModel | PeftModel, folder: Path) -> None:
    """An HF folder of the policy's config and `plain_weights`, as safetensors."""
    folder.mkdir(parents=True)
    _plain(policy).save_pretrained(folder, state_dict=plain_weights(policy))
