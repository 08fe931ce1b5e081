"""Rewards and judges that are Python functions: `rule(messages, response) -> float`.

messages: the conversation, ``[{"role", "content"}, ...]``. An installed package declares a rule under
the entry-point group `prefline.rewards`; settings name it, and never a file or a class:

    [project.entry-points."prefline.rewards"]
    no_urls = "my_package.rules:no_urls"
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from pipeline.errors import ConfigError, StageError

GROUP = "prefline.rewards"
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Rule:
    """A loaded rule. origin: `module:function` and the package that declares it, for the manifest."""

    name: str
    function: Callable[[Messages, str], float]
    origin: str

    def __call__(self, messages: Messages, response: str) -> float:
        """The rule's number for a response.

        Raises:
            StageError: it failed, or gave something else than a finite number.
        """
        try:
            value = float(self.function(messages, response))
        except Exception as error:  # noqa: BLE001 - another person's code: anything may come out of it
            raise StageError(
                f"the rule {self.name!r} failed on the response {response[:80]!r}:"
                f" {type(error).__name__}: {error}"
            ) from None
        if not math.isfinite(value):
            raise StageError(f"the rule {self.name!r} gave {value} for {response[:80]!r}")
        return value


def load_rule(name: str, key: str) -> Rule:
    """The rule that the setting `key` names.

    Raises:
        ConfigError: no installed package declares it, several do, or it cannot be imported.
    """
    points = entry_points(group=GROUP)
    declared = [point for point in points if point.name == name]
    if not declared:
        known = ", ".join(sorted({point.name for point in points})) or "none"
        raise ConfigError(
            f"{key}: no installed package declares the rule {name!r}",
            f"Known: {known}. A package declares one under the entry-point group {GROUP!r}.",
        )
    if len({point.value for point in declared}) > 1:
        raise ConfigError(
            f"{key}: several packages declare {name!r}:"
            f" {', '.join(sorted(point.value for point in declared))}"
        )
    point = declared[0]
    try:
        function = point.load()
    except Exception as error:  # noqa: BLE001 - another person's module: anything may come out of it
        raise ConfigError(
            f"{key}: {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from None
    if not callable(function):
        raise ConfigError(f"{key}: {name!r} ({point.value}) is not a function")
    package = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
    return Rule(name, function, f"{point.value}{package}")
