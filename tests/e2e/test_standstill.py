"""One rank of two stops dead inside a collective of a real stage: named, nothing left running, nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults.small_line import copy_before, prefline, result_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.dist, pytest.mark.timeout(3600)]

PLACES = {
    "pretrain": ("torch.distributed.distributed_c10d:all_reduce", 40),
    "reward": ("torch.distributed.distributed_c10d:all_reduce", 4),
    "ppo": ("torch.distributed.distributed_c10d:all_gather_object", 5),
}


@pytest.mark.parametrize("step", list(PLACES))
@pytest.mark.parametrize("rank", [1])
def test_a_rank_that_stands_still_is_named_and_ended(
    step: str, rank: int, small_run_of_two: Path, tmp_path: Path
) -> None:
    run = copy_before(small_run_of_two, tmp_path / "run", step)
    where, call = PLACES[step]
    fault = {"do": "signal", "number": signal.SIGSTOP, "rank": rank, "where": where, "call": call}
    ended = prefline("run", run, "--until", step, "launch.timeout_seconds=10", at_call=[fault])
    assert ended.code == 1, ended.said
    assert f"error: {step}: rank {rank} stands still (stopped by a signal)" in ended.said
    assert "prefline resume" in ended.said
    assert "lack of memory" not in ended.said
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert os.fspath(run) not in lines
    # a busy machine may need more than the shortest time
    ended = prefline("run", run, "--until", step, "launch.timeout_seconds=600")
    assert ended.code == 0, ended.said
    assert result_of(run, step) == result_of(small_run_of_two, step)
