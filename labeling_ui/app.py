"""The ranking page: draws and delegates. What it decides is decided in assignments.py.

Nothing that the browser sends is believed: each handler looks up the user and the assignment again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gradio as gr

from labeling_ui import assignments, board, display, progress
from labeling_ui.assignments import SKIP_REASONS
from labeling_ui.forms import Refused
from labeling_ui.store import Store

_GUIDE = """
Read the prompt, then all responses. Put the best response on rank 1. **Responses that are equally
good share a rank.** Judge what is written, not how long it is.

**Keys:** `1`-`9` rank the selected response (the next one is then selected) · `A`-`I` select ·
`0` takes back · `Ctrl+Z` undoes · `Enter` submits. Mouse or finger: drag a letter to a rank, or
select it and press the rank. What you do is saved as you go.
"""
_LOG_OUT = """<div class="title">
<form method="post" action="/logout"><button type="submit">Log out</button></form></div>"""

# tells when the session is lost: without it the page looks like a button that does nothing
HEAD = (board.ASSETS / "head.html").read_text(encoding="utf-8")
CSS = (board.ASSETS / "page.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Handlers:
    """The page's answers, without drawing: tests call them as the browser would.

    `on_saved` is called after each saved ranking or skip.
    """

    store: Store
    user_id: Callable[[str], int]
    on_saved: Callable[[], None]

    def show(self, name: str, render: bool, said: str = "") -> list[Any]:
        """The person's current prompt: status, board, prompt, then a text for each response."""
        user_id = self.user_id(name)
        work = assignments.claim(self.store, user_id)
        status = said + (" " if said else "") + self.status(user_id, work is not None)
        texts: list[str] = []
        prompt = ""
        if work is not None:
            show = display.rendered if render else display.exact
            prompt = display.conversation(work.messages, render)
            texts = [show(text) for text in work.responses]
        texts += [""] * (board.MAX_RESPONSES - len(texts))
        return [status, board.board_value(work), prompt, *texts]

    def status(self, user_id: int, working: bool) -> str:
        done, left, busy = progress.my_progress(self.store, user_id)
        if working:
            return f"**{done}** done, **{left}** left"
        if busy:
            return (
                f"**{done}** done. Others are working on the last prompts; look again in a while."
            )
        return f"**All done.** You ranked {done}. Thank you!"

    def draft(self, name: str, value: Any) -> None:
        token, ranks, revision = _order(value)
        # a tab that was overtaken keeps quiet: what counts is checked again on submission
        assignments.save_draft(self.store, self.user_id(name), token, ranks, revision)

    def submit(self, name: str, value: Any, render: bool) -> list[Any]:
        token, ranks, _ = _order(value)
        return self._save(
            name, render, lambda user: assignments.submit(self.store, user, token, ranks)
        )

    def skip(self, name: str, value: Any, reason: Any, render: bool) -> list[Any]:
        token, _, _ = _order(value)
        return self._save(
            name, render, lambda user: assignments.skip(self.store, user, token, str(reason))
        )

    def _save(self, name: str, render: bool, act: Callable[[int], assignments.Saved]) -> list[Any]:
        try:
            said = act(self.user_id(name)).message
        except Refused as error:
            said = error.message
        else:
            self.on_saved()
        return self.show(name, render, said)


def _order(value: Any) -> tuple[str, list[object], int]:
    """The parts of a board value; the browser may have sent anything."""
    if not isinstance(value, dict):
        raise Refused("The board is broken. Reload the page.")
    ranks = value.get("ranks")
    revision = value.get("revision")
    return (
        str(value.get("token", "")),
        ranks if isinstance(ranks, list) else [],
        revision if type(revision) is int and 0 <= revision < 2**31 else 0,
    )


@dataclass(frozen=True)
class _Parts:
    """The components that change."""

    status: gr.Markdown
    render: gr.Checkbox
    prompt: gr.Markdown
    texts: list[gr.Markdown]
    cards: list[gr.Column]
    ranking: gr.HTML
    reason: gr.Radio
    skip: gr.Button
    work_area: gr.Column


def build(handlers: Handlers) -> gr.Blocks:
    """The page. Theme, css and head are given when it is mounted: here they would be ignored."""
    with gr.Blocks(title="prefline: ranking", analytics_enabled=False) as page:
        parts = _lay_out()
        _connect(page, parts, handlers)
    page.queue(default_concurrency_limit=20)
    return page


def _lay_out() -> _Parts:
    with gr.Row(elem_classes="tools"):
        gr.HTML('<div class="name">prefline</div>')
        status = gr.Markdown(elem_id="status")
        render = gr.Checkbox(label="Markdown", value=False, container=False)
        gr.HTML(_LOG_OUT)
    with gr.Accordion("How to rank", open=False):
        gr.Markdown(_GUIDE)
    with gr.Column(visible=False) as work_area:
        # no LaTeX, no HTML: display.py takes out what else may act
        prompt = gr.Markdown(elem_id="prompt", latex_delimiters=[])
        cards, texts = [], []
        with gr.Row(elem_id="cards"):
            for letter in board.LETTERS:
                with gr.Column(visible=False, elem_classes="card") as card:
                    gr.HTML(f'<div class="letter">{letter}</div>')
                    texts.append(gr.Markdown(elem_classes="model-text", latex_delimiters=[]))
                cards.append(card)
        with gr.Accordion("Skip this prompt", open=False):
            choices = [(text, key) for key, text in SKIP_REASONS.items()]
            reason = gr.Radio(choices, label="Why?", value=None)
            skip = gr.Button("Skip", size="sm")
        ranking = board.ranking_board()
    return _Parts(status, render, prompt, texts, cards, ranking, reason, skip, work_area)


def _connect(page: gr.Blocks, parts: _Parts, handlers: Handlers) -> None:
    outputs = [parts.status, parts.ranking, parts.prompt, *parts.texts, *parts.cards]
    outputs += [parts.work_area, parts.reason]

    def view(shown: list[Any], render: bool) -> list[Any]:
        status, value, prompt, *texts = shown
        look = ["model-text", "rendered"] if render else ["model-text"]
        count = len(value["labels"])
        return [
            status,
            value,
            prompt,
            *(gr.Markdown(text, elem_classes=look) for text in texts),
            *(gr.Column(visible=i < count) for i in range(len(parts.cards))),
            gr.Column(visible=count > 0),
            None,
        ]

    def on_load(render: bool, request: gr.Request) -> list[Any]:
        with _told():
            return view(handlers.show(_name(request), render), render)

    def on_submit(value: Any, render: bool, request: gr.Request) -> list[Any]:
        with _told():
            return view(handlers.submit(_name(request), value, render), render)

    def on_skip(value: Any, reason: Any, render: bool, request: gr.Request) -> list[Any]:
        with _told():
            return view(handlers.skip(_name(request), value, reason, render), render)

    def on_ranked(value: Any, request: gr.Request) -> None:
        with _told():
            handlers.draft(_name(request), value)

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    ranking, render = parts.ranking, parts.render
    page.load(on_load, [render], outputs, **quiet)
    render.input(on_load, [render], outputs, **quiet)
    ranking.ranked(on_ranked, [ranking], None, trigger_mode="always_last", **quiet)
    ranking.submit(on_submit, [ranking, render], outputs, **quiet)
    parts.skip.click(on_skip, [ranking, parts.reason, render], outputs, **quiet)


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
