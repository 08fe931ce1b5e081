"""Simulated annotators: the hidden rubric plus noise, through the same doors as people.

Each has an error of its own for each response, which depends on seed, annotator, prompt and
response only: the same run gives the same rankings in any order and on any machine. Two responses
are called equal when the noisy scores differ by less than `rank.tie_margin`.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from labeling_ui.assignments import claim_task
from labeling_ui.schema import tasks
from labeling_ui.store import Store, ensure_user
from labeling_ui.submitting import submit_in
from pipeline import demo_rubric
from pipeline.errors import ConfigError
from pipeline.records import content_id
from pipeline.settings.rank import RankSettings

_BATCH = 100
Report = Callable[[int, int], None]


def annotators_of(prompt_id: str, settings: RankSettings, seed: int) -> list[str]:
    """Who ranks this prompt: `overlap` of the annotators, drawn for each prompt."""
    names = [f"sim-{i}" for i in range(1, settings.annotators + 1)]
    names.sort(key=lambda name: content_id("annotator of", seed, prompt_id, name))
    return names[: settings.overlap]


def noisy_ranks(
    prompt: str, responses: Sequence[str], annotator: str, settings: RankSettings, seed: int
) -> list[int]:
    """This annotator's ranks: 1 is best, equal numbers are ties."""
    seen = [
        demo_rubric.score(prompt, text) + settings.noise * _error(seed, annotator, prompt, text)
        for text in responses
    ]
    ranks = [0] * len(responses)
    rank, best_of_tier = 0, float("inf")
    for i in sorted(range(len(seen)), key=lambda i: -seen[i]):
        # measured from the best of the tier: a chain of near-equals must not tie best and worst
        gap = best_of_tier - seen[i]
        if gap > 0 and gap >= settings.tie_margin:
            rank, best_of_tier = rank + 1, seen[i]
        ranks[i] = rank
    return ranks


def _error(seed: int, annotator: str, prompt: str, response: str) -> float:
    return random.Random(content_id("noise", seed, annotator, prompt, response)).gauss(0.0, 1.0)


def rank_all(
    store: Store, step: str, settings: RankSettings, seed: int, report: Report = lambda *_: None
) -> set[tuple[str, int]]:
    """Rank every active task of `step`; (task, user) of each ranking.

    A ranking that is there already is left alone; one that came out differently under other
    settings is superseded.

    Raises:
        ConfigError: more annotators per prompt wanted than there are.
    """
    if settings.overlap > settings.annotators:
        raise ConfigError(
            f"rank.overlap: {settings.overlap} annotators per prompt, but rank.annotators is"
            f" {settings.annotators}"
        )
    with store.read() as tx:
        query = sa.select(tasks).where(tasks.c.step == step, tasks.c.active).order_by(tasks.c.id)
        waiting = tx.execute(query).all()
    done: set[tuple[str, int]] = set()
    ids: dict[str, int] = {}
    for start in range(0, len(waiting), _BATCH):
        batch = waiting[start : start + _BATCH]
        with store.write() as tx:
            for task in batch:
                prompt = json.loads(task.messages)[-1]["content"]
                for name in annotators_of(task.prompt_id, settings, seed):
                    if name not in ids:
                        ids[name] = ensure_user(tx, "simulated", name)
                    now = time.time()
                    shown = claim_task(tx, ids[name], task.id, 1, now)
                    ranks = noisy_ranks(prompt, shown.responses, name, settings, seed)
                    submit_in(tx, ids[name], shown.token, ranks, now, "simulated", revise=True)
                    done.add((task.id, ids[name]))
        report(start + len(batch), len(waiting))
    return done
