"""A plan of a small configuration, by the real child; and what is made of its answer."""

import json
from pathlib import Path

import pytest

from pipeline import planner, planner_tables, planning
from pipeline.config import load_settings
from pipeline.errors import ConfigError
from pipeline.manifest import Manifest
from pipeline.settings import Settings
from pipeline.settings.cost import CostSettings

ROOT = Path(__file__).resolve().parents[2]


def manifest(step, seconds, busy, memory, speed):
    cost = {"busy_seconds": busy, "peak_memory_bytes": memory, "peak_flops_per_second": speed}
    return Manifest.model_validate(
        {"stage": step, "stage_version": 1, "kind": "model", "step": step, "round": 1,
         "fingerprint": "f", "digest": "d", "cost": cost, "seconds": seconds}
    )  # fmt: skip


def answer(**machine):
    def step(name, main, memory, tokens=0.0, **parts):
        return {
            "step": name, "stage": name, "round": 1, "tokens": tokens, "flops": 6e9, "wall": 2 * main,
            "busy": main, "main": main, "parts": [], "notes": [], "trainable": 1000,
            "memory": {**dict.fromkeys(
                ("weights", "gradients", "optimizer", "activations", "logits", "kv_cache", "exchange",
                 "kept", "process"), 0), **parts, "total": memory},
        }  # fmt: skip

    return {
        "machine": {
            "device": "CPU", "device_memory_bytes": 8e9, "cores": 2, "threads": 1,
            "matmul_flops_per_second": 1e9, "import_seconds": 3.0, "import_busy_seconds": 2.0,
            "calibration_seconds": 9.0, "calibration_busy_seconds": 8.0, "cores_busy_elsewhere": 0.0,
            **machine,
        },
        "model": {
            "parameters": 1_000_000, "embedding": 200_000, "non_embedding": 800_000, "layers": 2,
            "hidden": 64, "vocabulary": 500, "measured_layers": 2, "precision": "fp32",
        },
        "data": {
            "documents": 100, "tokens_per_document": 50.0, "demonstrations": 0, "prompts": {},
            "tokens_per_prompt": 0.0, "tokens_per_response": 0.0, "responses_from": "", "rankings": 0,
        },
        "steps": [
            step("pretrain", 10.0, 2e9, tokens=1e6),
            step("ppo", 30.0, 9e9, kv_cache=7e9, weights=1e9),
        ],
    }  # fmt: skip


def settings(**changes):
    return Settings.model_validate({"pretrain": {"data": "demo:stories"}, **changes})


def test_what_does_not_fit_is_warned_of_with_the_setting_to_lower():
    found = planner._priced(answer(), settings(), 1)
    text = "\n".join(found["warnings"])
    assert (
        "ppo needs 9 GB of the 8 GB of a device: mostly kv cache; lower ppo.rows_per_rank" in text
    )
    assert "pretrain needs" not in text
    heavy = answer()
    heavy["steps"][1]["memory"]["optimizer"] = 8e9
    text = "\n".join(planner._priced(heavy, settings(), 1)["warnings"])
    assert "mostly optimizer; ppo.critic=shared" in text
    found = planner._priced(answer(), settings(cost={"device_memory_gb": 80}), 1)
    assert not [line for line in found["warnings"] if "needs" in line]


def test_a_ratio_far_from_the_optimum_and_worn_text_are_warned_of():
    text = "\n".join(planner._priced(answer(), settings(), 1)["warnings"])
    assert "1 tokens a parameter: for this compute more tokens" in text
    assert "200 passes over the text" in text
    balanced = answer()
    balanced["steps"][0]["tokens"] = 2e7
    balanced["data"]["documents"] = 1_000_000
    assert len(planner._priced(balanced, settings(), 1)["warnings"]) == 1


def test_time_has_a_price_and_carbon():
    found = planner._priced(answer(), settings(cost={"price_per_hour": 36.0}), 1)
    assert found["total"]["seconds"] == 40.0
    assert found["total"]["money"] == pytest.approx(0.4)
    # 40 CPU seconds of 10 W
    assert found["total"]["carbon_grams"] == pytest.approx(400 / 3.6e6 * 480, rel=1e-2)
    # 6 GFLOP in 10 s of 1 GFLOP/s
    assert found["steps"][0]["utilisation"] == pytest.approx(0.6)
    lines = planner_tables.lines(found, CostSettings(price_per_hour=36.0))
    assert any("0.4 USD" in line for line in lines)


def test_a_run_is_compared_by_cpu_time_and_the_error_is_the_hand_worked_one():
    found = planner._priced(answer(), settings(), 1)
    made = {
        "pretrain": manifest("pretrain", 40.0, 8.0, 1e9, 2e9),
        "ppo": manifest("ppo", 80.0, 40.0, 10e9, 2e9),
    }
    rows = {row["step"]: row for row in planner.compare(found, made)}
    assert rows["pretrain"]["busy_seconds_error"] == pytest.approx(10 / 8 - 1)
    assert rows["ppo"]["memory_error"] == pytest.approx(9 / 10 - 1)
    assert rows["together"]["busy_seconds_error"] == pytest.approx(40 / 48 - 1)
    assert rows["together"]["seconds_error"] == pytest.approx(40 / 120 - 1)
    # twice the speed in the run: half the time would have been expected
    text = "\n".join(planner_tables.comparison_lines(list(rows.values())))
    assert "2.00 times as fast" in text
    assert "20.0 s of CPU time" in text
    assert planner.compare(found, {}) == []


def test_a_busy_machine_is_told():
    found = planner._priced(answer(cores_busy_elsewhere=1.5), settings(), 1)
    text = "\n".join(planner_tables.lines(found, CostSettings()))
    assert "others used 1.5 of 2 cores" in text
    assert "expect 1:20 min on the clock" in text


def test_a_budget_comes_from_flops_hours_or_pretraining():
    found = planner._priced(answer(), settings(), 1)
    assert planner.budget_flops(found, 5e9, None) == 5e9
    # 6 GFLOP in 10 s
    assert planner.budget_flops(found, None, 1.0) == pytest.approx(3600 * 6e8)
    assert planner.budget_flops(found, None, None) == 6e12
    rows = planner.optimum_rows(found, 1e21)
    assert [round(r["parameters"] * r["tokens"] * 6 / 1e21, 6) for r in rows] == [1.0] * 4


def test_too_few_runs_to_fit_are_told(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="not a run directory"):
        planning.fit_runs([tmp_path], None)


@pytest.mark.slow
def test_the_child_measures_a_small_line_and_its_work_adds_up(tmp_path):
    changes = ["ppo.updates=4", "pretrain.steps=10", "run.name=small"]
    found = planner.make_plan(load_settings(Settings, ROOT / "configs" / "tiny.yaml", changes))
    steps = {step["step"]: step for step in found["steps"]}
    assert list(steps) == [
        "tokenizer", "pretrain", "sft", "sample", "rank", "reward", "ppo", "evaluate",
    ]  # fmt: skip
    assert steps["pretrain"]["tokens"] == 10 * 8 * 128
    assert found["model"]["parameters"] == steps["pretrain"]["trainable"] == 151_616
    assert steps["ppo"]["tokens"] == pytest.approx((4 * 16 + 3 * 16) * 48, rel=0.15)
    for step in steps.values():
        parts = sum(part["times"] * part["main"] for part in step["parts"])
        assert step["main"] == pytest.approx(parts)
        assert 1e8 < step["memory"]["total"] < 4e9
    assert json.dumps(found)
    twice = planner.make_plan(
        load_settings(Settings, ROOT / "configs" / "tiny.yaml", [*changes, "ppo.updates=40"])
    )
    again = next(step for step in twice["steps"] if step["step"] == "ppo")
    assert again["tokens"] == pytest.approx((40 * 16 + 15 * 16) * 48, rel=0.15)


@pytest.mark.slow
def test_what_people_judge_is_answered_once():
    changes = ["ppo.updates=4", "pretrain.steps=10", "evaluate.judges=[people, rubric]"]
    found = planner.make_plan(load_settings(Settings, ROOT / "configs" / "tiny.yaml", changes))
    steps = {step["step"]: step for step in found["steps"]}
    assert list(steps)[-3:] == ["answers", "judge", "evaluate"]
    answered = [
        step for step, row in steps.items() if "answer" in {p["what"] for p in row["parts"]}
    ]
    assert answered == ["answers"]
    assert steps["answers"]["tokens"] > 0 == steps["evaluate"]["tokens"]
