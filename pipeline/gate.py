"""The gate before the policy: whether a reward model is good enough to be optimised.

It reads figures of the reward step's manifest and thresholds that no fingerprint covers, so the reward
model stays published, and another threshold trains nothing again. It closes only for a policy that is
not there yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.plan import Step
from pipeline.settings import Settings
from pipeline.settings.reward import RewardGate

# of a standard deviation of scores: a model that does not see the end token has exactly 0
LEAST_EOS_EFFECT = 0.01
COIN = 0.5


@dataclass(frozen=True)
class Gate:
    """What the gate found. reasons: why it closes, each with its figures; empty where it is open."""

    reasons: tuple[str, ...]
    forced: bool
    figures: dict[str, float | None]

    @property
    def closed(self) -> bool:
        return bool(self.reasons) and not self.forced

    @property
    def text(self) -> str:
        """The state of a step that it stops, in one line: what is wrong and what can be done."""
        return f"gate: {'; '.join(self.reasons)}; reward.gate.force=true goes on"

    def to_row(self) -> dict[str, Any]:
        """What the policy's manifest keeps."""
        return {
            "passed": not self.reasons,
            "forced": self.forced,
            "reasons": list(self.reasons),
        } | {"figures": self.figures}


HINT = (
    "More rankings, or a higher rank.overlap, help most; the report shows the worst mistakes. The"
    " thresholds are reward.gate.*, and reward.gate.force=true goes on regardless."
)


def guards(step: Step, settings: Settings) -> bool:
    """Whether a step optimises the reward step's model."""
    if step.stage.kind != "policy" or "reward_model" not in step.inputs:
        return False
    return bool(getattr(settings, step.stage.name).reward_weight)


def look(settings: RewardGate, metrics: Mapping[str, Any]) -> Gate:
    """Judge a reward model by the metrics of its manifest; a figure that is not there judges nothing."""
    names = (
        "heldout_accuracy",
        "heldout_accuracy_low",
        "heldout_accuracy_high",
        "length_correlation",
        "eos_effect",
    )
    figures = {name: _number(metrics.get(name)) for name in names}
    return Gate(tuple(_reasons(settings, figures)), settings.force, figures)


def _reasons(settings: RewardGate, figures: Mapping[str, float | None]) -> Iterator[str]:
    accuracy, high = figures["heldout_accuracy"], figures["heldout_accuracy_high"]
    low, least = figures["heldout_accuracy_low"], settings.min_accuracy
    interval = f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else ""
    if least is None and high is not None and high < COIN:
        yield f"held-out accuracy {accuracy:.3f}{interval} is surely worse than a coin"
    elif least is not None and accuracy is not None and accuracy < least:
        yield (
            f"held-out accuracy {accuracy:.3f}{interval} is below reward.gate.min_accuracy {least:g}"
        )
    length, most = figures["length_correlation"], settings.max_length_correlation
    if most is not None and length is not None and abs(length) > most:
        yield (
            f"length correlation {length:.3f} is beyond reward.gate.max_length_correlation {most:g}"
        )
    effect = figures["eos_effect"]
    if settings.require_eos and effect is not None and effect < LEAST_EOS_EFFECT:
        yield f"the end token is not seen (it moves a score by {effect:.4f} standard deviations)"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
