"""One run, every way to a policy from the same labels, through the real command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_tiny_line import prefline, rows_of, steps_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1800)]


def started(run: Path) -> list[str]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["event"] == "started"]


def test_dpo_kto_grpo_and_rloo_share_the_labels_of_one_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    answer = prefline("run", "configs/tiny.yaml", f"run.dir={run}", "--until", "reward")
    assert answer.returncode == 0, answer.stderr
    done = started(run)
    for policy in ("grpo", "rloo", "kto", "dpo"):
        more = [] if policy != "dpo" else ["evaluate.best_of=4"]
        answer = prefline("run", str(run), f"run.policy={policy}", *more)
        assert answer.returncode == 0, answer.stderr
        assert started(run)[len(done) :] == [policy, "evaluate"]
        done = started(run)
        steps = steps_of(run)
        assert {step["state"] for step in steps.values()} == {"done"}
        metrics = steps["evaluate"]["metrics"]
        assert isinstance(metrics, dict)
        assert metrics["win_rate_low"] <= metrics["win_rate_vs_sft"] <= metrics["win_rate_high"]
        assert prefline("lineage", str(run)).stdout.startswith(f"{policy}  ")
        assert rows_of(run, policy)[0]["step"] == 0
        assert f"{policy}" in (run / "report.html").read_text()
    assert metrics["best_of_n"] == 4
    assert 0 <= metrics["best_of_n_win_rate_vs_sft"] <= 1
    assert metrics["best_of_n_kl_nats"] == pytest.approx(0.636, abs=1e-3)
    assert "best of 4 sft responses" in answer.stdout
    assert prefline("verify", str(run)).returncode == 0
    # ppo after them: again nothing but the policy and its evaluation
    answer = prefline("run", str(run), "run.policy=ppo", "evaluate.best_of=0")
    assert answer.returncode == 0, answer.stderr
    assert started(run)[len(done) :] == ["ppo", "evaluate"]
