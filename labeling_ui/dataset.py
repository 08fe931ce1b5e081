"""The rankings of an artifact as a dataset that leaves the house: parquet that `load_dataset` reads.

    pairs/train.parquet   pairs/heldout.parquet     TRL's conversational preference format, no ties
    groups/train.parquet  groups/heldout.parquet    one row per set of responses, the ranks of every annotator
    counts.json                                     rows by file, what was left out by reason

Command: python -m labeling_ui.dataset RANKINGS.jsonl FOLDER (called by `prefline export --what rankings`).
Reads an artifact, not the label store: the same artifact gives the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from labeling_ui.aggregate import group_rankings, group_rows, pair_rows
from labeling_ui.export_files import preference_row
from labeling_ui.row_files import open_rows
from pipeline.pedigree import shown_annotators
from pipeline.records import Ranking, read_jsonl

SPLITS = ("train", "heldout")


def write(source: Path, folder: Path) -> dict[str, Any]:
    """Write the dataset of the rankings in `source` to `folder`; what counts.json holds."""
    rows = read_jsonl(source)
    shown = shown_annotators(rows)
    rankings = [
        # the id of a ranking covers its annotator's name, so that it must not outlive the name
        Ranking.from_row({**row, "annotator": shown[row["annotator"]]})
        for row in rows
    ]
    groups, left_out = group_rankings(rankings)
    counts: dict[str, dict[str, int]] = {"pairs": {}, "groups": {}}
    for split in SPLITS:
        here = [group for group in groups if group.split == split]
        pairs, dropped = pair_rows(here, "all")
        left_out += dropped
        found = {"pairs": [preference_row(row) for row in pairs], "groups": group_rows(here)}
        for name, made in found.items():
            if made:
                counts[name][split] = len(made)
                _write(folder / name / f"{split}.parquet", f"{name}.parquet", made)
    return {"rows": counts, "left_out": _plain(left_out)}


def _write(path: Path, layout: str, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_rows(layout, path) as file:
        for row in rows:
            file.write(row)


def _plain(counter: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in sorted(counter.items()) if count}


def main(arguments: list[str]) -> None:
    source, folder = map(Path, arguments)
    counts = write(source, folder)
    (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
