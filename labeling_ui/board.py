"""The ranking board: tiers with ties, for mouse, touch and keyboard.

It holds letters and numbers only. Gradio builds its HTML by evaluating a template in the browser,
so model text must never reach it (measured in 6.31: `${...}` in a value runs as code).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from labeling_ui.assignments import Assignment

LETTERS = "ABCDEFGHI"
MAX_RESPONSES = len(LETTERS)

ASSETS = Path(__file__).parent / "assets"


def ranking_board() -> gr.HTML:
    # a function, not a subclass: a subclass makes Gradio write a .pyi file next to this one
    return gr.HTML(
        board_value(None),
        html_template=(ASSETS / "board.html").read_text(encoding="utf-8"),
        js_on_load=(ASSETS / "board.js").read_text(encoding="utf-8"),
        elem_id="board",
    )


def board_value(work: Assignment | None) -> dict[str, Any]:
    """What the browser holds of an assignment: its token, letters and numbers."""
    if work is None:
        return {"token": "", "labels": [], "ranks": [], "revision": 0, "selected": None}
    ranks = list(work.form.ranks)
    unplaced = [i for i, rank in enumerate(ranks) if rank is None]
    return {
        "token": work.token,
        "labels": list(LETTERS[: len(ranks)]),
        "ranks": ranks,
        "revision": work.revision,
        "selected": unplaced[0] if unplaced else None,
    }
