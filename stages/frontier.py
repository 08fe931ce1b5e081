"""What ppo keeps of its validations where a gold is watched: the KL-reward frontier with its peak.

`validations.jsonl` has what each validation prompt got, `best_of_n.json` the baseline, and
`frontier.json` what the report draws. All lie beside the artifact. Shapes: S validations, N prompts.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from pipeline.job import Metrics, Out
from pipeline.records import read_jsonl
from pipeline.settings import Settings
from pipeline.statistics import mean_with_interval
from stages import ppo_math
from stages.answering import best_of_n_kl
from stages.common import gather_list, num_parameters, own_share, seed_for
from stages.critics import active
from stages.engines import HfEngine, Sampling
from stages.experience import Models, Rollout
from stages.over_optimisation import (
    expected_of_best,
    find_peak,
    gold_at,
    mean,
    powers_of_two,
)
from stages.prompts import PromptIds
from stages.sharding import whole

Row = dict[str, Any]
BEST_OF_N, FRONTIER = "best_of_n.json", "frontier.json"


def validation_row(rollout: Rollout) -> Row:
    """What each prompt of a validation got: score with penalties, gold, and KL in nats."""
    kl = ppo_math.kl_estimates(rollout.logprobs_BR, rollout.ref_logprobs_BR, rollout.batch.valid_BR)
    return {
        "score": rollout.scores_B.tolist(),
        "gold": rollout.parts_B["gold"].tolist(),
        "kl": kl.k1_BR.sum(-1).tolist(),
    }


# ---- the baseline ----------------------------------------------------------------------------


def best_of_n_baseline(
    settings: Settings,
    models: Models,
    prompts: list[PromptIds],
    accelerator: Accelerator,
    out: Out,
) -> Row:
    """Score and gold of the best of 1, 2, 4, ... responses of the reference, chosen by the score.

    Every n is estimated from the same `ppo.best_of` responses to each prompt. Kept on disk, so that a
    run that goes on does not sample again.
    """
    kept = out.work / BEST_OF_N
    if kept.exists():
        found: Row = json.loads(kept.read_text(encoding="utf-8"))
        return found
    n = settings.ppo.best_of
    out.say(f"best-of-n: {n} responses of the reference to each of {len(prompts)} prompts")
    share = own_share(len(prompts), accelerator)
    # a rank without a prompt does the first one for nothing: shards are gathered together
    scored = _sample_and_score(settings, models, prompts, share or range(1), accelerator, out)
    rows = gather_list(scored if share else [], accelerator)
    seed = seed_for(settings.run.seed, "ppo", "frontier")
    curve = []
    for size in powers_of_two(n):
        scores, golds = (
            [expected_of_best(row["score"], row[name], size) for row in rows]
            for name in ("score", "gold")
        )
        gold = mean_with_interval(golds, seed)
        curve.append(
            {
                "n": size,
                "kl": best_of_n_kl(size),
                "score": mean(scores),
                "gold": gold.value,
                "gold_low": gold.low,
                "gold_high": gold.high,
            }
        )
    tokens = sum(row["tokens"] for row in rows)
    found = {"responses": n, "prompts": len(rows), "curve": curve, "tokens": tokens}
    if out.rank == 0:
        temporary = kept.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")
        os.replace(temporary, kept)
    accelerator.wait_for_everyone()
    return found


def _sample_and_score(
    settings: Settings,
    models: Models,
    prompts: list[PromptIds],
    share: range,
    accelerator: Accelerator,
    out: Out,
) -> list[Row]:
    ppo, policy = settings.ppo, models.agent.policy
    several = [prompts[i] for i in share for _ in range(ppo.best_of)]
    seeds = [
        seed_for(settings.run.seed, "ppo", out.round, "best_of", i, k)
        for i in share
        for k in range(ppo.best_of)
    ]
    model = models.reference or policy
    ids = [prompt.ids for prompt in several]
    adapters_off = nullcontext() if models.reference is not None else active(policy, None)
    with whole(model), adapters_off:
        sampling = Sampling.of(ppo, models.tokenizer)
        generated = HfEngine(model, sampling, accelerator).generate(ids, seeds)
    responses = [g.tokens for g in generated]
    with torch.no_grad(), accelerator.autocast():
        scores_B, parts_B = models.watched().score(
            ids,
            [list(prompt.prompt.messages) for prompt in several],
            responses,
            models.tokenizer,
            accelerator.device,
            ppo,
            ppo.rows_per_rank,
        )
    scores, gold, size = scores_B.tolist(), parts_B["gold"].tolist(), ppo.best_of
    return [
        {
            "score": scores[at : at + size],
            "gold": gold[at : at + size],
            "tokens": sum(map(len, responses[at : at + size])),
        }
        for at in range(0, len(responses), size)
    ]


def baseline_cost(found: Row, models: Models) -> dict[str, float]:
    """Tokens that the baseline wrote, and what decoding and scoring them took at least."""
    return {
        "tokens": found["tokens"],
        "flops": 4.0 * found["tokens"] * num_parameters(models.agent.policy),
    }


# ---- the whole -------------------------------------------------------------------------------


def describe(settings: Settings, baseline: Row | None, metrics: Metrics, out: Out) -> Metrics:
    """Write `frontier.json` (rank 0) and say what it shows; the figures for the manifest."""
    if out.rank != 0:
        return {}
    rows = read_jsonl(out.validations)
    seed = seed_for(settings.run.seed, "ppo", "frontier")
    updates = [row["step"] for row in rows]
    gold_SN, score_SN = [row["gold"] for row in rows], [row["score"] for row in rows]
    peak = find_peak(updates, gold_SN, score_SN, seed)
    curve = []
    for row in rows:
        gold = mean_with_interval(row["gold"], seed)
        curve.append(
            {
                "update": row["step"],
                "kl": mean(row["kl"]),
                "score": mean(row["score"]),
                "gold": mean(row["gold"]),
                "gold_low": gold.low,
                "gold_high": gold.high,
            }
        )
    kept = next(row for row in curve if row["update"] == metrics["best_update"])
    best_of_n = baseline["curve"] if baseline else []
    same_kl = gold_at([(row["kl"], row["gold"]) for row in best_of_n], max(0.0, kept["kl"]))
    found: Row = {
        "gold": settings.ppo.gold,
        "keep": settings.ppo.keep,
        "kept_update": metrics["best_update"],
        "gold_accuracy": out.derived.get("gold_accuracy"),
        "validations": curve,
        "peak": peak._asdict(),
        "best_of_n": best_of_n,
        "best_of_n_gold_at_kept_kl": same_kl,
    }
    (out.work / FRONTIER).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    out.say(_sentence(settings, peak._asdict()))
    return {
        "gold_peak_update": peak.update,
        "gold_peak_low": peak.update_low,
        "gold_peak_high": peak.update_high,
        "gold_drop": peak.drop,
        "gold_fell": peak.fell,
    }


def _sentence(settings: Settings, peak: Row) -> str:
    where = f"update {peak['update']} ({peak['update_low']} to {peak['update_high']})"
    if not peak["fell"]:
        return f"gold was highest at {where}; that it fell afterwards is not shown"
    advice = (
        "" if settings.ppo.keep == "best_gold" else "; ppo.keep=best_gold publishes that policy"
    )
    return (
        f"WARNING: optimised too far: gold was highest at {where} and fell by {peak['drop']:.3g}"
        f" ({peak['drop_low']:.3g} to {peak['drop_high']:.3g}) while the score rose{advice}"
    )
