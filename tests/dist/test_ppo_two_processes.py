"""Two gloo processes make the PPO updates of one, in float64 to the last digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.ranks import run_ranks
from tests.tiny_ppo import make_inputs, make_job, rows_of

pytestmark = pytest.mark.dist

WORKER = Path(__file__).with_name("ppo_worker.py")
# one validation prompt: rank 0 has none; responses of every length: the ranks differ in tokens
CHANGES: dict[str, Any] = {
    "eval_prompts": 1,
    "eval_every_updates": 1,
    "max_response_tokens": 12,
    "rows_per_rank": 2,
    "prompts_per_step": 8,
    "minibatch_rows": 4,
    "kl_control": "adaptive",
    "kl_horizon": 16,
}


def run(work: Path, folder: Path, kind: str, processes: int) -> Path:
    job = make_job(work, make_inputs(folder, kind, train=7, double=True), **CHANGES)
    (work / "job.json").write_text(job.to_json(), encoding="utf-8")
    run_ranks(WORKER, work / "job.json", processes)
    return work


@pytest.fixture(
    scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)]
)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    found = []
    for name, processes in (("one", 1), ("two", 2)):
        (folder / f"{name}-inputs").mkdir()
        found.append(run(folder / name, folder / f"{name}-inputs", request.param, processes))
    return found


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
