"""Two gloo processes make the PPO updates of one, in float64 to the last digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.ranks import run_jobs
from tests.dist.small_jobs import make_ppo_job
from tests.tiny_ppo import rows_of

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    for name, processes in (("one", 1), ("two", 2)):
        job = make_ppo_job(folder / name, request.param)
        run_jobs(folder / f"{name}.json", [job], processes, float64=True)
    return [folder / "one", folder / "two"]


def test_every_metric_is_that_of_one_process(both: list[Path]) -> None:
    """Losses, gradient norms, clip fraction, KL, explained variance: gathered per token."""
    one, two = (rows_of(work) for work in both)
    assert len(one) == len(two) == 4
    for row, other in zip(one, two, strict=True):
        assert row.keys() == other.keys()
        assert row == pytest.approx(other, rel=1e-9, abs=1e-12)
    assert one[1]["response_tokens"] % 1 or one[2]["response_tokens"] % 1, "lengths differ"


def test_the_weights_are_those_of_one_process(both: list[Path]) -> None:
    one, two = (load_file(work / "artifact.tmp" / "model.safetensors") for work in both)
    assert one.keys() == two.keys()
    assert {tensor.dtype for tensor in one.values()} == {torch.float64}
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-10, rtol=1e-9)
