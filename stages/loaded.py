"""The models of the playground in memory: loaded when asked for, the ones not used for long let go."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.inventory import Offered
from stages import probe_attention
from stages.models import load_causal_lm, load_tokenizer
from stages.probe import Vocabulary, logits_of
from stages.probe_attention import Attention
from stages.probe_policy import Critic, load_critic, load_reward
from stages.rewards import RewardModel

Made = TypeVar("Made")
_TEXTS = 4
_SHARE_OF_MEMORY = 0.5


class Loaded:
    """A language model with its tokenizer. `lock` is held while it works: one forward at a time."""

    def __init__(self, offered: Offered, device: torch.device) -> None:
        self.offered = offered
        self.lock = threading.Lock()
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(offered.item)
        self.model: PreTrainedModel = load_causal_lm(offered.item).to(device).eval()
        self._logits: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._attention: OrderedDict[tuple[int, ...], Attention] = OrderedDict()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    def logits(self, ids: list[int]) -> Tensor:
        """Logits `[T, V]` of a text; those of the last few texts are kept."""
        return self._kept(self._logits, ids, lambda: logits_of(self.model, ids))

    def attention(self, ids: list[int]) -> Attention:
        """What every head looks at in a text; those of the last few texts are kept."""
        return self._kept(self._attention, ids, lambda: probe_attention.look(self.model, ids))

    def _kept(
        self, cache: OrderedDict[tuple[int, ...], Made], ids: list[int], make: Callable[[], Made]
    ) -> Made:
        key = tuple(ids)
        with self.lock:
            if key not in cache:
                cache[key] = make()
                while len(cache) > _TEXTS:
                    cache.popitem(last=False)
            cache.move_to_end(key)
            return cache[key]


class Models:
    """All that is offered, by name; in memory is what was used last, as far as there is room.

    Args:
        limit_bytes: of the weights in memory; None is half of what the machine has. What is being
            used stays, however large.
    """

    def __init__(self, offered: list[Offered], limit_bytes: int | None = None) -> None:
        self.offered = {one.name: one for one in offered}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.limit_bytes = limit_bytes if limit_bytes is not None else _room(self.device)
        self._held: OrderedDict[tuple[str, str], tuple[Any, int]] = OrderedDict()
        self._changing = threading.Lock()
        # one at a time, of all: transformers leaves weights out when it loads two in parallel
        self._reading = threading.Lock()
        self._loading: dict[tuple[str, str], threading.Lock] = {}

    def model(self, name: str) -> Loaded:
        return self._get("model", name, lambda one: Loaded(one, self.device))

    def reward(self, name: str) -> RewardModel:
        """The reward model that goes with a model; Absent says why there is none."""
        return self._get("reward", name, lambda one: load_reward(one, self.device))

    def critic(self, name: str) -> Critic:
        """The value model of a ppo step; Absent says why there is none."""
        return self._get("critic", name, lambda one: load_critic(one, self.device))

    def names(self) -> list[str]:
        """What is in memory, the longest unused first."""
        with self._changing:
            return [f"{kind} {name}" for kind, name in self._held]

    def _get(self, kind: str, name: str, load: Callable[[Offered], Made]) -> Made:
        if name not in self.offered:
            raise ConfigError(f"there is no model {name!r} here")
        # several models share one reward model
        reward = self.offered[name].reward
        key = kind, (reward.digest if kind == "reward" and reward else name)
        with self._changing:
            loading = self._loading.setdefault(key, threading.Lock())
        # two people who ask for the same model wait for one loading
        with loading:
            with self._changing:
                if key in self._held:
                    self._held.move_to_end(key)
                    found: Made = self._held[key][0]
                    return found
            with self._reading:
                made = load(self.offered[name])
            with self._changing:
                self._held[key] = made, _weight_bytes(made)
                while len(self._held) > 1 and self._bytes() > self.limit_bytes:
                    self._held.popitem(last=False)
            return made

    def _bytes(self) -> int:
        return sum(size for _, size in self._held.values())


def _weight_bytes(made: Any) -> int:
    parts = {
        Loaded: lambda: [made.model],
        RewardModel: lambda: [made.backbone, made.head],
        Critic: lambda: [made.agent.policy, *made.agent.read_by_critic()],
    }[type(made)]()
    # what two parts share is in memory once
    weights = {p.data_ptr(): p for part in parts for p in part.parameters()}
    return sum(p.numel() * p.element_size() for p in weights.values())


def _room(device: torch.device) -> int:
    if device.type == "cuda":
        return int(_SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[1])
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return int(_SHARE_OF_MEMORY * pages * size)
