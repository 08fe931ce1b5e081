"""The state of every step of a run, in the words that users see.

done · running · partial (step 400 of 900) · stale: sft.lr 1e-4 -> 2e-4 · damaged: model.safetensors
waiting for people: 37 of 120 rankings · failed: ... · missing
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline import artifacts, gate, manifest, sources, workspace
from pipeline.errors import ArtifactError, DataError
from pipeline.files import HashCache, read_json
from pipeline.job import Input
from pipeline.manifest import Manifest
from pipeline.plan import Step, plan
from pipeline.records import content_id
from pipeline.workspace import Run

Word = Literal["done", "running", "partial", "stale", "damaged", "waiting", "failed", "missing"]


@dataclass(frozen=True)
class StepState:
    """What is known of one step. `work` and `fingerprint` are None until its inputs are there."""

    step: Step
    word: Word
    reason: str | None = None
    fingerprint: str | None = None
    work: Path | None = None
    inputs: dict[str, Input] = field(default_factory=dict)
    manifest: Manifest | None = None
    """Of the current result if done or damaged, of the old one if stale."""
    gate: gate.Gate | None = None
    """Of a policy that optimises a reward model of this line."""

    @property
    def text(self) -> str:
        """The state as users read it."""
        if self.word == "waiting":
            return f"waiting for people: {self.reason}" if self.reason else "waiting for people"
        if self.reason is None:
            return self.word
        if self.word in ("partial", "running"):
            return f"{self.word} ({self.reason})"
        return f"{self.word}: {self.reason}"

    def to_row(self) -> dict[str, Any]:
        """The row of `status --json`."""
        made = self.manifest
        return {
            "step": self.step.name,
            "round": self.step.round,
            "stage": self.step.stage.name,
            "state": self.word,
            "reason": self.reason,
            "fingerprint": self.fingerprint or (made.fingerprint if made else None),
            "digest": made.digest if made else None,
            "path": str(self.work / artifacts.FOLDER) if self.work and made else None,
            "metrics": made.metrics if made else {},
            "seconds": made.seconds if made else None,
            "cost": made.cost if made else {},
        }


def inspect(run: Run) -> list[StepState]:
    """The state of every step, in the order of the line. Reads only."""
    inspector = Inspector(run)
    states = inspector.look_at_all()
    inspector.cache.save()
    return states


class Inspector:
    """Looks at steps; keeps what it has read, because a run has many steps and one history."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.steps = plan(run.settings)
        self.cache: HashCache = run.hashes()
        self._source_digests: dict[tuple[str, ...], str | None] = {}
        self._accepted: set[Path] = set()

    def accept(self, work: Path) -> None:
        """Take the rankings in `work` as they are, though people go on ranking."""
        self._accepted.add(work)

    def look_at_all(self) -> list[StepState]:
        states: dict[str, StepState] = {}
        for step in self.steps:
            states[step.name] = self.look(step, states)
        return list(states.values())

    def look(self, step: Step, before: Mapping[str, StepState]) -> StepState:
        """The state of `step`, given those of the steps that it reads."""
        inputs, digests = self._inputs(step, before)
        if any(digest is None for digest in digests.values()):
            return self._without_inputs(step, before, digests)
        known = {role: digest for role, digest in digests.items() if digest is not None}
        fingerprint = manifest.fingerprint(step, self.run.settings, known)
        if step.stage.kind == "rankings":
            found = self._rankings(step, fingerprint, inputs, known)
            if found is not None:
                return found
        work = self.run.step_dir(step.name, fingerprint)
        if (work / manifest.NAME).is_file():
            return self._finished(step, fingerprint, work, inputs)
        found_gate = self._gate(step, before)
        if found_gate and found_gate.closed:
            return StepState(
                step, "failed", found_gate.text, fingerprint, work, inputs, gate=found_gate
            )
        word, reason = self._unfinished(step, fingerprint, work)
        old = self._old(step)
        if word == "missing" and old is not None:
            why = manifest.why_stale(old[1], step, self.run.settings, digests)
            stale_reason = why or "its result was removed"
            return StepState(
                step, "stale", stale_reason, fingerprint, old[0], inputs, old[1], found_gate
            )
        return StepState(step, word, reason, fingerprint, work, inputs, gate=found_gate)

    def _gate(self, step: Step, before: Mapping[str, StepState]) -> gate.Gate | None:
        """What the gate says of the reward model that `step` would optimise."""
        settings = self.run.settings
        if not gate.guards(step, settings):
            return None
        made = before[step.inputs["reward_model"]].manifest
        return gate.look(settings.reward.gate, made.metrics) if made else None

    # ---- inputs --------------------------------------------------------------------------

    def _inputs(
        self, step: Step, before: Mapping[str, StepState]
    ) -> tuple[dict[str, Input], dict[str, str | None]]:
        """The inputs that exist, and the digest of each role (None: not made yet, or gone)."""
        inputs: dict[str, Input] = {}
        digests: dict[str, str | None] = {}
        for role, name in step.inputs.items():
            state = before[name]
            if state.word != "done" or state.manifest is None or state.work is None:
                digests[role] = None
                continue
            made = state.manifest
            digests[role] = made.digest
            inputs[role] = Input(
                role=role,
                digest=made.digest,
                path=state.work / artifacts.FOLDER,
                step=name,
                stage=made.stage,
                fingerprint=made.fingerprint,
                contract=made.contract,
            )
        for role, given in step.sources.items():
            digest = self._source_digest(given)
            digests[role] = digest
            if digest is not None:
                inputs[role] = Input(role=role, digest=digest, sources=given)
        return inputs, digests

    def _source_digest(self, given: tuple[str, ...]) -> str | None:
        if given not in self._source_digests:
            try:
                self._source_digests[given] = sources.digest_all(given, self.cache)
            except DataError:
                self._source_digests[given] = None
        return self._source_digests[given]

    # ---- states --------------------------------------------------------------------------

    def _without_inputs(
        self, step: Step, before: Mapping[str, StepState], digests: dict[str, str | None]
    ) -> StepState:
        old = self._old(step)
        if old is None:
            return StepState(step, "missing")
        reason = manifest.why_stale(old[1], step, self.run.settings, digests)
        for role, name in step.inputs.items():
            if before[name].word == "damaged" and digests[role] is None:
                reason = f"input {name} damaged"
        for role, given in step.sources.items():
            if digests[role] is None:
                reason = f"input {role} is gone ({', '.join(given)})"
        return StepState(step, "stale", reason, None, old[0], {}, old[1])

    def _rankings(
        self, step: Step, fingerprint: str, inputs: dict[str, Input], digests: dict[str, str]
    ) -> StepState | None:
        """The state of rankings that were exported once; None where they were not.

        The same settings and inputs give another artifact when people have gone on since: the
        newest one that fits counts, and is stale when the store holds more.
        """
        exported = self._exported(step, digests)
        if not exported:
            return None
        work, made = exported[-1]
        labels = self.run.labels(step.name)
        then = made.derived.get("labels")
        if work in self._accepted or labels is None or then is None or then == labels:
            return self._finished(step, made.fingerprint, work, inputs)
        more = labels["rankings"] - then["rankings"]
        words = "new ranking" if more == 1 else "new rankings"
        reason = f"{more} {words}" if more > 0 else "rankings were changed"
        if labels.get("forgotten") != then.get("forgotten"):
            reason = "an annotator was forgotten"
        fingerprint = content_id("labels", fingerprint, labels)
        word, progress = self._unfinished(
            step, fingerprint, self.run.step_dir(step.name, fingerprint)
        )
        if word != "missing":
            work = self.run.step_dir(step.name, fingerprint)
            return StepState(step, word, progress, fingerprint, work, inputs)
        return StepState(step, "stale", reason, fingerprint, work, inputs, made)

    def _exported(self, step: Step, digests: dict[str, str]) -> list[tuple[Path, Manifest]]:
        """Readable results of these settings and inputs, the one in use last."""
        found, latest = [], self.run.latest(step.name)
        for path in (self.run.path / step.name).glob(f"*/{manifest.NAME}"):
            try:
                made = manifest.read(path.parent)
            except ArtifactError:
                continue
            if manifest.why_stale(made, step, self.run.settings, digests) is None:
                found.append((path.parent, made))
        return sorted(found, key=lambda item: (item[0] == latest, item[1].finished))

    def _finished(
        self, step: Step, fingerprint: str, work: Path, inputs: dict[str, Input]
    ) -> StepState:
        try:
            made = manifest.read(work)
        except ArtifactError as error:
            # a damaged manifest is a state; one from the future is not ours to judge
            if "newer version" in error.message:
                raise
            return StepState(step, "damaged", manifest.NAME, fingerprint, work, inputs)
        damage = artifacts.find_damage(work, made, self.cache)
        word: Word = "damaged" if damage else "done"
        return StepState(step, word, damage, fingerprint, work, inputs, made)

    def _unfinished(self, step: Step, fingerprint: str, work: Path) -> tuple[Word, str | None]:
        last = self._last_event(step, fingerprint)
        event = last.get("event")
        beat = _heartbeat(work)
        if event == "started" and workspace.is_locked(self.run.path):
            return "running", beat
        progress = self.run.rank_progress(step.name)
        if event == "people":
            return "waiting", f"{progress[0]} of {progress[1]} rankings" if progress else None
        if event == "failed":
            return "failed", str(last.get("reason", "")).split("\n", 1)[0]
        if work.is_dir():
            return "partial", beat
        return "missing", None

    def _last_event(self, step: Step, fingerprint: str) -> dict[str, Any]:
        last: dict[str, Any] = {}
        for row in self.run.events():
            if row.get("step") == step.name and row.get("fingerprint") == fingerprint:
                last = row
        return last

    def _old(self, step: Step) -> tuple[Path, Manifest] | None:
        """The last complete result of a step, made from other settings or inputs."""
        work = self.run.latest(step.name)
        if work is None:
            return None
        try:
            return work, manifest.read(work)
        except ArtifactError as error:
            if "newer version" in error.message:
                raise
            return None


def _heartbeat(work: Path) -> str | None:
    beat = read_json(work / "heartbeat.json")
    if not isinstance(beat, dict):
        return None
    return f"{beat.get('unit', 'step')} {beat.get('done')} of {beat.get('total')}"
