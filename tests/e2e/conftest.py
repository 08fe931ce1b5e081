"""One small line, made once for all tests that do a step of it again under a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import small_line


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_line.make(tmp_path_factory.mktemp("small") / "run")


@pytest.fixture(scope="session")
def small_run_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in two processes."""
    run = tmp_path_factory.mktemp("small-two") / "run"
    return small_line.make(run, "launch.processes=2")
