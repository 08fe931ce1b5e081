"""What a configuration will take here: asked of a child that measures, priced, and checked against a run.

The answer of `stages.calibrate`, with what the core adds, is a plan: plain data, as `prefline plan --json`
prints it and as it is kept beside a run (RUN/plan.json).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline import launch, ledger, scaling
from pipeline.crashes import less_memory
from pipeline.errors import ConfigError, StageError
from pipeline.files import read_json, write_atomic
from pipeline.manifest import Manifest
from pipeline.plan import Step, plan
from pipeline.settings import Settings
from pipeline.workspace import Run

FILE = "plan.json"
Row = dict[str, Any]
_ROLES = ("policy", "sft", "base")
_FULL = 0.95


def make_plan(settings: Settings) -> Row:
    """Ask a child, and add time and money.

    Raises:
        ConfigError: the data or the model cannot be read.
        StageError: the child ended without an answer.
    """
    processes, sharded = _division(settings)
    request = {
        "settings": settings.model_dump(mode="json"),
        "steps": [_step_row(step) for step in plan(settings)],
        "processes": processes,
        "sharded": sharded,
    }
    done = subprocess.run(
        [sys.executable, "-m", "stages.calibrate"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=launch.environment(settings.launch),
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        told = next((line for line in lines if line.startswith("error: ")), None)
        if told:
            raise ConfigError(
                told.removeprefix("error: "), lines[-1] if lines[-1] != told else None
            )
        raise StageError(f"plan: the calibration failed: {lines[-1]}", "See `prefline doctor`.")
    found: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return _priced(found, settings, processes)


def _step_row(step: Step) -> Row:
    roles = [role for role in _ROLES if role in step.inputs or role in step.sources]
    return {"step": step.name, "stage": step.stage.name, "round": step.round, "roles": roles}


def _division(settings: Settings) -> tuple[int, bool]:
    """Processes of a training stage, and whether they shard their models."""
    own = settings.launch
    if own.profile == "auto":
        return own.processes, False
    values = launch.profile_values(own.profile)
    processes = own.processes if own.processes > 1 else int(values.get("num_processes") or 1)
    return processes, str(values.get("distributed_type", "")).upper() == "FSDP"


def _priced(found: Row, settings: Settings, processes: int) -> Row:
    """seconds: on the clock of a free machine. Sums over all steps stand in `total`."""
    cost, machine = settings.cost, found["machine"]
    on_cpu = machine["device"] == "CPU"
    for step in found["steps"]:
        # what the main thread computes is what the clock shows, where nothing else uses its core
        step["seconds"] = step["main"] if on_cpu else step["wall"]
        joules = step["busy"] * cost.watts_per_core
        step |= ledger.worth(step["seconds"], joules, cost)
        step["energy_joules"] = joules
        if step["flops"] and step["seconds"]:
            possible = machine["matmul_flops_per_second"] * processes * step["seconds"]
            step["utilisation"] = step["flops"] / possible
        step["peak_memory_bytes"] = step["memory"]["total"]
    keys = ("seconds", "wall", "busy", "tokens", "flops", "energy_joules", "carbon_grams", "money")
    total = {key: sum(step.get(key, 0.0) for step in found["steps"]) for key in keys}
    total["peak_memory_bytes"] = max((s["peak_memory_bytes"] for s in found["steps"]), default=0)
    start = machine["import_busy_seconds"] if on_cpu else machine["import_seconds"]
    return {
        **found,
        "processes": processes,
        "total": total,
        "start_seconds": start,
        "warnings": _warnings(found, settings),
    }


# ---- warnings ------------------------------------------------------------------------------


def _warnings(found: Row, settings: Settings) -> list[str]:
    lines = []
    given = settings.cost.device_memory_gb
    most = given * 1e9 if given else found["machine"]["device_memory_bytes"]
    for step in found["steps"]:
        needed = step["memory"]["total"]
        if needed > _FULL * most:
            lines.append(
                f"{step['step']} needs {ledger.big(needed, 'B')} of the {ledger.big(most, 'B')} of a device:"
                f" {_remedy(step, settings)}"
            )
    return lines + _ratio_warnings(found, settings)


def _remedy(step: Row, settings: Settings) -> str:
    """Which setting lowers the largest part of a stage's memory."""
    stage = step["stage"]
    sizes = {k: v for k, v in step["memory"].items() if k not in ("total", "process")}
    largest = max(sizes, key=lambda key: sizes[key])
    what = f"mostly {largest.replace('_', ' ')}"
    if largest in ("activations", "logits", "kv_cache"):
        return f"{what}; {less_memory(stage)}"
    own = getattr(settings, stage)
    if stage == "ppo" and (own.critic or "separate") == "separate" and not own.lora.rank:
        return (
            f"{what}; ppo.critic=shared holds one model less, ppo.lora.rank=8 trains adapters only"
        )
    if hasattr(own, "lora") and not own.lora.rank:
        return f"{what}; {stage}.lora.rank=8 trains adapters only, launch.profile=fsdp2 shards over GPUs"
    return f"{what}; take a smaller model, or shard over GPUs with launch.profile=fsdp2"


def _ratio_warnings(found: Row, settings: Settings) -> list[str]:
    tokens = sum(step["tokens"] for step in found["steps"] if step["stage"] == "pretrain")
    if not tokens or settings.model.base:
        return []
    lines = []
    ratio, wanted = tokens / found["model"]["parameters"], settings.cost.tokens_per_parameter
    if not wanted / 3 <= ratio <= wanted * 3:
        side = "more tokens (pretrain.steps)" if ratio < wanted else "a larger model"
        lines.append(
            f"{ratio:.2g} tokens a parameter: for this compute {side} would do better"
            f" (about {wanted:g} is optimal, arXiv 2203.15556)"
        )
    data = found["data"]
    unique = data["documents"] * data["tokens_per_document"]
    if unique and tokens > 4 * unique:
        lines.append(
            f"{tokens / unique:.0f} passes over the text: beyond four they are worth less and less"
            " (arXiv 2305.16264)"
        )
    return lines


# ---- budget --------------------------------------------------------------------------------


def budget_flops(found: Row, flops: float | None, hours: float | None) -> float | None:
    """FLOPs to spend: those asked for, of so many hours at the speed of pretraining here, or pretraining's
    own; None where there is none of these."""
    if flops:
        return flops
    step = next((s for s in found["steps"] if s["stage"] == "pretrain"), None)
    if hours:
        peak = found["machine"]["matmul_flops_per_second"] * found["processes"]
        # without pretraining to measure: what well-made training reaches of the peak
        speed = step["flops"] / step["seconds"] if step else 0.4 * peak
        return float(hours * 3600 * speed)
    return float(6 * found["model"]["parameters"] * step["tokens"]) if step else None


def optimum_rows(found: Row, flops: float) -> list[Row]:
    """The compute-optimal size by each published way."""
    return [
        {
            "source": best.source,
            "parameters": best.parameters,
            "tokens": best.tokens,
            "tokens_per_parameter": best.tokens / best.parameters,
        }
        for best in scaling.compute_optimal(flops)
    ]


# ---- against what it took ------------------------------------------------------------------


def compare(found: Row, made: Mapping[str, Manifest], run: Run | None = None) -> list[Row]:
    """Predicted and actual seconds and memory of each finished step, and of all together."""
    rows = []
    for step in found["steps"]:
        manifest = made.get(step["step"])
        if manifest is not None:
            rows.append(_compared(step, manifest))
    if not rows:
        return []
    keys = ("seconds", "busy_seconds")
    total: Row = {"step": "together"}
    for key in keys:
        for side in ("predicted", "actual"):
            values = [row[f"{side}_{key}"] for row in rows]
            total[f"{side}_{key}"] = sum(values) if None not in values else None
    for side in ("predicted", "actual"):
        total[f"{side}_memory"] = max(row[f"{side}_memory"] for row in rows)
    # the same matrix product, then and now: how much faster or slower the machine was
    speeds = [row["speed"] * (row["actual_busy_seconds"] or 0.0) for row in rows if row["speed"]]
    weights = sum(row["actual_busy_seconds"] or 0.0 for row in rows if row["speed"])
    total["speed"] = sum(speeds) / weights if weights else None
    total["overhead_seconds"] = overhead_seconds(run, made) if run else None
    return [_with_errors(row, found) for row in [*rows, total]]


def _compared(step: Row, manifest: Manifest) -> Row:
    cost = manifest.cost
    device = cost.get("device_peak_memory_bytes")
    return {
        "step": step["step"],
        "predicted_seconds": step["seconds"],
        "actual_seconds": manifest.seconds,
        "predicted_busy_seconds": step["busy"],
        "actual_busy_seconds": cost.get("busy_seconds"),
        "predicted_memory": step["memory"]["total"],
        "actual_memory": device or cost.get("peak_memory_bytes", 0.0),
        "speed": cost.get("peak_flops_per_second"),
    }


def _with_errors(row: Row, found: Row) -> Row:
    for key in ("seconds", "busy_seconds", "memory"):
        predicted, actual = row[f"predicted_{key}"], row[f"actual_{key}"]
        row[f"{key}_error"] = predicted / actual - 1 if predicted is not None and actual else None
    if row["speed"]:
        row["speed"] /= found["machine"]["matmul_flops_per_second"]
    return row


def overhead_seconds(run: Run, made: Mapping[str, Manifest]) -> float | None:
    """What started and finished steps took beside their own work: processes, imports, publishing."""
    began: dict[str, datetime] = {}
    total, found = 0.0, False
    for event in run.events():
        name = str(event.get("step"))
        manifest = made.get(name)
        if manifest is None or event.get("fingerprint") != manifest.fingerprint:
            continue
        at = datetime.fromisoformat(str(event["time"]))
        if event.get("event") == "started":
            began[name] = at
        elif event.get("event") == "done" and name in began:
            total += (at - began.pop(name)).total_seconds() - manifest.seconds
            found = True
    return total if found else None


def save(run: Run, found: Row) -> None:
    write_atomic(run.path / FILE, json.dumps(found, indent=1) + "\n", durable=False)


def saved(run: Path) -> Row | None:
    """The plan that was made for a run, if there is one that can be read."""
    found = read_json(run / FILE)
    if not isinstance(found, dict) or not isinstance(found.get("steps"), list):
        return None
    return found
