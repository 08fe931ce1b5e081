"""Rank: an order, with ties, over the responses of each prompt.

Queues the sampled responses in the label store, imports rankings made elsewhere, asks simulated
annotators (`rank.by: simulated`) or waits for people: too few rankings end the step with exit 3,
and `prefline resume` goes on once there are enough. Rankings of the round before are carried over.

Reads: `samples` (artifact), `data` (rankings made elsewhere), `rankings` (of the round before).
Writes: rankings.jsonl (records.Ranking), prompts.jsonl (records.Prompt), annotators.json (quality
and weight of each annotator, which the reward stage trains with).
Command: prefline rank RUN opens the app; prefline resume RUN runs this step.

Metrics: rankings, prompts, annotators, mean_responses; strict_pairs (what the reward model learns
from) and ties_fraction (of all pairs: 0.1-0.4 is usual, above 0.7 the responses hardly differ);
agreement (of two annotators about a strict pair: 0.65-0.78 is usual for people, above 0.95 is
suspicious, null without overlap); train, heldout; dropped by reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import sqlalchemy as sa

from labeling_ui.aggregate import group_rankings
from labeling_ui.agreement import pairwise_agreement
from labeling_ui.counting import labels
from labeling_ui.exporting import snapshot
from labeling_ui.importing import Report, import_rankings
from labeling_ui.pace import human_minutes
from labeling_ui.progress import write_progress
from labeling_ui.schema import queues
from labeling_ui.simulate import rank_all
from labeling_ui.step_queue import fill_queue, wait_for_people
from labeling_ui.store import EXTRA, STORE_FILE, Store, task_row
from labeling_ui.weighing import annotator_rows
from pipeline import worker
from pipeline.errors import StageError
from pipeline.job import Input, Inputs, Metrics, Out
from pipeline.records import Prompt, Ranking, SampleGroup, is_heldout, read_jsonl, write_jsonl
from pipeline.settings import Settings

Done = set[tuple[str, int]]


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    with closing(Store(settings.rank.store or out.run_dir / STORE_FILE)) as store:
        return rank_in(store, settings, inputs, out)


def rank_in(store: Store, settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    """The step, in an open store."""
    dropped: Counter[str] = Counter()

    # 1 rankings made elsewhere
    imported = Report()
    if "data" in inputs:
        given = inputs["data"].sources
        imported = import_rankings(store, given, settings.rank.max_bad_fraction)
        out.say(f"imported: {imported.summary()}")
        dropped += imported.tally.reasons + imported.notes

    # 2 the responses of this round
    done: Done = set()
    if "samples" in inputs:
        queue_samples(store, settings, inputs["samples"], out, dropped)
        if settings.rank.by == "simulated":
            seed = settings.run.seed
            done = rank_all(store, out.step, settings.rank, seed, _heartbeat(out))
        else:
            wait_for_people(store, out, "rankings")

    # 3 everything that counts, as one immutable artifact. Counted before it is read: a ranking that
    # comes between is found to be new
    with store.read() as tx:
        out.derived["labels"] = labels(tx, out.step)
        if minutes := human_minutes(tx, out.step):
            out.cost["human_minutes"] = round(minutes, 2)
    rankings = _collect(store, settings, imported.kept | done, out)
    if "rankings" in inputs:
        before = _artifact_rows(inputs["rankings"], "rankings.jsonl")
        rankings += [Ranking.from_row(row) for row in before]
    prompts = _sampled_prompts(inputs)
    rankings = _with_splits(rankings, prompts, settings.rank.heldout_fraction)
    check_usable(rankings)
    for ranking in rankings:
        heldout = ranking.split == "heldout"
        # without samples the imported prompts are what the policy learns and is judged on
        prompt = Prompt(ranking.messages, "test" if heldout else "train")
        prompts.setdefault(prompt.id, prompt)
    out.artifact.mkdir(parents=True, exist_ok=True)
    write_jsonl(out.artifact / "rankings.jsonl", (ranking.to_row() for ranking in rankings))
    write_jsonl(out.artifact / "prompts.jsonl", (prompts[key].to_row() for key in sorted(prompts)))
    annotators = annotator_rows(store, rankings, settings.rank)
    text = json.dumps(annotators, indent=1, sort_keys=True, ensure_ascii=False)
    (out.artifact / "annotators.json").write_text(text + "\n", encoding="utf-8")
    _say_weights(annotators, out)
    _finish_queue(store, settings, out)
    return describe(rankings) | {"dropped": dict(sorted(dropped.items()))}


def queue_samples(
    store: Store, settings: Settings, samples: Input, out: Out, dropped: Counter[str]
) -> None:
    """Put the responses of this round into the queue; doing it again changes nothing."""
    rows = []
    for sampled in _artifact_rows(samples, "samples.jsonl"):
        group = SampleGroup.from_row(sampled)
        texts = list(dict.fromkeys(response.text for response in group.responses))
        if len(texts) < 2:
            dropped["prompts with fewer than 2 different responses"] += 1
            continue
        prompt = group.prompt
        row = task_row(
            prompt.messages,
            texts,
            round=out.round,
            origin=samples.digest,
            step=out.step,
            split=prompt.split,
            # priority has done its work where the prompts were chosen: to rank by it as well would
            # leave a choice among the held-out ones to it, where people stop at rank.minimum
            selection_probability=group.selection_probability,
        )
        rows.append(row)
    if not rows:
        raise StageError(
            f"{out.step}: no prompt has two different responses, so there is nothing to rank",
            "Raise sample.responses_per_prompt or sample.temperature.",
        )
    rank = settings.rank
    configured = {
        "by": rank.by,
        "overlap": rank.overlap,
        "minimum": rank.minimum,
        "lease_minutes": rank.lease_minutes,
        "gold_rate": rank.gold_rate,
        "repeat_rate": rank.repeat_rate,
    }
    fill_queue(store, out.step, configured, rows, samples.digest)
    out.say(f"{len(rows)} prompts to rank, by {rank.by}")


def _collect(store: Store, settings: Settings, known: Done, out: Out) -> list[Ranking]:
    """This round's rankings: by the annotators asked for, imported now, or imported by hand."""
    by_people = settings.rank.by == "people"

    def wanted(row: Any) -> bool:
        by_person = row.kind == "person" and row.active
        by_person_here = by_person and by_people and row.step == out.step
        from_elsewhere = bool(row.by_hand) or (by_person and row.step == EXTRA)
        is_known = (row.task_id, row.user_id) in known
        return by_person_here or from_elsewhere or is_known

    return snapshot(store, settings.rank.heldout_fraction, wanted)


def _with_splits(
    rankings: Iterable[Ranking], sampled: dict[str, Prompt], heldout_fraction: float
) -> list[Ranking]:
    """Each ranking once, in the order of ids, with the split that its prompt asks for."""
    result: dict[str, Ranking] = {}
    for ranking in rankings:
        prompt = sampled.get(ranking.prompt_id)
        # an imported ranking of a prompt that is kept for evaluation must not be learned from
        kept_away = prompt is not None and prompt.split != "train"
        heldout = kept_away or is_heldout(ranking.prompt_id, heldout_fraction)
        row = {**ranking.to_row(), "split": "heldout" if heldout else "train"}
        result[ranking.id] = Ranking.from_row(row)
    return [result[key] for key in sorted(result)]


def check_usable(rankings: list[Ranking]) -> None:
    """Refuse rankings from which no reward model can be trained and judged.

    Raises:
        StageError: one sentence that says what is missing.
    """
    if not rankings:
        raise StageError(
            "there is no ranking to learn from", "Every prompt was skipped or dropped."
        )
    pairs = dict.fromkeys(("train", "heldout"), 0)
    for ranking in rankings:
        pairs[ranking.split] += len(ranking.strict_pairs)
    if not any(pairs.values()):
        raise StageError(
            f"all {len(rankings)} rankings are ties: no response was ever better than another",
            "A reward model learns from differences. Check rank.tie_margin, or sample responses"
            " that differ more (sample.temperature).",
        )
    for split, what in (("train", "train on"), ("heldout", "hold out")):
        if not pairs[split]:
            raise StageError(
                f"{len(rankings)} rankings leave no pair to {what}",
                "Add rankings, or change rank.heldout_fraction.",
            )


def describe(rankings: list[Ranking]) -> Metrics:
    """The metrics of this stage."""
    strict = sum(len(ranking.strict_pairs) for ranking in rankings)
    pairs = sum(len(r.ranks) * (len(r.ranks) - 1) // 2 for r in rankings)
    return {
        "rankings": len(rankings),
        "prompts": len({ranking.prompt_id for ranking in rankings}),
        "annotators": len({ranking.annotator for ranking in rankings}),
        "mean_responses": sum(len(r.ranks) for r in rankings) / len(rankings),
        "strict_pairs": strict,
        "ties_fraction": 1 - strict / pairs,
        "agreement": agreement(rankings),
        "train": sum(ranking.split == "train" for ranking in rankings),
        "heldout": sum(ranking.split == "heldout" for ranking in rankings),
    }


def agreement(rankings: list[Ranking]) -> float | None:
    """How often two annotators prefer the same of two responses, where both prefer one.

    Chance is 0.5. None where no two annotators ranked the same responses.
    """
    groups, _ = group_rankings(rankings)
    found = pairwise_agreement([voice for group in groups for voice in group.judgements()])
    return found.value if found else None


def _sampled_prompts(inputs: Inputs) -> dict[str, Prompt]:
    if "samples" not in inputs:
        return {}
    rows = _artifact_rows(inputs["samples"], "prompts.jsonl")
    prompts = [Prompt.from_row(row) for row in rows]
    return {prompt.id: prompt for prompt in prompts}


def _artifact_rows(given: Input, name: str) -> list[dict[str, Any]]:
    assert given.path is not None, f"{given.role} is an artifact of a step"
    return read_jsonl(given.path / name)


def _say_weights(annotators: list[dict[str, Any]], out: Out) -> None:
    for row in annotators:
        if row["weight"] != 1:
            out.say(
                f"{row['annotator']} weighs {row['weight']:.2f}: right in"
                f" {row['gold_accuracy']:.0%} of {row['gold_items']} known answers"
            )


def _finish_queue(store: Store, settings: Settings, out: Out) -> None:
    """People may go on where places are left: their rankings make this step stale."""
    if settings.rank.by == "simulated":
        with store.write() as tx:
            tx.execute(sa.update(queues).where(queues.c.step == out.step).values(open=False))
    write_progress(out.run_dir, store, out.step)


def _heartbeat(out: Out) -> Any:
    return lambda done, total: out.progress(done, total, "prompt")


if __name__ == "__main__":
    worker.main()
