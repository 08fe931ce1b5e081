"""How much each annotator's rankings count in training, and why: from what the store knows of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from labeling_ui.aggregate import group_rankings
from labeling_ui.exporting import pseudonyms
from labeling_ui.judgements import Estimate
from labeling_ui.quality import (
    AnnotatorQuality,
    exclusions_from_gold,
    quality,
    weights_from_gold,
)
from labeling_ui.schema import users
from labeling_ui.store import Store
from labeling_ui.stored_judgements import Judgements
from pipeline.errors import DataError, StageError
from pipeline.records import Ranking
from pipeline.settings.rank import RankSettings


def annotator_rows(
    store: Store, rankings: list[Ranking], settings: RankSettings
) -> list[dict[str, Any]]:
    """A row for everybody whose rankings these are: quality and weight, by the name they have there.

    How they agree is measured on these rankings; known answers and repeats are in the store alone.

    Raises:
        StageError: the known answers contradict everybody, so that no weight is defined.
    """
    groups, _ = group_rankings(rankings)
    here = {one.annotator: one for one in quality([j for g in groups for j in g.judgements()])}
    tested = _people(store)
    weights = _weights([tested[name] for name in sorted(tested)], settings)
    rows = []
    for name, one in sorted(here.items()):
        test = tested.get(name)
        rows.append(
            {
                "annotator": name,
                "rankings": one.rankings,
                "agreement": _value(one.agreement),
                "gold_items": test.gold_accuracy.prompts if test and test.gold_accuracy else 0,
                "gold_accuracy": _value(test.gold_accuracy) if test else None,
                "self_consistency": _value(test.self_consistency) if test else None,
                "weight": weights.get(name, 1.0),
            }
        )
    return rows


def _people(store: Store) -> dict[str, AnnotatorQuality]:
    """What the store knows of people, by pseudonym."""
    shown = pseudonyms(store)
    with store.read() as tx:
        people = tx.execute(sa.select(users).where(users.c.kind == "person")).all()
        names = {str(user.id): shown(user.kind, user.name) for user in people}
        said = [found for found in Judgements().read(tx) if found.annotator in names]
    found = [replace(one, annotator=names[one.annotator]) for one in quality(said)]
    return {one.annotator: one for one in found}


def _weights(found: list[AnnotatorQuality], settings: RankSettings) -> dict[str, float]:
    try:
        if settings.weigh_by == "gold":
            weights = weights_from_gold(found)
        else:
            weights = dict.fromkeys((one.annotator for one in found), 1.0)
    except DataError as error:
        raise StageError(
            f"rank.weigh_by: {error.message}", f"{error.hint} Or set rank.weigh_by=none."
        ) from None
    if settings.min_gold_accuracy is None:
        return weights
    kept = exclusions_from_gold(found, settings.min_gold_accuracy)
    return {name: weight * kept[name] for name, weight in weights.items()}


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value
