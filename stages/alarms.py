"""Notices a policy that goes wrong while it is trained (ppo, grpo, rloo), and says so in words.

Each alarm compares the mean of the last few updates with that of the first few, or with a limit. It
is said once when it begins; `alarms` in a metrics row counts those that hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.job import Metrics

WINDOW = 3
# a critic that began as the reward model first has to learn what unfinished responses are worth
_CRITIC_LEARNS = 10
_WATCHED = (
    "kl",
    "approx_kl",
    "entropy",
    "explained_variance",
    "response_tokens",
    "eos_rate",
    "repetition",
    "distinct_responses",
    "score",
)


class Alarms:
    """What has been seen so far; `state` goes into a checkpoint and comes back by `restore`.

    stage: whose settings a text names. max_kl: nats a response from the reference that are too far.
    max_update_kl: nats a token that one update may move the policy; None where the row has none.
    """

    def __init__(
        self, stage: str, max_kl: float = 12.0, max_update_kl: float | None = None
    ) -> None:
        self._stage = stage
        self._max_kl = max_kl
        self._max_update_kl = max_update_kl
        self.first: dict[str, list[float]] = {}
        self.last: dict[str, list[float]] = {}
        self.holding: list[str] = []
        self.said: list[dict[str, Any]] = []
        """Every alarm that began: {"update", "alarm", "text"}."""

    def state(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("first", "last", "holding", "said")}

    def restore(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)

    def check(self, update: int, row: Metrics) -> list[str]:
        """Take in the metrics of an update (1-based); the texts of alarms that begin with it."""
        for key in _WATCHED:
            if key in row:
                first = self.first.setdefault(key, [])
                if len(first) < WINDOW:
                    first.append(row[key])
                self.last[key] = [*self.last.get(key, []), row[key]][-WINDOW:]
        if update <= WINDOW:
            return []
        holding = dict(self._holding(update))
        begun = {name: text for name, text in holding.items() if name not in self.holding}
        self.holding = list(holding)
        self.said += [
            {"update": update, "alarm": name, "text": text} for name, text in begun.items()
        ]
        return list(begun.values())

    def _holding(self, update: int) -> Iterator[tuple[str, str]]:
        stage = self._stage
        first = {key: sum(values) / len(values) for key, values in self.first.items()}
        now = {key: sum(values) / len(values) for key, values in self.last.items()}
        if now.get("kl", 0.0) > self._max_kl:
            yield (
                "kl",
                f"the policy is {now['kl']:.1f} nats a response from the reference (over"
                f" {self._max_kl:g}): raise {stage}.kl_coef or lower {stage}.lr",
            )
        if self._max_update_kl and now.get("approx_kl", 0.0) > self._max_update_kl:
            yield (
                "update",
                f"one update moves the policy by {now['approx_kl']:.3f} nats a token (over"
                f" {self._max_update_kl:g}): lower {stage}.lr or {stage}.epochs",
            )
        if "entropy" in now and now["entropy"] < 0.2 * first["entropy"]:
            yield (
                "entropy",
                f"entropy fell from {first['entropy']:.2f} to {now['entropy']:.2f} nats a token:"
                f" responses become alike; raise {stage}.kl_coef"
                + (" or ppo.entropy_coef" if stage == "ppo" else ""),
            )
        if update > _CRITIC_LEARNS and now.get("explained_variance", 0.0) < -0.5:
            yield (
                "value",
                f"the critic is worse than a constant (explained variance"
                f" {now['explained_variance']:.2f}): lower ppo.value_lr, or set"
                " ppo.value_warmup_updates",
            )
        rises = now["score"] > first["score"]
        if now["response_tokens"] > 1.5 * first["response_tokens"] and rises:
            yield (
                "length",
                f"responses grew from {first['response_tokens']:.0f} to"
                f" {now['response_tokens']:.0f} tokens while the score rose: the reward model may"
                f" pay for length; set {stage}.length_penalty",
            )
        if now["response_tokens"] < 0.5 * first["response_tokens"]:
            yield (
                "short",
                f"responses shrank from {first['response_tokens']:.0f} to"
                f" {now['response_tokens']:.0f} tokens",
            )
        if now["repetition"] > first["repetition"] + 0.2:
            yield (
                "repetition",
                f"responses repeat themselves ({first['repetition']:.0%} of 4-grams before,"
                f" {now['repetition']:.0%} now): the reward model is being gamed; raise {stage}.kl_coef",
            )
        if now["eos_rate"] < first["eos_rate"] - 0.3:
            yield (
                "eos",
                f"fewer responses end by themselves ({first['eos_rate']:.0%} before,"
                f" {now['eos_rate']:.0%} now): raise {stage}.missing_eos_penalty or"
                f" {stage}.max_response_tokens",
            )
