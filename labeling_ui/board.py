"""The part of the page that is ours: the ranking board, and what surrounds prompt and responses.

Its code is in `assets/*.js` and its state in the value of one Gradio component. Gradio builds the
HTML of such a component by evaluating a template in the browser (measured in 6.31: `${...}` in a
value runs as code), so the template here is constant: the code makes elements and sets their text.
Even so no model text reaches it; it holds the person's own words, states and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from labeling_ui.assignments import SKIP_REASONS, Assignment
from labeling_ui.forms import (
    CONFIDENCES,
    FLAGS,
    MAX_COMMENT,
    MAX_IDEAL,
    SCORES,
    Form,
)

ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("core.js", "saving.js", "ranks.js", "cards.js", "panels.js", "keys.js", "start.js")
_WORDS = {
    "flags": FLAGS,
    "scores": list(SCORES),
    "confidences": {str(key): text for key, text in CONFIDENCES.items()},
    "reasons": SKIP_REASONS,
    "longest": {"comment": MAX_COMMENT, "ideal": MAX_IDEAL},
}

# what is the server's to say comes back through here: the board itself is the browser's to write
_CHANNEL = (
    "watch('value', () => document.dispatchEvent(new CustomEvent(NAME, {detail: props.value})));"
)

_WHEN_READY = """
const begin = () => {
if (document.querySelectorAll('.room').length < props.places) {
  requestAnimationFrame(begin);
  return;
}
CODE
};
begin();
"""


def ranking_board(places: int) -> gr.HTML:
    """The board; its events are `act` (do something and show what follows), `draft`, `recent`.

    Args:
        places: how many `place`s are on the page; the code begins when all are there.
    """
    code = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    code = _WHEN_READY.replace("CODE", code)
    # a function, not a subclass: a subclass makes Gradio write a .pyi file next to this one
    return gr.HTML(
        board_value(None, []),
        html_template="",
        js_on_load=code,
        apply_default_css=False,
        elem_id="board",
        words=_WORDS,
        places=places,
    )


def channel(name: str) -> gr.HTML:
    """A way for a handler to tell the board's code something; nothing of it is seen."""
    return gr.HTML(
        html_template="",
        js_on_load=_CHANNEL.replace("NAME", repr(f"prefline-{name}")),
        elem_classes="channel",
    )


def place(kind: str) -> gr.HTML:
    """An empty place on the page that the board's code fills."""
    return gr.HTML(
        html_template='<div class="room"></div>',
        js_on_load=None,
        apply_default_css=False,
        elem_classes=kind,
    )


def board_value(work: Assignment | None, roles: Sequence[str]) -> dict[str, Any]:
    """What the browser's code holds of an assignment."""
    form = work.form if work else Form.empty(0)
    kind = "none" if work is None else "rank" if work.responses else "write"
    return {
        "token": work.token if work else "",
        "kind": kind,
        "editing": work.is_edit if work else False,
        "revision": work.revision if work else 0,
        "turns": list(roles),
        "form": form.to_json(),
    }
