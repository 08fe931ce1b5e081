"""Which of the policies that PPO validates is published (`ppo.keep`)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from pipeline.job import Metrics
from stages.checkpoints import Tensors
from stages.over_optimisation import smoothed
from stages.sharding import like


class Keeper:
    """The best policy so far, by validation_reward or by smoothed gold; part of a checkpoint.

    With `best_gold` a validation is compared once its neighbours are known: one lucky draw of responses
    is no peak. Until then its policy waits.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], keep: str, updates: int) -> None:
        self._parameters, self._keep, self._updates = parameters, keep, updates
        self.best: Tensors = {}
        self.metrics: Metrics = {}
        self._value = -math.inf
        self._waiting: Tensors = {}
        self._waiting_metrics: Metrics = {}
        self._gold_means: list[float] = []

    def offer(self, update: int, validation: Metrics) -> None:
        """Keep the policy as it is now, if it is the best."""
        metrics = {"best_update": update, **validation}
        if self._keep == "best_gold":
            self._offer_gold(metrics)
        elif metrics["validation_reward"] > self._value:
            self.best, self.metrics = self._policy_now(), metrics
            self._value = metrics["validation_reward"]

    def _offer_gold(self, metrics: Metrics) -> None:
        """Compare the validation before, whose neighbours are known now; at the end this one, too."""
        self._gold_means.append(metrics["validation_gold"])
        values = smoothed(self._gold_means)
        if self._waiting and values[-2] > self._value:
            self.best, self.metrics = self._waiting, self._waiting_metrics
            self._value = values[-2]
        self._waiting, self._waiting_metrics = self._policy_now(), metrics
        if metrics["best_update"] == self._updates and values[-1] > self._value:
            self.best, self.metrics, self._value = self._waiting, metrics, values[-1]

    def _policy_now(self) -> Tensors:
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    # ---- in a checkpoint -------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensors]:
        waiting = {"waiting": self._waiting} if self._waiting else {}
        return {"best": self.best, **waiting}

    def state(self) -> dict[str, Any]:
        return {
            "best_metrics": self.metrics,
            "best_value": self._value,
            "waiting_metrics": self._waiting_metrics,
            "gold_means": self._gold_means,
        }

    def restore(self, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        self.best, self._waiting = (
            {name: self._placed(name, tensor) for name, tensor in tensors.get(group, {}).items()}
            for group in ("best", "waiting")
        )
        self.metrics, self._value = state["best_metrics"], state["best_value"]
        # a checkpoint of before gold could decide has none of these
        self._waiting_metrics = state.get("waiting_metrics", {})
        self._gold_means = state.get("gold_means", [])

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        parameter = self._parameters[name]
        return like(tensor.to(parameter.device), parameter)
