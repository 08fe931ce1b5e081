"""Training that has gone wrong ends here: at that step, before a checkpoint takes it in, and with the last whole
one named."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.errors import StageError
from pipeline.job import Metrics, Out
from pipeline.settings.rewarded import RewardedSettings
from stages.alarms import WINDOW, Alarms

# fewer responses, or shorter ones, may well be the same
_FEW_RESPONSES = 4
_SHORT = 8.0  # tokens


def check_finite(out: Out, step: int, **values: float) -> None:
    """Raise StageError if a number is NaN or infinite. `step`: the one that gave it, from 1."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise _stopped(
                out,
                step,
                f"{name} is {value}",
                f"Lower {out.stage}.lr or {out.stage}.max_grad_norm, or see the data of this step.",
            )


def check_weights(out: Out, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise StageError if a tensor that a checkpoint is about to hold is not finite everywhere."""
    for name, tensor in tensors.items():
        # a shard holds what this rank has of it
        own = getattr(tensor, "_local_tensor", tensor).detach()
        if own.is_floating_point() and not torch.isfinite(own).all():
            figure = f"{name} holds numbers that are NaN or infinite"
            raise _stopped(out, step, figure, f"Lower {out.stage}.lr.")


def check_policy(
    out: Out, update: int, row: Metrics, own: RewardedSettings, alarms: Alarms
) -> None:
    """Raise StageError where a policy is lost: too far from the reference, or saying the same to everybody.

    row: of this update, finite; `alarms` has taken it in. It is logged before, so that the curves show it.
    """
    stage, kl = out.stage, row.get("kl", 0.0)
    if own.max_kl is not None and kl > own.max_kl:
        out.log(update, row)
        raise _stopped(
            out,
            update,
            f"kl is {kl:.1f} nats a response (over {stage}.max_kl {own.max_kl:g})",
            f"The policy has left its reference: raise {stage}.kl_coef or lower {stage}.lr; if that is meant,"
            f" raise {stage}.max_kl.",
        )
    seen = alarms.last.get("distinct_responses", [])
    lengths = alarms.first["response_tokens"]
    if own.min_distinct is None or len(seen) < WINDOW or sum(lengths) < _SHORT * len(lengths):
        return
    if max(seen) < own.min_distinct:
        out.log(update, row)
        raise _stopped(
            out,
            update,
            f"distinct_responses is {seen[-1]:.2g} (under {stage}.min_distinct {own.min_distinct:g} for"
            f" {len(seen)} updates)",
            "The policy has collapsed and says the same to nearly every prompt: raise"
            f" {stage}.kl_coef or lower {stage}.lr; if that is meant, lower {stage}.min_distinct.",
            first=update - len(seen) + 1,
        )


def distinct_responses(responses: list[list[int]]) -> float:
    """0 where all responses are the same, 1 where no two are (or too few to tell)."""
    if len(responses) < _FEW_RESPONSES:
        return 1.0
    different = len({tuple(response) for response in responses})
    return (different - 1) / (len(responses) - 1)


def last_checkpoint(out: Out, below: int) -> str | None:
    """The name of the newest completed checkpoint of a step below that; None where there is none."""
    done = [
        *out.checkpoints.glob("step-*/MANIFEST.json"),
        *out.checkpoints.glob("checkpoint-*/COMMITTED.json"),
    ]
    step_of = {path.parent.name: int(path.parent.name.rpartition("-")[2]) for path in done}
    names = [name for name, step in step_of.items() if step < below * out.steps_per_row]
    return max(names, key=lambda name: step_of[name], default=None)


def _stopped(out: Out, step: int, figure: str, hint: str, first: int | None = None) -> StageError:
    """first: the first bad step, where it is not `step` itself."""
    # one of the step before holds the very weights that gave the figure
    name = last_checkpoint(out, (first or step) - 1)
    kept = f"The last good checkpoint is {name}" if name else "There is no good checkpoint"
    return StageError(f"{out.step}: {figure} at step {step}; training was stopped. {kept}.", hint)
