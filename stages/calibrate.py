"""What a configuration will take on this machine: a child of `prefline plan`.

    python -m stages.calibrate < request.json

Reads {"settings", "processes", "sharded", "steps": [{"step", "stage", "round", "roles"}]} and prints one
JSON object: the machine, the model's exact size, and for each step its parts with how often and how long, tokens, FLOPs
and memory. Everything is measured on the configuration's own model and data with random weights, some ten
seconds in all; of a large model on fewer layers, and scaled by its weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# as the stages: what runs before this line is the line's overhead
_BEGUN = time.perf_counter()

import torch  # noqa: E402
from transformers import PreTrainedConfig  # noqa: E402
from transformers.utils import logging as hf_logging  # noqa: E402

from pipeline import ledger  # noqa: E402
from pipeline.errors import ToolkitError  # noqa: E402
from pipeline.job import Input  # noqa: E402
from pipeline.settings import Settings  # noqa: E402
from stages import stage_costs  # noqa: E402
from stages.bench import Bench, QuietOut, StageCost  # noqa: E402
from stages.common import start  # noqa: E402
from stages.models import load_config, new_config  # noqa: E402
from stages.peak import matmul_flops_per_second  # noqa: E402
from stages.probes import DecodeCost, cores_busy_elsewhere, resident_bytes  # noqa: E402
from stages.workload import Workload, look_at  # noqa: E402

Row = dict[str, Any]


def calibrate(request: Row, folder: Path) -> Row:
    """The answer to a request; `folder` is for what the stages' helpers write."""
    settings = Settings.model_validate(request["settings"])
    imported = time.perf_counter() - _BEGUN
    busy_before = time.process_time()
    others = cores_busy_elsewhere()
    accelerator = start(settings, QuietOut("pretrain", folder))
    device = accelerator.device
    bf16 = settings.model.precision == "bf16"
    peak = matmul_flops_per_second(device, bf16)
    floor = resident_bytes()
    work = look_at(settings)
    bench = Bench(
        settings, work, _config(settings, work), folder, accelerator, peak,
        request["processes"], request["sharded"],
    )  # fmt: skip
    costs = _costs(bench, request["steps"], floor)
    elapsed, machine, own = cores_busy_elsewhere(others)
    return {
        "machine": {
            "device": _device_name(device),
            "device_memory_bytes": _device_memory(device),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "matmul_flops_per_second": peak,
            "import_seconds": imported,
            "import_busy_seconds": busy_before,
            "calibration_seconds": elapsed,
            "calibration_busy_seconds": own,
            "cores_busy_elsewhere": max(0.0, machine - own) / elapsed if machine else None,
        },
        "model": {
            **asdict(bench.size),
            "non_embedding": bench.size.non_embedding,
            "measured_layers": bench.config.num_hidden_layers,
            "precision": settings.model.precision,
        },
        "data": _data(work),
        "steps": costs,
    }


def _config(settings: Settings, work: Workload) -> PreTrainedConfig:
    if settings.model.base:
        return load_config(Input("model", "", sources=(settings.model.base,)), work.tokenizer)
    return new_config(settings.model, work.tokenizer)


def _data(work: Workload) -> Row:
    return {
        "documents": work.documents,
        "tokens_per_document": stage_costs.mean(work.document_lengths),
        "demonstrations": work.demonstrations,
        "prompts": work.prompts,
        "tokens_per_prompt": stage_costs.mean([len(ids) for ids in work.prompt_ids]),
        "tokens_per_response": stage_costs.mean(work.responses),
        "responses_from": work.responses_from,
        "rankings": work.rankings,
    }


def _costs(bench: Bench, steps: list[Row], floor: int) -> list[Row]:
    """One row for each step. Measured in the order of the line: memory is then as it is there."""
    decode: DecodeCost | None = None
    made: dict[str, tuple[StageCost, float, float]] = {}
    for step in steps:
        if decode is None and step["stage"] not in ("tokenizer", "rank", "judge"):
            decode = stage_costs.decoding(bench)
        meter, before = ledger.Meter(), resident_bytes()
        cost = _stage(bench, step, decode)
        made[step["step"]] = cost, float(max(before, floor)), meter.cost({})["peak_memory_bytes"]
    on_cpu = bench.device.type == "cpu"
    found = []
    for step in steps:
        cost, before_bytes, peak = made[step["step"]]
        memory = cost.memory()
        if on_cpu:
            # there Python and its libraries are part of it
            memory = replace(memory, process=before_bytes)
        row = {**step, **cost.to_row(), "memory": memory.to_row()}
        if on_cpu and bench.scale == 1.0:
            # the whole model was measured: what that took is the better estimate
            row["memory"]["total"] = round(peak)
        found.append(row)
    return found


def _stage(bench: Bench, step: Row, decode: DecodeCost | None) -> StageCost:
    stage, round = step["stage"], step["round"]
    rankings = bench.work.rankings * round
    if stage == "tokenizer":
        return stage_costs.tokenizer(bench)
    if stage == "pretrain":
        return stage_costs.pretrain(bench, decode)
    if stage == "sft":
        return stage_costs.sft(bench, decode)
    if stage in ("rank", "judge"):
        return stage_costs.rank(bench)
    if stage == "sample":
        return stage_costs.sample(bench, _known(decode), round)
    # as in the line: what a stage imports takes memory from then on
    from stages import reward_costs

    if stage == "reward":
        return reward_costs.reward(bench, rankings)
    from stages import policy_costs

    if stage == "ppo":
        return policy_costs.ppo(bench, _known(decode))
    if stage in ("grpo", "rloo"):
        return policy_costs.online(bench, _known(decode))
    if stage in ("dpo", "kto"):
        return policy_costs.offline(bench, rankings)
    if stage == "answers":
        return policy_costs.answers(bench, _known(decode), len(step["roles"]))
    return policy_costs.evaluate(bench, _known(decode), len(step["roles"]), rankings)


def _known(decode: DecodeCost | None) -> DecodeCost:
    assert decode is not None
    return decode


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU"


def _device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    request = json.load(sys.stdin)
    hf_logging.set_verbosity_error()
    try:
        with tempfile.TemporaryDirectory() as folder:
            answer = calibrate(request, Path(folder))
    except ToolkitError as error:
        print(f"error: {error.message}\n{error.hint or ''}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    print(json.dumps(answer))  # noqa: T201


if __name__ == "__main__":
    main()
