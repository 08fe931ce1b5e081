"""The ranking page: draws and delegates. What it decides is decided in assignments.py.

Nothing that the browser sends is believed: each handler looks up the user and the assignment again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from labeling_ui import assignments, board, display
from labeling_ui.assignments import SKIP_REASONS, Refused
from labeling_ui.store import Store

_GUIDE = """
Read the prompt, then all responses. Put the best response on rank 1. **Responses that are equally
good share a rank.** Judge what is written, not how long it is.

**Keys:** `1`-`9` rank the selected response (the next one is then selected) · `A`-`I` select ·
`0` takes back · `Ctrl+Z` undoes · `Enter` submits. Mouse or finger: drag a letter to a rank, or
select it and press the rank. What you do is saved as you go.
"""
_TITLE = """<div class="title"><b>prefline</b>
<form method="post" action="/logout"><button type="submit">Log out</button></form></div>"""

# a lost session must not look like a button that does nothing
HEAD = """
<script>
(() => {
  const plain = window.fetch;
  const tell = (text) => {
    let bar = document.getElementById('lost');
    if (!text) { if (bar) bar.remove(); return; }
    if (!bar) {
      bar = document.createElement('div');
      bar.id = 'lost';
      bar.setAttribute('role', 'alert');
      document.body.prepend(bar);
    }
    bar.textContent = text + ' ';
    const link = document.createElement('a');
    link.href = '/login';
    link.textContent = 'Log in again';
    bar.append(link);
  };
  window.fetch = async (...args) => {
    const join = String(args[0] && args[0].url || args[0]).includes('/queue/join');
    try {
      const answer = await plain(...args);
      if (join) tell([401, 403].includes(answer.status) ? 'You are logged out; your last placement may not be saved.' : '');
      return answer;
    } catch (error) {
      if (join) tell('The server cannot be reached. Your last placement may not be saved.');
      throw error;
    }
  };
})();
</script>
"""

CSS = (
    board.CSS
    + """
.gradio-container {max-width: 1400px !important; margin: 0 auto;}
.title {display: flex; justify-content: space-between; align-items: center;}
.title button {color: var(--body-text-color-subdued); text-decoration: underline; background: none; border: 0; cursor: pointer; padding: 8px;}
#cards {display: grid !important; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 12px;}
.card, #prompt {border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px 14px;
  min-width: 0 !important; background: var(--background-fill-primary);}
.card {gap: 4px !important;}
.letter {font-weight: 700; color: var(--body-text-color-subdued);}
#prompt {border-left: 4px solid var(--color-accent); max-height: 40vh; overflow: auto;}
.model-text {max-height: 52vh; overflow: auto !important; overflow-wrap: anywhere;}
/* exact text: the font and the colours of the page, every space and line break kept */
#prompt pre, .model-text pre {white-space: pre-wrap !important; overflow-wrap: anywhere; margin: 0 !important;
  padding: 0 !important; background: none !important; border: 0 !important; overflow: visible !important;}
#prompt pre code, .model-text pre code {white-space: pre-wrap !important; font-family: var(--font) !important;
  font-size: 15px !important; line-height: 1.5 !important; background: none !important; border: 0 !important;
  padding: 0 !important; color: var(--body-text-color) !important;}
.rendered pre code {font-family: var(--font-mono) !important; font-size: 13px !important;}
#prompt .code_wrap, .model-text .code_wrap {margin: 0 !important; background: none !important; border: 0 !important;}
#prompt .code_wrap button, .model-text .code_wrap button {display: none !important;}
#board {position: sticky; bottom: 0; z-index: 20; background: var(--body-background-fill);}
#lost {position: sticky; top: 0; z-index: 100; padding: 10px 16px; background: #b3261e; color: #fff;}
#lost a {color: #fff; text-decoration: underline;}
.tools {align-items: center;}
"""
)


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
        done, left, busy = assignments.my_progress(self.store, user_id)
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


def build(handlers: Handlers) -> gr.Blocks:
    """The page. Theme, css and head are given when it is mounted: here they would be ignored."""
    with gr.Blocks(title="prefline: ranking", analytics_enabled=False) as page:
        gr.HTML(_TITLE)
        with gr.Row(elem_classes="tools"):
            status = gr.Markdown(elem_id="status")
            render = gr.Checkbox(
                label="Show as Markdown", value=False, container=False, min_width=150
            )
        with gr.Accordion("How to rank", open=False):
            gr.Markdown(_GUIDE)
        with gr.Column() as work_area:
            # no LaTeX and no HTML: see display.py for what else is taken out of model text
            prompt = gr.Markdown(elem_id="prompt", latex_delimiters=[])
            with gr.Row(elem_id="cards"):
                cards, texts = [], []
                for letter in board.LETTERS:
                    with gr.Column(visible=False, elem_classes="card") as card:
                        gr.HTML(f'<div class="letter">{letter}</div>')
                        texts.append(gr.Markdown(elem_classes="model-text", latex_delimiters=[]))
                    cards.append(card)
            ranking = board.ranking_board()
            with gr.Accordion("Skip this prompt", open=False):
                choices = [(text, key) for key, text in SKIP_REASONS.items()]
                reason = gr.Radio(choices, label="Why?", value=None)
                skip = gr.Button("Skip", size="sm")
        # events ----------------------------------------------------------------
        outputs = [status, ranking, prompt, *texts, *cards, work_area, reason]

        def view(parts: list[Any], render: bool) -> list[Any]:
            said, value, asked, *shown = parts
            look = ["model-text", "rendered"] if render else ["model-text"]
            count = len(value["labels"])
            return [
                said,
                value,
                asked,
                *(gr.Markdown(text, elem_classes=look) for text in shown),
                *(gr.Column(visible=i < count) for i in range(len(cards))),
                gr.Column(visible=count > 0),
                None,
            ]

        def on_load(render: bool, request: gr.Request) -> list[Any]:
            return view(handlers.show(_name(request), render), render)

        def on_submit(value: Any, render: bool, request: gr.Request) -> list[Any]:
            return view(handlers.submit(_name(request), value, render), render)

        def on_skip(value: Any, reason: Any, render: bool, request: gr.Request) -> list[Any]:
            return view(handlers.skip(_name(request), value, reason, render), render)

        def on_ranked(value: Any, request: gr.Request) -> None:
            handlers.draft(_name(request), value)

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        page.load(on_load, [render], outputs, **quiet)
        render.input(on_load, [render], outputs, **quiet)
        ranking.ranked(on_ranked, [ranking], None, trigger_mode="always_last", **quiet)
        ranking.submit(on_submit, [ranking, render], outputs, **quiet)
        skip.click(on_skip, [ranking, reason, render], outputs, **quiet)
    page.queue(default_concurrency_limit=20)
    return page


def _name(request: gr.Request) -> str:
    if not request.username:
        raise Refused("Log in first.")
    return str(request.username)
