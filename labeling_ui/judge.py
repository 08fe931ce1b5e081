"""Judge: people compare what the models said to held-out prompts, without knowing which said what.

Queues the answers in the label store and waits for people: too few judgements end the step with exit
3, and `prefline resume` goes on once there are enough. The ranking app shows these prompts like any
other, the answers in a random order for each person. They are tasks of kind `judge`: no rank step and
no export ever takes them for rankings to learn from. The queues of rank steps are closed meanwhile,
so that nobody ranks what would make the policy stale.

Reads: `answers` (artifact). Writes: judgements.jsonl (records.Ranking, one a person and prompt).
Command: prefline rank RUN opens the app; prefline resume RUN runs this step.

Metrics: judgements, prompts (judged by somebody), annotators, same (prompts to which all models said
the same: a tie without a question), agreement (of two people about a strict pair; null without
overlap).
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import sqlalchemy as sa

from labeling_ui.exporting import asked, pseudonyms
from labeling_ui.rank import agreement
from labeling_ui.schema import lot, queues
from labeling_ui.step_queue import fill_queue, wait_for_people
from labeling_ui.store import STORE_FILE, Store, response_ids, task_row
from pipeline import worker
from pipeline.errors import StageError
from pipeline.job import Input, Inputs, Metrics, Out
from pipeline.records import Prompt, Ranking, content_id, read_jsonl, write_jsonl
from pipeline.settings import Settings

MODELS = ("policy", "sft", "base")


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    with closing(Store(settings.rank.store or out.run_dir / STORE_FILE)) as store:
        return judge_in(store, settings, inputs, out)


def judge_in(store: Store, settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    """The step, in an open store."""
    same = queue_comparisons(store, settings, inputs["answers"], out)
    wait_for_people(store, out, "judgements")
    judgements = _collect(store, out.step)
    if not judgements:
        raise StageError(
            f"{out.step}: nobody could judge a prompt: each was found unrankable",
            "Look at the answers, or take people out of evaluate.judges.",
        )
    out.artifact.mkdir(parents=True, exist_ok=True)
    write_jsonl(out.artifact / "judgements.jsonl", (found.to_row() for found in judgements))
    with store.write() as tx:
        tx.execute(sa.update(queues).where(queues.c.step == out.step).values(open=False))
    return {
        "judgements": len(judgements),
        "prompts": len({found.prompt_id for found in judgements}),
        "annotators": len({found.annotator for found in judgements}),
        "same": same,
        "agreement": agreement(judgements),
    }


def queue_comparisons(store: Store, settings: Settings, answers: Input, out: Out) -> int:
    """Put the answers into the queue; doing it again changes nothing. How many prompts need nobody.

    Raises:
        StageError: all models say the same to every prompt.
    """
    rows, same = _tasks(answers, out)
    if not rows:
        raise StageError(
            f"{out.step}: the models say the same to all {same} prompts: there is nothing to compare",
            "Take people out of evaluate.judges.",
        )
    given = settings.evaluate
    configured = {
        "by": "people",
        "overlap": given.people.overlap,
        "minimum": given.people.minimum,
        "lease_minutes": given.people.lease_minutes,
        # known answers and repeats measure annotators of rankings
        "gold_rate": 0.0,
        "repeat_rate": 0.0,
    }
    fill_queue(store, out.step, configured, rows, answers.digest)
    out.say(f"{len(rows)} prompts to judge by people; to {same} more all models say the same")
    return same


def _tasks(answers: Input, out: Out) -> tuple[list[dict[str, Any]], int]:
    assert answers.path is not None, "answers is an artifact of a step"
    prompts = [Prompt.from_row(row) for row in read_jsonl(answers.path / "prompts.jsonl")]
    files = [answers.path / f"{model}.jsonl" for model in MODELS]
    said = [[row["text"] for row in read_jsonl(file)] for file in files if file.exists()]
    rows, same = [], 0
    for prompt, *given in zip(prompts, *said, strict=True):
        texts = list(dict.fromkeys(given))
        if len(texts) < 2:
            same += 1
            continue
        # an id of its own: a rank step may have queued the same responses
        task = content_id("judge", out.step, prompt.id, sorted(response_ids(prompt.id, texts)))
        row = task_row(
            prompt.messages,
            texts,
            round=out.round,
            origin="evaluation",
            step=out.step,
            split=prompt.split,
            kind="judge",
        )
        rows.append(row | {"id": task, "lot": lot(task)})
    return rows, same


def _collect(store: Store, step: str) -> list[Ranking]:
    """What people said of the tasks in use, each person's last word, in the order of ids."""
    found: dict[str, Ranking] = {}
    with store.read() as tx:
        for prompt in asked(tx, 0.0, pseudonyms(store)):
            for answer in prompt.answers:
                row = answer.row
                of_this = row.task_kind == "judge" and row.step == step and row.active
                # `judge` is all that may speak against it
                if of_this and answer.ranking and answer.left_out == "judge" and not row.late:
                    found[answer.id] = answer.ranking
    return [found[key] for key in sorted(found)]


if __name__ == "__main__":
    worker.main()
