"""Labels in and out of a run, by hand.

    python -m labeling_ui.labels RUN import PATH [PATH ...] [--dry-run]
    python -m labeling_ui.labels RUN queue PATH [PATH ...] [--write | --gold] [--dry-run]
    python -m labeling_ui.labels RUN export --to DIR [--mode all|soft|majority|unanimous] [--all]
    python -m labeling_ui.labels RUN export --to FILE [--format rankings|pairs|parquet]
    python -m labeling_ui.labels RUN stats
    python -m labeling_ui.labels RUN backup --to FILE
    python -m labeling_ui.labels RUN forget ANNOTATOR

Imported rankings, and those of queued responses, count in every later rank step. `forget` removes a
person's rankings, drafts and account for good; artifacts that were published before are immutable
and are named. The data formats are described in docs/labels.md.
"""

# ruff: noqa: T201 - a command: its results go to stdout
from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from labeling_ui.aggregate import MODES
from labeling_ui.candidates import Kind
from labeling_ui.counting import count
from labeling_ui.export_files import FORMATS, Counts, Options, export_file, export_folder
from labeling_ui.forgetting import forget, shown_as
from labeling_ui.importing import import_rankings
from labeling_ui.progress import tell_progress
from labeling_ui.queueing import queue
from labeling_ui.store import Store, open_run_store
from pipeline import lineage
from pipeline.config import load_settings
from pipeline.errors import EXIT_DONE, DataError, ToolkitError
from pipeline.settings import Settings
from pipeline.settings.rank import RankSettings
from pipeline.workspace import open_run

_SOURCE = "a file (.jsonl .json .parquet .csv .zip), a folder, or a dataset id on the hub"


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        store = open_run_store(given.run)
        rank = load_settings(Settings, given.run / "config.yaml").rank
        command: Callable[[Store, argparse.Namespace, RankSettings], None] = given.act
        command(store, given, rank)
        # `prefline status` knows what came or went
        tell_progress(given.run, store)
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prefline labels", description="Labels in and out of a run. Formats: docs/labels.md."
    )
    parser.add_argument("run", type=Path, help="run directory")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, act: object, words: str, more: str = "") -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(
            name, help=words, description=words + more, formatter_class=raw
        )
        command.set_defaults(act=act)
        return command

    def add_sources(command: argparse.ArgumentParser) -> None:
        command.add_argument("sources", nargs="+", metavar="SOURCE", help=_SOURCE)
        command.add_argument(
            "--max-bad-fraction", type=_fraction, metavar="F",
            help="refuse if more of the rows are unusable (default: rank.max_bad_fraction)",
        )  # fmt: skip
        command.add_argument(
            "--dry-run", action="store_true", help="say what would happen and store nothing"
        )

    command = add("import", _import, "rankings made elsewhere, into the store", _IMPORT)
    add_sources(command)

    command = add("queue", _queue, "work for people: responses to rank, prompts to answer", _QUEUE)
    add_sources(command)
    kinds = command.add_mutually_exclusive_group()
    kinds.add_argument(
        "--write", action="store_const", const="write", dest="kind",
        help="prompts that a person answers (responses in the rows are not looked at)",
    )  # fmt: skip
    kinds.add_argument(
        "--gold", action="store_const", const="gold", dest="kind",
        help="rankings that are known to be right: shown now and then, to measure annotators",
    )  # fmt: skip
    command.set_defaults(kind="rank")
    command.add_argument(
        "--overlap", type=_count, metavar="N",
        help="different people per prompt, of the whole queue (default: rank.overlap at first,"
        " 1 for --write)",
    )  # fmt: skip

    command = add("export", _export, "rankings, pairs and demonstrations, to files", _EXPORT)
    command.add_argument("--to", type=Path, required=True, metavar="DIR|FILE")
    command.add_argument(
        "--mode", choices=MODES, default=MODES[0],
        help="how several annotators of the same responses become pairs (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--all", action="store_true", dest="everything",
        help="rankings.jsonl also holds answers that do not count, each with the reason",
    )  # fmt: skip
    command.add_argument("--format", choices=tuple(FORMATS), help="one file instead of a folder")
    command.add_argument("--replace", action="store_true", help="replace an export that is there")

    add("stats", _stats, "what the store holds, as JSON: by queue, annotator and reason")
    command = add("backup", _backup, "a consistent copy of the store, also while people work")
    command.add_argument("--to", type=Path, required=True, metavar="FILE")

    command = add("forget", _forget, "remove an annotator and all their rankings, for good")
    command.add_argument("name", nargs="?", metavar="ANNOTATOR", help="name or pseudonym")
    command.add_argument("--annotator", metavar="ANNOTATOR", help="the same")
    return parser


_IMPORT = """

A row is a group of responses with ranks, a pair (chosen, rejected; TRL, hh-rlhf, ShareGPT), or a
message tree of Open Assistant. Every later rank step counts what is imported. Again changes nothing.

    prefline labels runs/mine import pairs.jsonl --dry-run
"""
_QUEUE = """

A row is a prompt with `responses`, texts or {"text", "model"}, which people then rank beside those of
the rank steps; a sample step's folder will do. What they say counts in every later rank step. With
--write a row is a prompt alone. The same source again queues nothing twice.

    {"prompt": "Say hello.", "responses": ["Hello!", {"text": "Go away.", "model": "b"}]}

    prefline labels runs/mine queue answers.jsonl --overlap 2
"""
_EXPORT = """

A folder gets rankings.jsonl, pairs.parquet, groups.parquet, demonstrations.jsonl and a manifest.
A name that ends with .jsonl, or --format, gives one file. The same labels give the same bytes.

    prefline labels runs/mine export --to labels --mode majority
    prefline labels runs/mine export --to rankings.jsonl
"""


def _import(store: Store, given: argparse.Namespace, rank: RankSettings) -> None:
    limit = _limit(given, rank)
    report = import_rankings(store, given.sources, limit, by_hand=True, dry_run=given.dry_run)
    print(_dry(given) + report.summary())


def _queue(store: Store, given: argparse.Namespace, rank: RankSettings) -> None:
    kind: Kind = given.kind
    overlap = given.overlap
    if kind == "gold" and overlap is not None:
        raise DataError("--overlap: known answers are shown to everybody")
    report = queue(
        store, given.sources, kind, _limit(given, rank),
        overlap=overlap, first_overlap=rank.overlap if kind == "rank" else 1,
        lease_minutes=rank.lease_minutes, dry_run=given.dry_run,
    )  # fmt: skip
    print(_dry(given) + "\n".join(report.lines()))


def _export(store: Store, given: argparse.Namespace, rank: RankSettings) -> None:
    if not given.to.parent.is_dir():
        raise DataError(f"{given.to.parent}: no such folder")
    options = Options(rank.heldout_fraction, given.mode, given.everything)
    format = given.format or ("rankings" if given.to.suffix == ".jsonl" else None)
    if format is None:
        counts = export_folder(store, given.to, options, given.replace)
    else:
        if given.to.is_dir():
            raise DataError(f"{given.to}: is a folder", "--format writes one file.")
        counts = export_file(store, given.to, format, options)
    print("\n".join([f"{counts.rankings} rankings: {given.to}", *_written(counts)]))


def _written(counts: Counts) -> list[str]:
    lines = []
    for name, rows in counts.rows.items():
        dropped: Counter[str] = +counts.left_out.get(name, Counter())
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items()))
        lines.append(f"  {name}: {rows} rows" + (f"; left out: {reasons}" if reasons else ""))
    return lines


def _stats(store: Store, _given: argparse.Namespace, _rank: RankSettings) -> None:
    with store.read() as tx:
        found = count(tx, time.time())
    print(json.dumps(found.to_json(), indent=1, ensure_ascii=False))


def _backup(store: Store, given: argparse.Namespace, _rank: RankSettings) -> None:
    store.backup(given.to)
    print(f"{store.name}: copied to {given.to}")


def _forget(store: Store, given: argparse.Namespace, _rank: RankSettings) -> None:
    if (given.name is None) == (given.annotator is None):
        raise DataError("forget: name one annotator", "prefline labels RUN forget ANNOTATOR")
    name = given.name or given.annotator
    # while the store still knows under which pseudonym they went out
    held = _made_with(given.run, shown_as(store, name))
    gone = forget(store, name)
    print(f"{gone} rankings and the account are gone from {store.name}.")
    lines = [
        f"  {work.relative_to(given.run)} {'holds them' if kind == 'rankings' else 'was made from them'}"
        for work, kind in held
    ]
    stale = "\n".join(["Stale from now on, and on disk until you delete it:", *lines, ""])
    print(
        f"{stale if lines else ''}`prefline run {given.run}` makes the line without them. Exports and"
        " backups made before hold them too.",
        file=sys.stderr,
    )


def _made_with(run: Path, names: set[str]) -> list[tuple[Path, str]]:
    """Step directories with rankings by these names, or made from such, and the kind of each."""
    try:
        opened = open_run(run)
    except ToolkitError:
        # labels beside a configuration, of a line that was never begun
        return []
    reached = lineage.touched_by(opened, lambda row: str(row["annotator"]) in names)
    return [(work, made.kind) for work, made in reached]


# ---- parts ---------------------------------------------------------------------------------


def _limit(given: argparse.Namespace, rank: RankSettings) -> float:
    limit: float | None = given.max_bad_fraction
    return rank.max_bad_fraction if limit is None else limit


def _dry(given: argparse.Namespace) -> str:
    return "nothing is stored: " if given.dry_run else ""


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("a number from 0 to 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 20:
        raise argparse.ArgumentTypeError("a whole number from 1 to 20")
    return value


if __name__ == "__main__":
    sys.exit(main())
