"""The ranking page: draws and delegates. What it decides is decided in assignments.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr

from labeling_ui import board, display
from labeling_ui.changes import RECENT
from labeling_ui.display import Shown
from labeling_ui.forms import MAX_RESPONSES, Refused
from labeling_ui.handlers import Handlers as Handlers
from labeling_ui.handlers import View

_STYLES = "".join(
    (board.ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "board.css")
)
# the script tells the board's code how requests went: without it a lost session looks like a dead
# button. The styles are here and not in `css`, which Gradio takes apart: it loses borders and more
HEAD = (board.ASSETS / "head.html").read_text(encoding="utf-8") + f"<style>{_STYLES}</style>"
_LOG_OUT = '<form method="post" action="/logout"><button type="submit">Log out</button></form>'
_Pair = tuple[gr.Markdown, gr.Markdown]
_NOTHING = Shown("", "")


@dataclass(frozen=True)
class _Parts:
    """The components that change."""

    ranking: gr.HTML
    drafts: gr.HTML
    recent: gr.HTML
    turns: list[_Pair]
    responses: list[_Pair]
    titles: list[gr.Markdown]
    guidelines: gr.Markdown

    @property
    def of_view(self) -> list[Any]:
        pairs = itertools.chain(*self.turns, *self.responses)
        return [self.ranking, *pairs, self.guidelines]


def build(handlers: Handlers) -> gr.Blocks:
    """The page. Theme, css and head are given when it is mounted: here they would be ignored."""
    with gr.Blocks(title="prefline: ranking", analytics_enabled=False) as page:
        parts = _lay_out()
        _connect(page, parts, handlers)
    return page


def _lay_out() -> _Parts:
    """Every part is there from the beginning; the board's code shows those that a task needs."""
    board.place("notices")
    with gr.Row(elem_classes="top"):
        board.place("tools")
        gr.HTML(_LOG_OUT, js_on_load=None, elem_classes="log-out")
    with gr.Column(elem_classes="side guide"):
        board.place("side-head")
        guidelines = _text("guidelines")
    titles = []
    with gr.Column(elem_classes="side last"):
        board.place("side-head")
        for _ in range(RECENT):
            with gr.Row(elem_classes="answer"):
                titles.append(_text("exact"))
                board.place("again")
    with gr.Column(elem_id="prompt"):
        turns = [_slot("turn") for _ in range(display.MAX_TURNS)]
    with gr.Row(elem_id="cards"):
        responses = [_slot("card") for _ in range(MAX_RESPONSES)]
    board.place("notes")
    places = 5 + RECENT + 2 * (display.MAX_TURNS + MAX_RESPONSES)
    ranking = board.ranking_board(places)
    return _Parts(
        ranking,
        board.channel("draft"),
        board.channel("recent"),
        turns,
        responses,
        titles,
        guidelines,
    )


def _slot(kind: str) -> _Pair:
    """A place for a text that others wrote, in both ways; the code shows one of them."""
    with gr.Column(elem_classes=kind):
        board.place("head")
        pair = _text("exact"), _text("rendered")
        board.place("foot")
    return pair


def _text(look: str) -> gr.Markdown:
    # no LaTeX, no HTML: display.py takes out what else may act
    return gr.Markdown(elem_classes=["text", look], latex_delimiters=[])


def _connect(page: gr.Blocks, parts: _Parts, handlers: Handlers) -> None:
    def on_load(request: gr.Request) -> list[Any]:
        with _told():
            return _drawn(handlers.show(_name(request)))

    def on_act(asked: Any, request: gr.Request) -> list[Any]:
        with _told():
            return _drawn(handlers.act(_name(request), asked))

    def on_draft(asked: Any, request: gr.Request) -> dict[str, Any]:
        with _told():
            return handlers.draft(_name(request), asked)

    def on_recent(asked: Any, request: gr.Request) -> list[Any]:
        with _told():
            rows = handlers.recent(_name(request))
        listed = [{k: v for k, v in asdict(row).items() if k != "title"} for row in rows]
        titles = [display.exact(row.title) for row in rows] + [""] * (RECENT - len(rows))
        ask = asked.get("ask") if isinstance(asked, dict) else None
        return [{"answers": str(ask), "rows": listed}, *titles]

    # no queue: one request and its answer. The board's code sends one at a time and asks again
    quiet: dict[str, Any] = {
        "api_visibility": "private",
        "show_progress": "hidden",
        "trigger_mode": "multiple",
        "queue": False,
    }
    ranking = parts.ranking
    page.load(on_load, None, parts.of_view, **quiet)
    ranking.act(on_act, [ranking], parts.of_view, **quiet)
    ranking.draft(on_draft, [ranking], [parts.drafts], **quiet)
    ranking.recent(on_recent, [ranking], [parts.recent, *parts.titles], **quiet)


def _drawn(view: View) -> list[Any]:
    """Values for `of_view`."""
    turns = view.turns + [_NOTHING] * (display.MAX_TURNS - len(view.turns))
    responses = view.responses + [_NOTHING] * (MAX_RESPONSES - len(view.responses))
    texts = [text for pair in turns + responses for text in (pair.exact, pair.rendered)]
    return [view.board, *texts, gr.skip() if view.guidelines is None else view.guidelines]


@contextmanager
def _told() -> Iterator[None]:
    """What is refused is told to the person; it is no fault of the server."""
    try:
        yield
    except Refused as error:
        raise gr.Error(error.message, print_exception=False) from None


def _name(request: gr.Request) -> str:
    if not request.username:
        raise Refused("Log in first.")
    return str(request.username)
