"""How much each annotator's rankings count in training, and why: from what the store knows of them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

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
from pipeline.settings.rank import RankSettings


def annotator_rows(store: Store, settings: RankSettings) -> list[dict[str, Any]]:
    """A row for everybody who has ranked: quality and weight, by the name that files show.

    Raises:
        StageError: the known answers contradict everybody, so that no weight is defined.
    """
    shown = pseudonyms(store)
    with store.read() as tx:
        found = quality(Judgements().read(tx))
        names = {
            str(user.id): (shown(user.kind, user.name), user.kind)
            for user in tx.execute(sa.select(users))
        }
    weights = _weights(found, settings)
    rows = [
        {
            "annotator": names[one.annotator][0],
            "kind": names[one.annotator][1],
            "rankings": one.rankings,
            "gold_items": one.gold_accuracy.prompts if one.gold_accuracy else 0,
            "gold_accuracy": _value(one.gold_accuracy),
            "agreement": _value(one.agreement),
            "self_consistency": _value(one.self_consistency),
            "weight": weights[one.annotator],
        }
        for one in found
    ]
    return sorted(rows, key=lambda row: str(row["annotator"]))


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
