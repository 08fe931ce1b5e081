"""A plan as text."""

from __future__ import annotations

from typing import Any

from pipeline.ledger import big
from pipeline.settings.cost import CostSettings
from pipeline.tables import align

Row = dict[str, Any]
_BREAKDOWN = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("activations", "activations"),
    ("logits", "logits"),
    ("kv_cache", "KV cache"),
    ("exchange", "exchange"),
    ("kept", "copies"),
    ("process", "process"),
)
_ELSEWHERE = 0.1


def lines(found: Row, cost: CostSettings) -> list[str]:
    """The whole plan: the model, its stages, memory, and what to mind."""
    return [
        *_model(found),
        "",
        *_stages(found, cost),
        "",
        *_memory(found),
        "",
        *_machine(found),
        *[f"WARNING {warning}" for warning in found["warnings"]],
    ]


def _model(found: Row) -> list[str]:
    model, data = found["model"], found["data"]
    parts = [
        f"model: {model['parameters']:,} parameters ({model['embedding']:,} in embeddings,"
        f" {model['non_embedding']:,} elsewhere), {model['layers']} layers of {model['hidden']},"
        f" vocabulary {model['vocabulary']:,}"
    ]
    known = []
    if data["documents"]:
        known.append(f"{data['documents']:,} documents of {data['tokens_per_document']:.0f} tokens")
    if data["demonstrations"]:
        known.append(f"{data['demonstrations']:,} demonstrations to train on")
    if data["prompts"]:
        splits = ", ".join(f"{count:,} {split}" for split, count in data["prompts"].items())
        known.append(f"prompts of {data['tokens_per_prompt']:.0f} tokens ({splits})")
        length = f"{data['tokens_per_response']:.0f} tokens ({data['responses_from']})"
        known.append(f"responses of about {length}")
    if known:
        parts.append(f"data: {'; '.join(known)}")
    return parts


def _stages(found: Row, cost: CostSettings) -> list[str]:
    head = ["step", "trained", "tokens", "FLOPs", "of peak", "time", "CPU time", "memory"]
    priced = cost.price_per_hour > 0
    rows = [tuple(head + (["cost"] if priced else []))]
    for step in [*found["steps"], {**found["total"], "step": "together"}]:
        share = step.get("utilisation")
        row = [
            step["step"],
            f"{step['trainable']:,}" if step.get("trainable") else "",
            big(step["tokens"]) if step["tokens"] else "",
            big(step["flops"], "FLOP") if step["flops"] else "",
            f"{share:.0%}" if share else "",
            clock(step["seconds"]),
            clock(step["busy"]),
            big(step["peak_memory_bytes"], "B"),
        ]
        rows.append(
            tuple(row + ([f"{step.get('money', 0.0):.2g} {cost.currency}"] if priced else []))
        )
    notes = [f"{step['step']}: {note}" for step in found["steps"] for note in step["notes"]]
    return align(rows, right=range(1, len(rows[0]))) + notes


def _memory(found: Row) -> list[str]:
    shown = [
        (key, name) for key, name in _BREAKDOWN if any(s["memory"][key] for s in found["steps"])
    ]
    rows: list[tuple[str, ...]] = [("memory of one device", *(name for _, name in shown))]
    for step in found["steps"]:
        cells = (step["memory"][key] for key, _ in shown)
        rows.append((step["step"], *(big(cell, "B") if cell else "" for cell in cells)))
    return align(rows, right=range(1, len(rows[0])))


def _machine(found: Row) -> list[str]:
    machine, total = found["machine"], found["total"]
    several = found["processes"] > 1
    speed = big(machine["matmul_flops_per_second"])
    parts = [
        f"measured in {machine['calibration_seconds']:.0f} s"
        f" ({machine['calibration_busy_seconds']:.0f} s of CPU time) on {machine['device']},"
        f" {machine['threads']} of {machine['cores']} cores, {speed}FLOP/s in matrix products"
    ]
    if found["model"]["measured_layers"] < found["model"]["layers"]:
        parts.append(
            f"on {found['model']['measured_layers']} of {found['model']['layers']} layers, and scaled"
        )
    parts.append(
        f"time is that of a free machine; starting processes adds about {clock(found['start_seconds'])}"
    )
    others = machine.get("cores_busy_elsewhere")
    if others is not None and others > _ELSEWHERE * machine["cores"]:
        parts.append(
            f"others used {others:.1f} of {machine['cores']} cores meanwhile: with as much of that, expect"
            f" {clock(total['wall'])} on the clock, and CPU times that are too high rather than too low"
        )
    if several:
        parts.append(
            f"{found['processes']} processes on as many devices; what they wait for each other is not in it"
        )
    energy, carbon = total["energy_joules"], total["carbon_grams"]
    parts.append(
        f"about {energy / 3600:.2g} Wh of the processor (an estimate), {carbon:.2g} g CO2e"
    )
    return parts


def optimum_lines(found: Row, flops: float, rows: list[Row]) -> list[str]:
    """The compute-optimal sizes for a budget beside the configuration's own."""
    table: list[tuple[str, ...]] = [
        (f"best use of {big(flops, 'FLOP')}", "parameters", "tokens", "tokens a parameter")
    ]
    tokens = sum(step["tokens"] for step in found["steps"] if step["stage"] == "pretrain")
    parameters = found["model"]["parameters"]
    if tokens:
        ratio = f"{tokens / parameters:.2g}"
        table.append(("this configuration", big(parameters), big(tokens), ratio))
    for row in rows:
        cells = (row["source"], big(row["parameters"]), big(row["tokens"]))
        table.append((*cells, f"{row['tokens_per_parameter']:.1f}"))
    notes = []
    if flops < 6e17:
        notes.append(
            "their models began at 70 M parameters: far below that these are extrapolations, and"
            " `prefline plan --fit` on a sweep of your own data says more"
        )
    return align(table, right=(1, 2, 3)) + notes


def comparison_lines(rows: list[Row]) -> list[str]:
    """Predicted against actual, and how far it was off."""
    if not rows:
        return []
    table: list[tuple[str, ...]] = [
        ("predicted / actual", "time", "", "CPU time", "", "error", "memory", "", "error")
    ]
    for row in rows:
        actual = row["actual_busy_seconds"]
        table.append(
            (
                row["step"],
                clock(row["predicted_seconds"]),
                clock(row["actual_seconds"]),
                clock(row["predicted_busy_seconds"]),
                clock(actual) if actual else "",
                percent(row["busy_seconds_error"] if actual else row["seconds_error"]),
                big(row["predicted_memory"], "B"),
                big(row["actual_memory"], "B"),
                percent(row["memory_error"]),
            )
        )
    total = rows[-1]
    notes = []
    if total.get("overhead_seconds") is not None:
        notes.append(
            f"beside the steps: {clock(total['overhead_seconds'])} to start and to publish"
        )
    if total["speed"] and not 0.9 < total["speed"] < 1.1:
        corrected = total["predicted_busy_seconds"] / total["speed"]
        notes.append(
            f"in matrix products the machine was {total['speed']:.2f} times as fast in the run as in the"
            f" calibration; with that, {clock(corrected)} of CPU time"
        )
    return align(table, right=range(1, 9)) + notes


def clock(seconds: float) -> str:
    """95.9 -> `1:36`; below a minute in seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02} min"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.0%}"
