"""Which trackers (`run.tracker`) are installed. They are programs of others; stages/tracking.py talks to them."""

from __future__ import annotations

import importlib.util
from typing import get_args

from pipeline.errors import ConfigError
from pipeline.settings.run import RunSettings

NAMES: tuple[str, ...] = get_args(RunSettings.model_fields["tracker"].annotation)


def check(name: str) -> None:
    """Refuse a tracker that is not installed, before anything starts.

    Raises:
        ConfigError: with the command that installs it.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(f"run.tracker: {name} is not installed", f"pip install {name}")


def found() -> str:
    """For `prefline doctor`: those that can be used."""
    here = [name for name in NAMES if name != "none" and importlib.util.find_spec(name)]
    return ", ".join(here) or "none is installed (tensorboard, trackio, wandb, mlflow)"
