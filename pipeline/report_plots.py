"""Hand-made SVG for the report: small, drawn with the page's own colours (light and dark), no script.

Colours are CSS classes (`blue`, `orange`, `green`, `grey`: Okabe-Ito, set per theme by the page), and
no series differs by colour alone: the second of a plot is dashed or has dots. Pictures whose x axis is a
fraction are laid out in percent, so that their letters keep their size on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from markupsafe import Markup, escape

Point = tuple[float, float]
Look = Literal["line", "thin", "dotted", "dots"]
Row = dict[str, Any]
WIDTH, HEIGHT = 420.0, 232.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 14.0, 12.0, 36.0
MOST_POINTS = 300  # a longer curve is averaged in bins: more points than pixels only cost bytes
MOST_TOOLTIPS = 80


class Series(NamedTuple):
    """One curve. look: line, thin, dotted (line with dots), or dots (no line). bars: the interval of
    each point, drawn where there are as many."""

    name: str
    points: list[Point]
    colour: str
    look: Look = "line"
    bars: tuple[Point, ...] = ()


class Mark(NamedTuple):
    """A ring around one point, with a word beside it."""

    x: float
    y: float
    text: str


def finite(value: Any) -> float | None:
    """`value` as a float where it is a finite number, else None (files may hold anything)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, digits: int = 3) -> str | None:
    """A number for people: significant digits, thousands apart, true minus."""
    value = finite(value)
    if value is None:
        return None
    if 0 < abs(value) < 1e-6:
        return "\u2248\u202f0"
    if value and (abs(value) >= 1e7 or abs(value) < 1e-4):
        return f"{value:.{digits - 1}e}".replace("-", "\u2212")
    places = 0 if value == int(value) else max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}".replace("-", "\u2212").replace(",", "\u202f")


def percent(value: Any, digits: int = 1) -> str | None:
    value = finite(value)
    return None if value is None else f"{100 * value:.{digits}f}\u202f%".replace("-", "\u2212")


def points(rows: Sequence[Row], y: str, x: str = "step") -> list[Point]:
    """The (x, y) of every row that has both as finite numbers."""
    found = [(finite(row.get(x)), finite(row.get(y))) for row in rows]
    return [(a, b) for a, b in found if a is not None and b is not None]


def smooth(curve: list[Point]) -> list[Point]:
    """Centred moving average over 1/25 of the curve: one batch's loss is mostly noise."""
    half = len(curve) // 50
    windows = (curve[max(0, i - half) : i + half + 1] for i in range(len(curve)))
    return [
        (x, sum(y for _, y in window) / len(window))
        for (x, _), window in zip(curve, windows, strict=True)
    ]


def _thin(curve: list[Point]) -> list[Point]:
    size = math.ceil(len(curve) / MOST_POINTS)
    if size <= 1:
        return curve
    bins = (curve[i : i + size] for i in range(0, len(curve), size))
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover low..high."""
    # averaging leaves a constant with a span of rounding errors
    constant = high - low <= 1e-9 * max(abs(low), abs(high))
    span = abs(high) or 1.0 if constant else high - low
    raw = span / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _tick_text(value: float, step: float) -> str:
    places = next((p for p in range(9) if math.isclose(step, round(step, p))), 9)
    return f"{value:,.{places}f}".replace("-", "\u2212").replace(",", "\u202f")


class _Frame(NamedTuple):
    """The plotting area: data coordinates to pixels."""

    xs: tuple[float, float]
    y_ticks: list[float]

    def at(self, x: float, y: float) -> Point:
        (x0, x1), (y0, y1) = self.xs, (self.y_ticks[0], self.y_ticks[-1])
        across = (x - x0) / ((x1 - x0) or 1)
        up = (y - y0) / ((y1 - y0) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )


def chart(
    title: str, unit: str, x_label: str, series: Sequence[Series], mark: Mark | None = None
) -> Markup | None:
    """A figure with one or more curves over a common x; None where there is nothing to draw."""
    drawn = [s._replace(points=_thin(s.points)) for s in series if s.points]
    if not drawn:
        return None
    xs = [x for s in drawn for x, _ in s.points] + ([mark.x] if mark else [])
    ys = [y for s in drawn for _, y in s.points] + ([mark.y] if mark else [])
    ys += [end for s in drawn for bar in _bars(s) for end in bar]
    frame = _Frame((min(xs), max(xs)), ticks(min(ys), max(ys)))
    parts = _axes(frame, x_label)
    for one in drawn:
        parts += _curve(frame, one, x_label)
    if mark:
        parts += _ring(frame, mark)
    named = [s for s in drawn if s.name]
    legend = "".join(
        f'<span class="key"><svg width="22" height="10" aria-hidden="true">{_swatch(s)}</svg>{escape(s.name)}</span>'
        for s in named
    )
    return Markup(
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <span class="unit">{escape(unit)}</span>'
        f'<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img"'
        f' aria-label="{escape(title)}, {escape(unit)}, over {escape(x_label)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _axes(frame: _Frame, x_label: str) -> list[str]:
    parts = []
    y_step = frame.y_ticks[1] - frame.y_ticks[0]
    for tick in frame.y_ticks:
        _, y = frame.at(frame.xs[0], tick)
        parts.append(
            f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 7:g}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(tick, y_step)}</text>'
        )
    low, high = frame.xs
    x_ticks = [t for t in ticks(low, high) if low - 1e-9 <= t <= high + 1e-9] or [low]
    step = x_ticks[1] - x_ticks[0] if len(x_ticks) > 1 else x_ticks[0]
    for tick in x_ticks:
        x, _ = frame.at(tick, frame.y_ticks[0])
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16:g}" text-anchor="middle">{_tick_text(tick, step)}</text>'
        )
    parts.append(
        f'<text class="label" x="{WIDTH - RIGHT:g}" y="{HEIGHT - 4:g}" text-anchor="end">{escape(x_label)}</text>'
    )
    return parts


def _bars(series: Series) -> tuple[Point, ...]:
    return series.bars if len(series.bars) == len(series.points) else ()


def _curve(frame: _Frame, series: Series, x_label: str) -> list[str]:
    spots = [frame.at(x, y) for x, y in series.points]
    parts = []
    for (at, _), bar in zip(series.points, _bars(series), strict=False):
        (x, low), (_, high) = frame.at(at, bar[0]), frame.at(at, bar[1])
        parts.append(
            f'<path class="{series.colour} bar" d="M{x:.1f} {low:.1f}L{x:.1f} {high:.1f}"/>'
        )
    if series.look != "dots" and len(spots) > 1:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        parts.append(f'<path class="{series.colour} {series.look}" d="{path}"/>')
    if series.look in ("dotted", "dots") or len(spots) == 1:
        parts += [
            f'<circle class="{series.colour} dot" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
            for x, y in spots
        ]
    if len(spots) <= MOST_TOOLTIPS and series.name:
        for (x, y), (a, b) in zip(spots, series.points, strict=True):
            told = f"{series.name}: {number(b)} at {x_label} {number(a)}"
            parts.append(
                f'<circle class="{series.colour} hit" cx="{x:.1f}" cy="{y:.1f}" r="6">'
                f"<title>{escape(told)}</title></circle>"
            )
    return parts


def _ring(frame: _Frame, mark: Mark) -> list[str]:
    x, y = frame.at(mark.x, mark.y)
    # the word must stay inside the picture, and off the axis
    anchor, shift = ("end", -9) if x > WIDTH * 0.62 else ("start", 9)
    rise = -10 if y > TOP + 22 else 20
    return [
        f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>',
        f'<text class="mark" x="{x + shift:.1f}" y="{y + rise:.1f}" text-anchor="{anchor}">{escape(mark.text)}</text>',
    ]


def _swatch(series: Series) -> str:
    if series.look == "dots":
        return f'<circle class="{series.colour} dot" cx="11" cy="5" r="2.6"/>'
    dot = (
        f'<circle class="{series.colour} dot" cx="11" cy="5" r="2.6"/>'
        if series.look == "dotted"
        else ""
    )
    return f'<path class="{series.colour} {series.look}" d="M1 5H21"/>{dot}'


def histogram(
    title: str, unit: str, values: dict[str, tuple[str, list[float]]], bins: int = 24
) -> Markup | None:
    """Outlines of the distributions of several groups: {name: (colour, values)}, in percent of the group."""
    present = {name: (colour, v) for name, (colour, v) in values.items() if len(v) > 1}
    if not present:
        return None
    everything = sorted(v for _, group in present.values() for v in group)
    # the outer 1 % goes into the end bins: one outlier would squeeze everything else into a corner
    low, high = everything[len(everything) // 100], everything[-1 - len(everything) // 100]
    if low == high:
        return None
    width = (high - low) / bins
    series = []
    for i, (name, (colour, group)) in enumerate(present.items()):
        counts = [0] * bins
        for value in group:
            counts[max(0, min(bins - 1, int((value - low) / width)))] += 1
        heights = [100 * count / len(group) for count in counts]
        outline = [(low, 0.0)]
        for k, height in enumerate(heights):
            outline += [(low + k * width, height), (low + (k + 1) * width, height)]
        outline.append((low + bins * width, 0.0))
        # only an odd one out is a solid line: three solid outlines could be told by colour alone
        series.append(Series(name, outline, colour, "line" if i == len(present) - 1 else "thin"))
    return chart(title, "%", unit, series)


def win_bar(rate: float, low: float | None, high: float | None) -> Markup:
    """Policy's share of the wins as a bar, its 95 % interval as a whisker, and the 50 % line."""
    parts = [
        '<rect class="track" width="100%" y="14" height="30" rx="4"/>',
        f'<rect class="won" width="{100 * rate:.2f}%" y="14" height="30" rx="4"/>',
    ]
    if low is not None and high is not None:
        parts.append(
            f'<line class="whisker" x1="{100 * low:.2f}%" x2="{100 * high:.2f}%" y1="29" y2="29"/>'
        )
        parts += [
            f'<line class="whisker" x1="{100 * end:.2f}%" x2="{100 * end:.2f}%" y1="22" y2="36"/>'
            for end in (low, high)
        ]
    parts.append('<line class="half" x1="50%" x2="50%" y1="6" y2="52"/>')
    for at, anchor, text in (
        (0, "start", "0"),
        (50, "middle", "50\u202f% no better"),
        (100, "end", "100\u202f%"),
    ):
        parts.append(f'<text x="{at}%" y="66" text-anchor="{anchor}">{text}</text>')
    told = f"win rate {percent(rate)}" + (
        f", 95 % interval {percent(low)} to {percent(high)}" if low is not None else ""
    )
    return Markup(f'<svg class="win" role="img" aria-label="{told}">{"".join(parts)}</svg>')


def interval_bar(rate: float, low: float | None, high: float | None, colour: str) -> Markup:
    """A dot on a scale from 0 to 1 with its interval and the 50 % line, for a table cell."""
    ends = [2 + 96 * min(1.0, max(0.0, v)) for v in (rate, low, high) if v is not None]
    whisker = (
        f'<line class="whisker" x1="{ends[1]:.2f}%" x2="{ends[2]:.2f}%" y1="11" y2="11"/>'
        if len(ends) == 3
        else ""
    )
    return Markup(
        '<svg class="interval" aria-hidden="true"><line class="grid" x1="2%" x2="98%" y1="11" y2="11"/>'
        f'<line class="half" x1="50%" x2="50%" y1="2" y2="20"/>{whisker}'
        f'<circle class="{colour} dot" cx="{ends[0]:.2f}%" cy="11" r="4"/></svg>'
    )


def share_bar(fraction: float) -> Markup:
    """A thin bar for a table cell."""
    width = 100 * min(1.0, max(0.0, fraction))
    return Markup(
        f'<svg class="share" aria-hidden="true"><rect class="track" width="100%" height="8" y="7" rx="3"/>'
        f'<rect class="part" width="{max(width, 0.6):.2f}%" height="8" y="7" rx="3"/></svg>'
    )


def dumbbell(values: Sequence[tuple[str, str, float | None]]) -> Markup:
    """Dots on a scale from 0 to 1, joined in order: [(name, colour, value)]."""
    spots = [(n, c, 2 + 96 * min(1.0, max(0.0, v))) for n, c, v in values if v is not None]
    lines = "".join(
        f'<line class="join" x1="{a:.2f}%" x2="{b:.2f}%" y1="9" y2="9"/>'
        for (_, _, a), (_, _, b) in pairwise(spots)
    )
    dots = "".join(
        f'<circle class="{colour} dot" cx="{at:.2f}%" cy="9" r="{6 if i == len(spots) - 1 else 4}">'
        f"<title>{escape(name)}</title></circle>"
        for i, (name, colour, at) in enumerate(spots)
    )
    return Markup(
        f'<svg class="bell" aria-hidden="true"><line class="grid" x1="2%" x2="98%" y1="9" y2="9"/>{lines}{dots}</svg>'
    )
