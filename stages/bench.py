"""What the planner measures with: a configuration's own model (or one of fewer layers), its data, a place
to work in."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from pipeline import scaling
from pipeline.job import Input, Job, Metrics, Out
from pipeline.scaling import Memory, ModelSize
from pipeline.settings import LoraSettings, Settings
from stages.models import load_causal_lm, load_tokenizer, save_model
from stages.probes import Seconds, measure
from stages.rollout import tokens_at_once
from stages.sizes import count, kept_for_backward
from stages.workload import Workload

# forward and backward of this many tokens should take no longer than this, else layers are left out
_PROBE_TOKENS, _PROBE_SECONDS = 512, 1.0


class QuietOut(Out):
    """Where a stage's helpers write while they are measured; nobody reads it."""

    def __init__(self, stage: str, folder: Path) -> None:
        work = folder / stage
        super().__init__(Job(stage, stage, "", 1, "", work, folder, {}, {}, {}))
        for path in (self.artifact, self.checkpoints):
            path.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        pass


@dataclass
class StageCost:
    """What a stage takes. parts: (what, how often, what one takes). memory: computed when all is measured,
    because that takes memory itself."""

    parts: list[tuple[str, float, Seconds]]
    tokens: float = 0.0
    flops: float = 0.0
    memory: Callable[[], Memory] = Memory
    notes: list[str] = field(default_factory=list)
    trainable: int = 0

    def to_row(self) -> dict[str, Any]:
        total = Seconds()
        for _, times, each in self.parts:
            total = total + each * times
        return {
            "tokens": self.tokens,
            "flops": self.flops,
            "trainable": self.trainable,
            "wall": total.wall,
            "busy": total.busy,
            "main": total.main,
            "parts": [
                {
                    "what": what,
                    "times": times,
                    "wall": each.wall,
                    "busy": each.busy,
                    "main": each.main,
                }
                for what, times, each in self.parts
                if times
            ],
            "notes": self.notes,
        }


class Bench:
    """The configuration under measurement."""

    def __init__(
        self, settings: Settings, work: Workload, config: PreTrainedConfig, folder: Path,
        accelerator: Accelerator, peak: float, processes: int = 1, sharded: bool = False,
    ) -> None:  # fmt: skip
        """processes, sharded: what the run will have; measured is in one process."""
        self.settings, self.work, self.folder, self.accelerator = (
            settings,
            work,
            folder,
            accelerator,
        )
        self.device = accelerator.device
        self.peak = peak
        self.full = config
        self.masked = settings.pretrain.objective == "masked"
        self.size = count(config, masked=self.masked)
        self.config = self._affordable(config)
        self.measured = count(self.config, masked=self.masked)
        # work is all but proportional to the weights where a model is so large that layers are left out
        self.scale = self.size.multiplying / self.measured.multiplying
        self.bf16 = settings.model.precision == "bf16"
        self.processes, self.sharded = processes, sharded

    def _affordable(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration itself, or with so few layers that a probe takes about a second."""
        allowed = self.peak * _PROBE_SECONDS / (6 * _PROBE_TOKENS)
        spare = self.size.multiplying - allowed
        if spare <= 0:
            return config
        layer = self.size.non_embedding / self.size.layers
        smaller = copy.deepcopy(config)
        smaller.num_hidden_layers = max(1, self.size.layers - int(spare / layer))
        if getattr(smaller, "layer_types", None):
            smaller.layer_types = smaller.layer_types[: smaller.num_hidden_layers]
        return smaller

    @functools.cached_property
    def _storage(self) -> tuple[Seconds, Seconds]:
        folder = self.folder / "model"
        model, tokenizer = self.policy(), self.work.tokenizer
        item = Input("model", "", path=folder)
        save = measure(lambda: save_model(model, tokenizer, folder), self.device, 0.2)
        load = measure(lambda: (load_tokenizer(item), load_causal_lm(item)), self.device, 0.3)
        return load * self.scale, save * self.scale

    def storage(self) -> tuple[Seconds, Seconds]:
        """To read a model with its tokenizer, and to write one."""
        return self._storage

    def out(self, stage: str) -> QuietOut:
        return QuietOut(stage, self.folder)

    def sized(self, lora: LoraSettings) -> ModelSize:
        """The full model with adapters, where a stage trains some."""
        return count(self.full, lora) if lora.rank else self.size

    def policy(self) -> PreTrainedModel:
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        model.config.pad_token_id = self.work.tokenizer.pad_token_id
        return model.to(self.device).eval()

    def classifier(self) -> PreTrainedModel:
        config = type(self.config).from_dict({**self.config.to_dict(), "num_labels": 1})
        config.pad_token_id = self.work.tokenizer.pad_token_id
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.float32
        )
        return model.to(self.device).eval()

    def affordable_rows(self, rows: int, tokens: float) -> int:
        """How many rows of so many tokens a probe may train on."""
        each = 6 * self.measured.multiplying * tokens / self.peak
        return int(max(1, min(rows, 1.5 * _PROBE_SECONDS / max(each, 1e-9))))

    def micro_batch(self, row_tokens: int, rows: int) -> int:
        """Rows that a micro-batch of the reward and policy stages holds."""
        return max(1, min(rows, tokens_at_once(self.device, self.full.vocab_size) // row_tokens))

    # ---- memory --------------------------------------------------------------------------

    def trained(self, lora: LoraSettings) -> Memory:
        size = self.sized(lora)
        memory = scaling.training_memory(size, self.processes, self.sharded)
        if self.bf16:
            # autocast casts each weight once a pass, and keeps the copy for backward
            copies = Memory(kept=float(scaling.BF16_BYTES * size.multiplying))
            memory = scaling.together(memory, copies)
        return memory

    def frozen(self) -> Memory:
        return scaling.frozen_memory(self.size, self.processes, self.sharded)

    def kept(
        self,
        rows: int,
        tokens: int,
        lora: LoraSettings,
        logits: float | None = None,
        attention_mask: bool = False,
    ) -> Memory:
        """Activations of a micro-batch. logits: for how many tokens, None for all of it."""
        share = 1.0 if logits is None else min(1.0, logits / (rows * tokens))
        keys: dict[str, Any] = {"bf16": self.bf16, "lora": lora, "attention_mask": attention_mask}
        below = kept_for_backward(
            self.full, rows, tokens, **keys, logits=self.masked, masked=self.masked
        )
        above = 0.0
        if share and not self.masked:
            whole = kept_for_backward(self.full, rows, tokens, **keys)
            # and the gradient of the logits while they are still there
            above = whole - below + scaling.FP32_BYTES * rows * tokens * self.full.vocab_size
        return Memory(activations=below, logits=share * above)

    def decoding(self, rows: int, tokens: int) -> Memory:
        """The cache and the logits of so many rows; probabilities, their sums and a copy beside them."""
        cache = scaling.kv_cache_bytes(self.size, rows, tokens)
        return Memory(kv_cache=cache, logits=4.0 * scaling.FP32_BYTES * rows * self.full.vocab_size)
