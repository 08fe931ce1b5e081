"""Where an artifact comes from, back to people and data; and what one label has touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import artifacts, manifest
from pipeline.errors import ArtifactError, DataError
from pipeline.manifest import Manifest
from pipeline.plan import plan
from pipeline.records import read_rows
from pipeline.workspace import Run

_SHORTEST_ID = 6


@dataclass
class Node:
    """One artifact or source, and what it was made from."""

    name: str
    """The step, or the source as the user gave it."""
    role: str | None = None
    digest: str | None = None
    fingerprint: str | None = None
    path: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Every setting that the result depends on."""
    rankings: dict[str, Any] = field(default_factory=dict)
    """Of a rankings artifact: how many, by whom, from where, and their ids."""
    again: bool = False
    """It was shown before; its inputs are not repeated."""
    inputs: list[Node] = field(default_factory=list)

    def to_row(self) -> dict[str, Any]:
        row = {key: value for key, value in vars(self).items() if value and key != "inputs"}
        return {**row, "inputs": [node.to_row() for node in self.inputs]}


def all_manifests(run: Run) -> dict[Path, Manifest]:
    """Every complete result of a run, older ones included: step directory -> manifest."""
    found = sorted(run.path.glob(f"*/*/{manifest.NAME}"))
    return {path.parent: manifest.read(path.parent) for path in found}


def backward(run: Run) -> Node:
    """The tree from the last result of the line back to the data.

    Raises:
        ArtifactError: the run has no result yet.
    """
    by_fingerprint = {made.fingerprint: (work, made) for work, made in all_manifests(run).items()}
    last = _last_result(run)
    if last is None:
        raise ArtifactError(
            f"{run.path}: no step has a result yet", f"prefline run {run.path} makes one."
        )
    return _node(last, None, by_fingerprint, set())


def _last_result(run: Run) -> Manifest | None:
    """The last policy; where there is none, the result of the last step that has one."""
    done = [work for step in plan(run.settings) if (work := run.latest(step.name))]
    made = [manifest.read(work) for work in done]
    policies = [item for item in made if item.kind == "policy"]
    best = policies or made
    return best[-1] if best else None


def _node(
    made: Manifest, role: str | None, known: dict[str, tuple[Path, Manifest]], seen: set[str]
) -> Node:
    """`made` and what is behind it. With rounds an artifact has many paths to it: drawn once."""
    work = known[made.fingerprint][0] if made.fingerprint in known else None
    node = Node(made.step, role, made.digest, made.fingerprint, str(work) if work else None)
    if made.fingerprint in seen:
        node.again = True
        return node
    seen.add(made.fingerprint)
    node.settings = made.settings
    if made.kind == "rankings" and work:
        node.rankings = _summary(work)
    for name, item in sorted(made.inputs.items()):
        if item.fingerprint in known:
            node.inputs.append(_node(known[item.fingerprint][1], name, known, seen))
        elif item.step:
            gone = f"{item.step} (its result was removed)"
            node.inputs.append(Node(gone, name, item.digest, item.fingerprint))
        else:
            node.inputs += [Node(source, name, item.digest) for source in item.sources]
    return node


def label_rows(work: Path) -> list[dict[str, Any]]:
    """The rankings in a rankings artifact."""
    rows: dict[str, dict[str, Any]] = {}
    for file in sorted((work / artifacts.FOLDER).glob("*.jsonl")):
        for _, row in read_rows(file):
            if isinstance(row, dict) and "annotator" in row and "id" in row:
                rows[str(row["id"])] = row
    return list(rows.values())


def _summary(work: Path) -> dict[str, Any]:
    rows = label_rows(work)
    return {
        "rankings": len(rows),
        "annotators": dict(sorted(Counter(str(row["annotator"]) for row in rows).items())),
        "sources": dict(sorted(Counter(str(row.get("source", "?")) for row in rows).items())),
        "ids": sorted(str(row["id"]) for row in rows),
    }


def tree_lines(root: Node) -> list[str]:
    """The tree as text."""
    lines: list[str] = []

    def draw(node: Node, indent: str, branch: str) -> None:
        role = f"{node.role}: " if node.role else ""
        mark = f"  {node.fingerprint[:12]}" if node.fingerprint else ""
        lines.append(f"{indent}{branch}{role}{node.name}{mark}{'  (see above)' * node.again}")
        inner = indent + {"": "", "├── ": "│   ", "└── ": "    "}[branch]
        if node.rankings:
            bar = "│   " if node.inputs else "    "
            by = ", ".join(f"{who} {n}" for who, n in node.rankings["annotators"].items())
            lines.append(f"{inner}{bar}{node.rankings['rankings']} rankings by {by or 'nobody'}")
        for number, child in enumerate(node.inputs, 1):
            draw(child, inner, "└── " if number == len(node.inputs) else "├── ")

    draw(root, "", "")
    return lines


def forward(run: Run, label: str) -> dict[str, Any]:
    """The label whose id begins with `label`, and every artifact that it has touched.

    Raises:
        DataError: no such label, or several.
    """
    if len(label) < _SHORTEST_ID:
        raise DataError(f"--label: {label!r} is too short", f"Give {_SHORTEST_ID} digits or more.")
    found: dict[str, dict[str, Any]] = {}

    def is_meant(row: dict[str, Any]) -> bool:
        if not str(row["id"]).startswith(label):
            return False
        found[str(row["id"])] = row
        return True

    reached = touched_by(run, is_meant)
    if not found:
        raise DataError(
            f"--label: no rankings artifact of {run.path} holds a label {label!r}",
            "Ids stand in the first column of: prefline labels RUN export",
        )
    if len(found) > 1:
        raise DataError(f"--label: {label!r} is the beginning of {len(found)} labels")
    return {
        "label": next(iter(found.values())),
        "touched": [
            {"step": item.step, "fingerprint": item.fingerprint, "path": str(work)}
            for work, item in reached
        ],
    }


def touched_by(run: Run, is_meant: Callable[[dict[str, Any]], bool]) -> list[tuple[Path, Manifest]]:
    """Every artifact that holds such a ranking or was made from one that does, older ones included."""
    made = all_manifests(run)
    touched = {
        item.fingerprint
        for work, item in made.items()
        # each row is looked at: one call may note them
        if item.kind == "rankings" and sum(map(is_meant, label_rows(work)))
    }
    # an artifact is touched if one of its inputs is
    grown = True
    while grown:
        more = {
            item.fingerprint
            for item in made.values()
            if any(given.fingerprint in touched for given in item.inputs.values())
        }
        grown = not more <= touched
        touched |= more
    reached = [(work, item) for work, item in made.items() if item.fingerprint in touched]
    return sorted(reached, key=lambda pair: (pair[1].finished, pair[1].step))
