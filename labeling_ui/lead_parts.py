"""What the tabs of the lead's page are made of: tables, lists, and who asks.

A tab is a function that draws itself and returns how to load it: a function that takes an event,
such as `page.load`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr

from labeling_ui.forms import Refused

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
Drawn = dict[Any, Any]
"""Component -> its new value."""
Load = Callable[[Callable[..., Any]], Any]


@contextmanager
def asking(request: gr.Request) -> Iterator[str]:
    """Who asks; what is refused is told to them, it is no fault of the server."""
    try:
        if not request.username:
            raise Refused("Log in first.")
        yield str(request.username)
    except Refused as error:
        raise gr.Error(error.message, print_exception=False) from None


def table(
    headers: list[str],
    label: str,
    *,
    widths: Sequence[str | int] = (),
    pinned: int | None = None,
    wrap: bool = True,
    max_chars: int | None = None,
) -> gr.Dataframe:
    """A table that can be read only; its cells are plain text, never HTML or Markdown."""
    return gr.Dataframe(
        headers=headers,
        datatype="str",
        type="array",
        label=label,
        show_label=False,
        interactive=False,
        wrap=wrap,
        pinned_columns=pinned,
        column_widths=list(widths) or None,
        max_chars=max_chars,
        buttons=[],
        elem_classes="lead-table",
    )


def choice(label: str, choices: Sequence[Any] = (), value: Any = None) -> gr.Dropdown:
    """A list that is filled when the page is loaded.

    Gradio knows the filled list only until it is restarted, and would then refuse what an open page
    sends: so it lets everything pass, and the handlers check it.
    """
    return gr.Dropdown(list(choices), label=label, value=value, allow_custom_value=True)
