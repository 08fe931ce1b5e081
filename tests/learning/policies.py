"""What the same labels are worth to PPO, DPO, KTO, GRPO, RLOO and best of n: several seeds of the demo.

    python -m tests.learning.policies OUT [--seeds 0 1 2 3 4] [--variants ppo dpo] [--jobs 2]

Every seed is one run of configs/demo.yaml with its own text, model, annotators and reward model; the
variants share all of it and differ in the policy's step only. What is there already is not run again.
Results go to OUT/results.jsonl, a line for each seed and variant; the table prints means over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

ROOT = Path(__file__).parents[2]
_PREFLINE = (sys.executable, "-m", "pipeline")


class Variant(NamedTuple):
    """settings: what `prefline run RUN` is given. seeds: how many of them take part."""

    settings: tuple[str, ...]
    seeds: int = 5


_PPO = ("run.policy=ppo", "ppo.critic=null", "ppo.lora.rank=0", "ppo.lr=2e-4")
_LORA = ("run.policy=ppo", "ppo.lora.rank=16", "ppo.lr=1e-3")
VARIANTS = {
    "ppo": Variant((*_PPO, "evaluate.best_of=16")),
    "dpo": Variant(("run.policy=dpo", "evaluate.best_of=0")),
    "kto": Variant(("run.policy=kto", "evaluate.best_of=0")),
    "rloo": Variant(("run.policy=rloo", "evaluate.best_of=0")),
    "grpo": Variant(("run.policy=grpo", "evaluate.best_of=0"), 3),
    "ppo, shared critic": Variant((*_PPO, "ppo.critic=shared", "evaluate.best_of=0"), 3),
    "ppo, LoRA, critic on its base": Variant((*_LORA, "ppo.critic=lora", "evaluate.best_of=0"), 3),
    "ppo, LoRA, separate critic": Variant((*_LORA, "ppo.critic=separate", "evaluate.best_of=0"), 3),
}


def run_seed(out: Path, seed: int, order: int, names: list[str]) -> list[dict[str, Any]]:
    """All variants of one seed, one after the other in one run directory."""
    found = []
    for name in names:
        variant = VARIANTS[name]
        if order >= variant.seeds:
            continue
        run = out / f"seed-{seed}"
        config, given = run, []
        if not (run / "config.yaml").exists():
            config = ROOT / "configs" / "demo.yaml"
            given = [f"run.dir={run}", f"run.seed={seed}"]
        with (out / f"seed-{seed}.log").open("a") as log:
            subprocess.run(
                [*_PREFLINE, "run", str(config), *given, *variant.settings, "launch.threads=1"],
                cwd=ROOT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=log,
                check=True,
            )
        found += rows_of(run, seed, name)
        print(f"seed {seed}, {name}: {found[-1]['win_rate_vs_sft']:.3f}", flush=True)
    return found


def rows_of(run: Path, seed: int, name: str) -> list[dict[str, Any]]:
    """What is kept of the run as it stands: the variant, and best of n where that was measured."""
    done = subprocess.run(
        [*_PREFLINE, "status", str(run), "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    steps = {step["step"]: step for step in json.loads(done.stdout)["steps"]}
    metrics = steps["evaluate"]["metrics"]
    policy = next(steps[p] for p in ("ppo", "dpo", "kto", "grpo", "rloo") if p in steps)
    keys = ("win_rate_vs_sft", "win_rate_low", "win_rate_high", "kl_nats", "perplexity")
    keys += ("well_formed", "degenerate_rate", "mean_tokens", "rubric_score", "skeletons")
    row = {
        "seed": seed,
        "variant": name,
        "seconds": policy["seconds"],
        **{key: metrics[key] for key in keys},
        "quality": metrics["quality_policy"],
        "quality_sft": metrics["quality_sft"],
    }
    rows = [row]
    if "best_of_n" in metrics:
        best = "best_of_n_"
        rows.append(
            {
                "seed": seed,
                "variant": f"best of {metrics['best_of_n']}",
                "win_rate_vs_sft": metrics[f"{best}win_rate_vs_sft"],
                "win_rate_low": metrics[f"{best}win_rate_low"],
                "win_rate_high": metrics[f"{best}win_rate_high"],
                "kl_nats": metrics[f"{best}kl_nats"],
                "quality": metrics.get("quality_best_of_n"),
                **{
                    key: metrics.get(f"{best}{key}")
                    for key in ("well_formed", "degenerate_rate", "mean_tokens", "rubric_score")
                },
            }
        )
    return rows


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half of its 95 % interval by Student's t: seeds are few."""
    n = len(values)
    if n < 2:
        return values[0], math.nan
    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return statistics.mean(values), half


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: a line for each variant, means over its seeds."""
    lines = [
        "| policy | seeds | wins against sft | single seeds | KL, nats | rubric score | well-formed"
        " | degenerate | time |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = sorted((r for r in rows if r["variant"] == name), key=lambda r: r["seed"])
        mean, half = interval([r["win_rate_vs_sft"] for r in own])
        single = " ".join(f"{r['win_rate_vs_sft']:.2f}" for r in own)

        def average(key: str, form: str, own: list[dict[str, Any]] = own) -> str:
            values = [r[key] for r in own if r.get(key) is not None]
            return form.format(statistics.mean(values)) if values else "-"

        lines.append(
            f"| {name} | {len(own)} | {mean:.3f} ± {half:.3f} | {single} |"
            f" {average('kl_nats', '{:.2f}')} | {average('rubric_score', '{:.3f}')} |"
            f" {average('well_formed', '{:.3f}')} | {average('degenerate_rate', '{:.3f}')} |"
            f" {average('seconds', '{:.0f} s')} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one thread each")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(run_seed, options.out, seed, order, options.variants)
            for order, seed in enumerate(options.seeds)
        ]
        results = [row for job in jobs for row in job.result()]
    path = options.out / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in results), encoding="utf-8")
    print(table(results))
