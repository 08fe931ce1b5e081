from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import Strict, unhashed


class RunSettings(Strict):
    """Identity of a run and the shape of its pipeline."""

    name: str = unhashed("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run: letters, digits, dot, underscore, hyphen."""
    dir: str | None = unhashed(None)
    """Run directory. Default: runs/<run.name> below the current directory."""
    seed: int = Field(0, ge=0, lt=2**31)
    """The one seed: every random number of every stage is derived from it."""
    rounds: int = unhashed(1, ge=1, le=100)
    """Rounds of sample, rank, reward, the policy and evaluate; a round samples from the policy before it."""
    policy: Literal["ppo", "dpo", "kto", "grpo", "rloo"] = unhashed("ppo")
    """How the policy is optimised: ppo, grpo and rloo against the reward model, dpo and kto on the
    rankings."""
    tracker: Literal["none", "trackio", "tensorboard", "wandb", "mlflow"] = unhashed("none")
    """Where the rows of metrics.jsonl go as well, by Accelerate's tracker of that name."""

    @property
    def learns_from_rankings(self) -> bool:
        """Whether the policy learns from the rankings themselves and reads no reward model."""
        return self.policy in ("dpo", "kto")
