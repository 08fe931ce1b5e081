"""A finished or interrupted run directory with realistic figures and hostile texts, made in a moment."""

import json
import math
import random
from pathlib import Path

from pipeline import artifacts, states, workspace
from pipeline.manifest import Manifest, hashed_settings
from pipeline.settings import Settings

HOSTILE = "</div><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} & \u202egnp\u202c \x1b[31m \x00"
CONFIG = {
    "run": {"name": "demo", "seed": 3},
    "pretrain": {
        "data": ["demo:stories"],
        "steps": 900,
        "minibatch_rows": 8,
        "sequence_length": 160,
    },
    "sft": {"data": ["demo:demonstrations"]},
    "sample": {"prompts": ["demo:prompts"]},
    "rank": {"by": "simulated", "annotators": 3, "noise": 0.08},
    "reward": {"epochs": 2},
    "ppo": {"updates": 42, "lr": 2e-4},
    "evaluate": {"judge": "rubric", "max_prompts": 300},
}
SECONDS = {
    "tokenizer": 2.1,
    "pretrain": 107,
    "sft": 66,
    "sample": 23,
    "rank": 4.2,
    "reward": 66,
    "ppo": 134,
    "evaluate": 31,
}


def rows_of(stage, rng):
    noise = rng.gauss
    if stage == "pretrain":
        for n in range(1, 901):
            loss = 1.45 + 5.2 * math.exp(-n / 90) + 0.5 * math.exp(-n / 500)
            row = {
                "step": n,
                "loss": loss + noise(0, 0.06),
                "lr": 3e-3 * min(n / 45, 0.55 + 0.45 * math.cos(n / 900 * 3.1)),
            }
            row |= {"grad_norm": 0.6 + abs(noise(0, 0.15)) + 2 * math.exp(-n / 40)}
            yield row | (
                {"heldout_loss": loss + 0.05, "heldout_bits_per_byte": loss / 3.1}
                if n % 100 == 0
                else {}
            )
    elif stage == "sft":
        for n in range(1, 301):
            loss = 0.82 + 0.9 * math.exp(-n / 30)
            row = {"step": n, "loss": loss + noise(0, 0.05), "lr": 1e-3}
            yield row | ({"heldout_loss": loss + 0.03 + n / 9000} if n % 50 == 0 else {})
    elif stage == "reward":
        for n in range(1, 121):
            gain = 0.1 * (1 - math.exp(-n / 40))
            row = {
                "step": n,
                "loss": 0.69 - gain + noise(0, 0.03),
                "accuracy": 0.52 + gain * 1.5 + noise(0, 0.04),
            }
            yield row | ({"heldout_accuracy": 0.53 + gain + noise(0, 0.01)} if n % 20 == 0 else {})
    elif stage == "ppo":
        for n in range(1, 43):
            gain, kl = 1.9 * (1 - math.exp(-n / 14)), 3.4 * (1 - math.exp(-n / 18))
            score = gain + noise(0, 0.12)
            row = {
                "step": n,
                "score": score,
                "reward": score - 0.05 * kl,
                "kl": kl + noise(0, 0.15),
                "kl_coef": 0.05,
            }
            row |= {
                "entropy": 1.1 - gain * 0.2 + noise(0, 0.02),
                "response_tokens": 58 + gain * 4 + noise(0, 1.5),
            }
            row |= {
                "eos_rate": min(1.0, 0.97 + gain * 0.01 + noise(0, 0.01)),
                "clip_fraction": 0.12 + noise(0, 0.02),
            }
            row |= {"explained_variance": 0.7 * (1 - math.exp(-n / 8)) + noise(0, 0.03)}
            if n % 6 == 0:
                last = gain - (0.15 if n > 36 else 0)
                row |= {
                    "validation_score": last,
                    "validation_kl": kl,
                    "validation_reward": last - 0.05 * kl,
                }
            yield row


def metrics_of(stage):
    qualities = [
        "hero",
        "animal",
        "trait",
        "problem",
        "feeling",
        "dialogue",
        "solved",
        "ending",
        "no_repeats",
        "well_formed",
    ]
    return {
        "tokenizer": {"bytes_per_token": 3.91, "unknowns": 0},
        "pretrain": {"heldout_loss": 1.503, "heldout_bits_per_byte": 0.559, "parameters": 1_103_424},
        "sft": {"heldout_loss": 0.853},
        "sample": {"prompts": 500, "responses": 1987},
        "rank": {"rankings": 500, "prompts": 500, "annotators": 3, "strict_pairs": 2711,
            "ties_fraction": 0.096, "train": 425, "heldout": 75, "agreement": 0.71},
        "reward": {"heldout_accuracy": 0.631, "heldout_accuracy_low": 0.587, "heldout_accuracy_high": 0.674,
            "train_accuracy": 0.69,
            "kendall_tau": 0.262, "length_correlation": 0.18,
            "score_mean": 0.41, "score_std": 1.37, "heldout_pairs": 407},
        "ppo": {"best_update": 36, "validation_reward": 1.61, "validation_kl": 2.94, "updates": 42},
        "evaluate": {
            "win_rate_vs_sft": 0.783, "win_rate_low": 0.737, "win_rate_high": 0.824, "win_rate_vs_base": 0.961,
            "judge": "rubric",
            "kl_nats": 3.21, "perplexity": 4.62, "sft_perplexity": 4.31, "mean_tokens": 66.2, "sft_mean_tokens": 58.4,
            "degenerate_rate": 0.003,
            "distinct_1": 0.041, "distinct_2": 0.173, "duplicate_rate": 0.01, "prompts": 300,
            "quality_base": {q: 0.1 + 0.05 * i for i, q in enumerate(qualities)},
            "quality_sft": {q: 0.55 + 0.03 * i for i, q in enumerate(qualities)},
            "quality_policy": {q: 0.53 if i == 0 else min(0.99, 0.74 + 0.03 * i) for i, q in enumerate(qualities)},
        },
    }[stage]  # fmt: skip


def comparisons(rng):
    story = "Once there was a fox named {}. {} always spoke in a very small voice. On the way home {} lost a kite. {}"
    endings = [
        '{0} felt very sad. "I will help you," said the owl. The owl found the kite. {0} learned to ask for help.',
        "{0} felt very sad.",
        "{0} lost a kite. {0} lost a kite.",
    ]
    for n in range(300):
        name = rng.choice(["Mia", "Tom", "Ada", "Zed"]) + str(n)
        who = "policy" if n < 223 else "tie" if n < 247 else "sft"
        told = [story.format(name, name, name, endings[k].format(name)) for k in (0, 1, 2)]
        best = {"policy": (0, 1), "sft": (2, 0), "tie": (1, 1)}[who]
        scores = {
            "score_policy": 0.82 + rng.gauss(0, 0.07),
            "score_sft": 0.68 + rng.gauss(0, 0.09),
            "score_base": 0.3 + rng.gauss(0, 0.1),
        }
        yield {
            "prompt": f"Write a story about a shy fox named {name} who lost a kite.",
            "base": f"{name} was a\x1b[31m bird. The bird the",
            "policy": told[best[0]],
            "sft": told[best[1]],
            "winner": who,
            **scores,
        }
    yield {
        "prompt": HOSTILE,
        "base": None,
        "sft": HOSTILE,
        "policy": "",
        "score_base": None,
        "score_sft": math.nan,
        "score_policy": 9,
        "winner": "sft",
    }


def make_run(
    folder: Path, stop_after: str | None = None, config: dict = CONFIG, **evaluate
) -> Path:
    """A run directory as the line leaves it, with noise, hostile strings and a torn last line."""
    rng = random.Random(7)
    settings = Settings.model_validate(config)
    with workspace.writer(workspace.Run(folder / "run", settings, {"ppo.lr": "command line"})) as (
        run,
        _,
    ):
        inspector, before = states.Inspector(run), {}
        for step in inspector.steps:
            state, stage = inspector.look(step, before), step.stage.name
            artifact = artifacts.prepare(state.work)
            rows = [json.dumps(row | {"time": 1.0}) for row in rows_of(stage, rng)]
            (state.work / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 99, "lo')
            write_extras(state.work, artifact, stage, rng)
            if stage == stop_after:
                beat = {"done": 12, "total": 42, "unit": "update"}
                (state.work / "heartbeat.json").write_text(json.dumps(beat))
                break
            seconds = SECONDS[stage]
            made = {
                "stage": stage, "stage_version": step.stage.version,
                "kind": step.stage.kind, "step": step.name, "round": step.round,
                "fingerprint": state.fingerprint, "digest": "",
                "inputs": {
                    role: {"digest": i.digest, "step": i.step, "fingerprint": i.fingerprint, "sources": i.sources}
                    for role, i in state.inputs.items()
                },
                "settings": hashed_settings(settings, step.stage), "seed": settings.run.seed,
                "metrics": metrics_of(stage) | (evaluate if stage == "evaluate" else {}),
                "cost": {"seconds": seconds, "tokens": seconds * 11_000, "flops": seconds * 7.3e10,
                    "peak_memory_bytes": 9e8, "busy_seconds": seconds * 0.9,
                    "energy_joules": seconds * 9.0, "carbon_grams": seconds * 1.2e-3, "utilisation": 0.4},
                "derived": {"rows_dropped": {HOSTILE: 2}} if stage == "rank" else {"prompts_dropped": {}},
                "environment": {"python": "3.11.9", "versions": {"torch": "2.13.0"}, "device": HOSTILE},
                "resumed_from": 20 if stage == "ppo" else None, "finished": "2026-07-01T12:00:00+00:00",
                "seconds": seconds,
            }  # fmt: skip
            artifacts.publish(state.work, Manifest.model_validate(made))
            before[step.name] = inspector.look(step, before)
    return folder / "run"


def write_extras(work, artifact, stage, rng):
    def write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(artifact / "some.jsonl", [{"stage": stage}])
    if stage == "evaluate":
        write(artifact / "comparisons.jsonl", comparisons(rng))
    if stage == "rank":
        write(
            artifact / "rankings.jsonl",
            [{"annotator": HOSTILE if n % 3 == 0 else f"annotator-{n % 3}"} for n in range(425)],
        )
    if stage == "pretrain":
        write(
            work / "samples.jsonl",
            [
                {"step": n, "prompt": "Once", "text": "Once " + "the a bird " * (n // 100)}
                for n in range(0, 901, 100)
            ],
        )
    if stage == "ppo":
        write(
            work / "samples.jsonl",
            [
                {"step": n, "prompt": "Tell", "response": HOSTILE, "score": n / 10}
                for n in range(0, 43, 6)
            ],
        )
