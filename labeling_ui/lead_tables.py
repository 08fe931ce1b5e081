"""Rows of the lead's tables: texts only, each cell as it is to be read. Times are UTC."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from labeling_ui.assignments import SKIP_REASONS
from labeling_ui.attention import Hint
from labeling_ui.counting import Queue
from labeling_ui.dashboard import Overview
from labeling_ui.display import visible
from labeling_ui.forms import CONFIDENCES, FLAGS
from labeling_ui.inspection import Line, Prompt
from labeling_ui.judgements import Estimate
from labeling_ui.lead_charts import shortened
from labeling_ui.pace import Lease

Rows = list[list[str]]
HINTS = ["About", "What"]
LEFT_OUT = ["Answers", "Number"]
LEASES = ["Who", "Prompt", "Since", "Expires"]
QUEUES = [
    "Queue", "By", "State", "Overlap", "Minimum", "Lease, minutes", "Gold rate", "Repeat rate",
]  # fmt: skip
ANNOTATORS = [
    "Annotator", "Kind", "State", "Rankings", "Skipped", "All bad", "Gold accuracy",
    "Agreement with others", "Self-consistency", "Ties", "Median s", "First place wins", "Last label",
]  # fmt: skip
# pixels: on a telephone the columns keep them and the table moves under its first one
LEASE_WIDTHS = [120, 165, 155, 155]
QUEUE_WIDTHS = [90, 90, 85, 90, 170, 140, 110, 120]
ANNOTATOR_WIDTHS = [150, 85, 75, 90, 100, 75, 150, 180, 150, 65, 90, 230, 150]
SAID_WIDTHS = [130, 150, 100, 100, 150, 240, 100, 240, 80, 150]
PROMPTS = ["Id", "Prompt", "Kind", "Rankings", "Disagreement", "Flags", "Comments"]
SAID = [
    "Who", "What", "Ranks", "Scores", "Flags", "Comment", "Sure?", "Ideal answer", "Active s", "When",
]  # fmt: skip
AUDIT = ["When", "Who", "What", "Prompt", "Detail"]
NOTHING = "–"
_LEFT_OUT_WORDS = {
    "superseded": "changed later",
    "all_bad": "all responses bad, no order",
    "gold": "known answer (gold)",
    "repeat": "repeat of an own prompt",
    "late": "late: others had filled the places",
    "out of use": "the prompt is in use no more (samples changed)",
    **{f"skipped: {reason}": f"skipped: {words}" for reason, words in SKIP_REASONS.items()},
}


def hints(found: Sequence[Hint]) -> Rows:
    return [[shortened(_shown(hint.about)), hint.text] for hint in found]


def left_out(found: Overview) -> Rows:
    counts = found.counts
    numbers = {"can be learned from": counts.rankings}
    if counts.written:
        numbers["written answers"] = counts.written
    for reason, number in counts.left_out.items():
        numbers[_LEFT_OUT_WORDS.get(reason, reason)] = number
    numbers["all that is stored"] = sum(numbers.values())
    return [[words, f"{number:,}"] for words, number in numbers.items()]


def leases(found: Iterable[Lease]) -> Rows:
    return [
        [_shown(lease.name), lease.task, when(lease.since), when(lease.expires)] for lease in found
    ]


def queues(found: Iterable[Queue]) -> Rows:
    return [
        [
            queue.step,
            queue.by,
            "frozen" if queue.frozen else "open" if queue.open else "closed",
            str(queue.overlap),
            "overlap × prompts" if queue.minimum is None else str(queue.minimum),
            str(queue.lease_minutes),
            f"{queue.gold_rate:.0%}",
            f"{queue.repeat_rate:.0%}",
        ]
        for queue in found
    ]


def annotators(found: Overview) -> Rows:
    rows = []
    for person in found.counts.people:
        own = found.statistics.people.get(person.id)
        is_only_lead = person.role == "lead" and own is None
        state = ("lead" if person.role == "lead" else "active") if person.active else "paused"
        row = [shortened(_shown(person.name)), person.kind, state]
        skipped = f"{person.skipped} ({person.skip_rate:.0%})" if person.skipped else "0"
        row += [NOTHING if is_only_lead else str(person.rankings), skipped, str(person.all_bad)]
        if own is None:
            row += [NOTHING] * 6
        else:
            row += [_estimate(own.gold_accuracy), _estimate(own.agreement)]
            row += [_estimate(own.self_consistency), _share(own.tie_rate)]
            row.append(NOTHING if own.median_seconds is None else f"{own.median_seconds:.0f}")
            chance = own.first_place_chance
            wins = _estimate(own.first_place_wins)
            row.append(wins if chance is None else f"{wins}; chance {chance:.0%}")
        rows.append([*row, when(person.last_label)])
    return rows


def prompts(lines: Iterable[Line]) -> Rows:
    return [
        [
            line.id,
            _shown(line.title),
            line.kind if line.active else f"{line.kind}, out of use",
            str(line.rankings),
            _share(line.disagreement),
            ", ".join(f"{FLAGS.get(flag, flag)} {count}" for flag, count in line.flags),
            str(line.comments or ""),
        ]
        for line in lines
    ]


def said(prompt: Prompt) -> Rows:
    """One row per person; responses are numbered as the page shows them to the lead."""
    rows = []
    for one in prompt.said:
        flags = [
            f"{i}: {FLAGS.get(flag, flag)}" for i, some in enumerate(one.flags, 1) for flag in some
        ]
        status = one.status + (", late" if one.late else "")
        status += f", changed {one.revision - 1}×" if one.revision > 1 else ""
        scores = " ".join("·" if score is None else str(score) for score in one.scores)
        rows.append(
            [
                shortened(_shown(one.name)),
                status,
                " ".join(map(str, one.ranks)) or NOTHING,
                scores if any(score is not None for score in one.scores) else NOTHING,
                "; ".join(flags),
                _shown(one.comment),
                CONFIDENCES.get(one.confidence or 0, ""),
                _shown(one.ideal),
                NOTHING if one.active_seconds is None else f"{one.active_seconds:.0f}",
                when(one.created),
            ]
        )
    return rows


def audit(events: Iterable[tuple[float, str, str, str, str]]) -> Rows:
    return [
        [when(at, seconds=True), _shown(who), kind, task, "" if detail == "{}" else _shown(detail)]
        for at, who, kind, task, detail in events
    ]


def when(at: float | None, seconds: bool = False) -> str:
    form = "%Y-%m-%d %H:%M:%S" if seconds else "%Y-%m-%d %H:%M"
    return NOTHING if at is None else time.strftime(form, time.gmtime(at))


def _shown(text: str) -> str:
    return visible(text)


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"


def _estimate(found: Estimate | None) -> str:
    if found is None:
        return NOTHING
    n = f"n {found.prompts}"
    if found.low == found.high:
        return f"{found.value:.0%}, {n}"
    return f"{found.value:.0%} ({100 * found.low:.0f}–{found.high:.0%}), {n}"
