"""Pictures of the lead's page: HTML and SVG with the page's own colours (light and dark), no script.

All that is drawn stands beside it as text, too. Names come from people and imported files, so every
character of a text that is not a letter or a digit is written as a number: neither the browser nor
Gradio's templates (which evaluate `${...}` and `{{...}}`) can take it for anything but text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from labeling_ui.counting import Queue
from labeling_ui.display import visible
from labeling_ui.judgements import Estimate
from labeling_ui.pace import Pace, Times

MOST_ROWS = 30
_LONGEST_NAME = 40
_FEWEST_BARS = 12
_HEIGHT, _TOP, _BOTTOM = 150, 10, 22


class Row(NamedTuple):
    """A line of `intervals`: its name and its value with an interval, None where nothing is known."""

    name: str
    value: Estimate | None
    unit: str
    """What the value counts: pairs, items, ..."""
    reference: float | None = None
    """What this line would be by chance, where that differs from line to line."""


def text(value: object) -> str:
    """`value` as HTML text that nothing can take for a mark."""
    return "".join(c if c.isalnum() or c in " .,-" else f"&#{ord(c)};" for c in visible(str(value)))


def shortened(name: str) -> str:
    """Imported files may name anybody anything."""
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """Big numbers: (what, number, a word more)."""
    cells = "".join(
        f"<div><dt>{text(what)}</dt><dd>{text(number)}<small>{text(more)}</small></dd></div>"
        for what, number, more in values
    )
    return f'<dl class="lead-tiles">{cells}</dl>'


def coverage(queues: Sequence[Queue]) -> str:
    """A bar per queue: rankings in, of those that it takes for the line to go on."""
    rows = []
    for queue in (queue for queue in queues if queue.tasks):
        share = min(1.0, queue.rankings / queue.needed) if queue.needed else 1.0
        state = "frozen" if queue.frozen else "open" if queue.open else "closed"
        bar = (
            '<svg class="lead-bar" aria-hidden="true"><rect class="track" width="100%" height="14" rx="4"/>'
            f'<rect class="blue" width="{100 * share:.2f}%" height="14" rx="4"/></svg>'
        )
        said = (
            f"{queue.rankings} of {queue.needed} rankings; {queue.finished} of {queue.tasks} prompts"
            f" finished, {queue.begun} begun"
            + (f"; {queue.unrankable} times nothing to rank" if queue.unrankable else "")
        )
        rows.append(
            f'<tr><th scope="row">{text(queue.step)}<small>{state}</small></th>'
            f'<td class="plot">{bar}</td><td>{text(said)}</td></tr>'
        )
    if not rows:
        return _empty("No queue has prompts yet.")
    caption = "Coverage: rankings in, of those that the line waits for"
    return _table(caption, rows)


def intervals(
    title: str,
    rows: Sequence[Row],
    scale: tuple[float, float] = (0.0, 1.0),
    reference: float | None = None,
    usual: tuple[float, float] | None = None,
    note: str = "",
) -> str:
    """Dots with their 95 % intervals on one scale; `reference` is a dashed line (chance)."""
    known = [row for row in rows if row.value is not None]
    if not known:
        return _empty(f"{title}: nothing to measure yet.")
    lines = [
        f'<tr><th scope="row">{text(shortened(row.name))}</th><td class="plot">'
        f"{_dot(row, scale, reference, usual)}</td><td>{text(_said(row))}</td></tr>"
        for row in known[:MOST_ROWS]
    ]
    lines.append(
        f'<tr aria-hidden="true"><th></th><td class="plot">{_axis(scale)}</td><td></td></tr>'
    )
    if len(known) > MOST_ROWS:
        note += f" The first {MOST_ROWS} of {len(known)} are drawn; the table has all."
    return _table(title, lines, note)


def pace_chart(pace: Pace) -> str:
    """Labels per hour or day."""
    unit = "hour" if pace.bucket_seconds == 3600 else "day"
    form = "%d %b %H:%M" if unit == "hour" else "%d %b"
    title = f"Labels per {unit}"
    if not any(pace.labels):
        return _empty(f"{title}: none in the last 60 days.")
    # one bar as wide as the page would say nothing of the pace
    before = range(max(0, _FEWEST_BARS - len(pace.starts)), 0, -1)
    starts = [pace.starts[0] - i * pace.bucket_seconds for i in before] + list(pace.starts)
    labels = [0 for _ in before] + list(pace.labels)
    names = [time.strftime(form, time.gmtime(start)) for start in starts]
    said = [f"{name}: {count}" for name, count in zip(names, labels, strict=True)]
    return _bars(title, "answers, skips too", labels, said, (names[0], f"{names[-1]} UTC"))


def times_chart(times: Times) -> str:
    """How long people work on a prompt."""
    title = "Time per prompt"
    if not times.active:
        return _empty(f"{title}: not known yet.")
    size = times.bin_seconds
    said = [f"{i * size:.0f} to {(i + 1) * size:.0f} s: {n}" for i, n in enumerate(times.histogram)]
    said[-1] = f"{(len(said) - 1) * size:.0f} s or more: {times.histogram[-1]}"
    ends = ("0 s", f"{(len(said) - 1) * size:.0f} s and more")
    unit = f"answers by active seconds; median {times.active[2]:.0f} s"
    return _bars(title, unit, times.histogram, said, ends)


# ---- parts ---------------------------------------------------------------------------------


def _empty(said: str) -> str:
    return f'<p class="lead-empty">{text(said)}</p>'


def _table(caption: str, rows: Sequence[str], note: str = "") -> str:
    below = f'<p class="lead-note">{text(note.strip())}</p>' if note.strip() else ""
    return (
        f'<figure class="lead-figure"><table class="lead-dots"><caption>{text(caption)}</caption>'
        f"<tbody>{''.join(rows)}</tbody></table>{below}</figure>"
    )


def _at(value: float, scale: tuple[float, float]) -> float:
    """Percent of the width; 2 % are left free on each side."""
    low, high = scale
    return 2 + 96 * min(1.0, max(0.0, (value - low) / (high - low)))


def _dot(
    row: Row,
    scale: tuple[float, float],
    reference: float | None,
    usual: tuple[float, float] | None,
) -> str:
    assert row.value is not None
    parts = []
    if usual is not None:
        left, right = _at(usual[0], scale), _at(usual[1], scale)
        parts.append(
            f'<rect class="usual" x="{left:.2f}%" width="{right - left:.2f}%" height="26"/>'
        )
    chance = row.reference if row.reference is not None else reference
    if chance is not None:
        x = _at(chance, scale)
        parts.append(f'<line class="chance" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="26"/>')
    value = row.value
    low, high = (_at(end, scale) for end in (value.low, value.high))
    parts.append(f'<line class="whisker" x1="{low:.2f}%" x2="{high:.2f}%" y1="13" y2="13"/>')
    parts += [
        f'<line class="whisker" x1="{end:.2f}%" x2="{end:.2f}%" y1="8" y2="18"/>'
        for end in (low, high)
    ]
    parts.append(f'<circle class="blue" cx="{_at(value.value, scale):.2f}%" cy="13" r="5"/>')
    return f'<svg class="lead-dot" aria-hidden="true">{"".join(parts)}</svg>'


def _axis(scale: tuple[float, float]) -> str:
    low, high = scale
    ticks = [low + i / 4 for i in range(round((high - low) * 4) + 1)]
    marks = "".join(
        f'<text x="{_at(tick, scale):.2f}%" y="12" text-anchor="middle">{tick:g}</text>'
        for tick in ticks
    )
    return f'<svg class="lead-axis">{marks}</svg>'


def _said(row: Row) -> str:
    assert row.value is not None
    value = row.value
    interval = f"{value.low:.2f} to {value.high:.2f}"
    if value.low == value.high:
        interval = "too few for an interval"
    said = f"{value.value:.2f} ({interval}), {value.count:,} {row.unit}"
    return said if row.reference is None else f"{said}; chance {row.reference:.2f}"


def _bars(
    title: str, unit: str, counts: Sequence[int], said: Sequence[str], ends: tuple[str, str]
) -> str:
    """Bars on a common floor; hovering one tells its number."""
    most, width = max(counts), 100 / len(counts)
    floor = _HEIGHT - _BOTTOM
    bars = "".join(
        f'<rect class="blue" x="{i * width + 0.1 * width:.3f}%" width="{0.8 * width:.3f}%"'
        f' y="{floor - (floor - _TOP) * count / most:.1f}"'
        f' height="{(floor - _TOP) * count / most:.1f}"><title>{text(tell)}</title></rect>'
        for i, (count, tell) in enumerate(zip(counts, said, strict=True))
    )
    labels = (
        f'<text x="0" y="{_HEIGHT - 5}">{text(ends[0])}</text>'
        f'<text x="100%" y="{_HEIGHT - 5}" text-anchor="end">{text(ends[1])}</text>'
    )
    return (
        f'<figure class="lead-figure"><figcaption><b>{text(title)}</b>'
        f" {text(unit)}; highest bar {most}</figcaption>"
        f'<svg class="lead-bars" role="img" height="{_HEIGHT}"'
        f' aria-label="{text(title)}, {text(unit)}: {text("; ".join(said))}">'
        f'<line class="floor" x1="0" x2="100%" y1="{floor}" y2="{floor}"/>{bars}{labels}</svg></figure>'
    )
