"""What the pictures of the playground are made of: text that cannot act, bars, shades, notes.

Models and people write what is shown here, so nothing reaches the page but through `shown` and
`token`: every sign that is neither letter nor digit is written as a number (lead_charts.text), and
signs that cannot be seen, or that reorder others, by their code point. Styles take numbers only.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from labeling_ui import lead_charts

Answer = dict[str, Any]
# format, control, surrogate, private: nothing of them is seen, and some act on what is around them
_UNSEEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")
_SPACES = {" ": "·", "\n": "↵", "\t": "⇥"}


def escaped(value: object) -> str:
    """A text of our own as HTML."""
    return lead_charts.text(value)


def shown(value: object) -> str:
    """A text as HTML; line ends stay line ends."""
    text = str(value).replace("\r\n", "\n")
    return escaped("".join(c if c in "\n\t" or not _is_unseen(c) else _number(c) for c in text))


def token(row: Answer) -> str:
    """A token as HTML, its spaces visible; a part of a character by its bytes."""
    text = row["text"]
    if "\ufffd" in text:
        return escaped("⟨" + row["bytes"] + "⟩")
    return escaped("".join(_SPACES.get(c) or (_number(c) if _is_unseen(c) else c) for c in text))


def chips(
    tokens: Sequence[Answer], chosen: int | None, shades: Sequence[float] | None = None,
    hues: Sequence[str] | None = None, below: Sequence[str] | None = None, label: str = "Tokens",
) -> str:  # fmt: skip
    """The text as a row of tokens that can be chosen; shades (0 to 1) colour them."""
    parts = []
    for at, row in enumerate(tokens):
        shade = min(1.0, max(0.0, shades[at])) if shades else 0.0
        kind = f"pg-tok {hues[at] if hues else 'warm'}{' special' if row['special'] else ''}"
        small = f"<small>{below[at]}</small>" if below else ""
        pressed = "true" if at == chosen else "false"
        name = escaped(f"token {at}: ") + token(row)
        parts.append(
            f'<button type="button" class="{kind}" style="--shade:{shade:.3f}" data-pick="at,{at}"'
            f' aria-pressed="{pressed}" aria-label="{name}"><span>{token(row)}</span>{small}</button>'
        )
    # a real line end in the text is a line end on the page, too
    return (
        f'<div class="pg-chips" role="group" aria-label="{escaped(label)}">{"".join(parts)}</div>'
    )


def bar(share: float, kind: str = "blue") -> str:
    """A bar over the width of its cell, 0 to 1."""
    width = 100 * min(1.0, max(0.0, share))
    return (
        f'<svg class="pg-bar" aria-hidden="true"><rect class="track" width="100%" height="10" rx="3"/>'
        f'<rect class="{kind}" width="{width:.2f}%" height="10" rx="3"/></svg>'
    )


def both_ways(value: float, most: float) -> str:
    """A bar to the right for a positive, to the left for a negative value, on a scale of +-most."""
    half = 50 * min(1.0, abs(value) / most) if most > 0 else 0.0
    left = 50.0 if value >= 0 else 50 - half
    kind = "blue" if value >= 0 else "orange"
    return (
        '<svg class="pg-bar" aria-hidden="true"><rect class="track" width="100%" height="10" rx="3"/>'
        f'<rect class="{kind}" x="{left:.2f}%" width="{half:.2f}%" height="10"/>'
        '<line class="zero" x1="50%" x2="50%" y1="-1" y2="11"/></svg>'
    )


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """Big numbers: (what, number, a word more)."""
    cells = "".join(
        f"<div><dt>{escaped(what)}</dt><dd>{escaped(number)}<small>{escaped(more)}</small></dd></div>"
        for what, number, more in values
    )
    return f'<dl class="pg-tiles">{cells}</dl>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, kind: str = "") -> str:
    """Cells are HTML already; heads and caption are not."""
    heads = "".join(f'<th scope="col">{escaped(word)}</th>' for word in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="pg-scroll" tabindex="0" role="region" aria-label="{escaped(caption)}">'
        f'<table class="pg-table {kind}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def note(text: str) -> str:
    """An explanation beside a picture, of our own words."""
    return f'<p class="pg-note">{escaped(text)}</p>'


def title(text: str) -> str:
    return f'<h3 class="pg-title">{escaped(text)}</h3>'


def refused(said: str) -> str:
    """Why there is no picture."""
    return f'<p class="pg-refused" role="alert">{shown(said)}</p>'


def percent(share: float) -> str:
    """As people read it: more digits where there is little."""
    value = 100 * share
    if value and value < 0.01:
        return "<0.01 %"
    return f"{value:.{2 if value < 1 else 1 if value < 99.95 else 0}f} %"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\u2212")


def _is_unseen(sign: str) -> bool:
    return unicodedata.category(sign) in _UNSEEN


def _number(sign: str) -> str:
    return f"⟨U+{ord(sign):04X}⟩"
