"""The tab of the lead's page where prompts are read and made known answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from labeling_ui import lead_tables
from labeling_ui.display import exact, together
from labeling_ui.inspection import VIEWS, Prompt
from labeling_ui.lead import Handlers
from labeling_ui.lead_parts import QUIET, Drawn, Load, asking, table

_IMPORT_EXAMPLE = (
    '{"prompt": "…", "responses": [{"text": "…", "rank": 1}, {"text": "…", "rank": 2}]}'
)


def prompts_tab(handlers: Handlers) -> Load:
    with gr.Row(elem_classes="lead-act"):
        views = [(words, key) for key, words in VIEWS.items()]
        view = gr.Dropdown(views, label="List", value="disagreement")
        words = gr.Textbox(label="With this text or id", max_length=200)
        find = gr.Button("Find", size="sm")
    listed = table(lead_tables.PROMPTS, "Prompts", wrap=False, max_chars=60)
    gr.Markdown("Select a row to see the prompt, its responses and what was said of them.")
    open_prompt = _prompt_area(handlers)
    with gr.Accordion("Import known answers (JSONL)", open=False):
        rows = gr.Textbox(
            label="One object a line", lines=5, max_length=50_000, placeholder=_IMPORT_EXAMPLE
        )
        load = gr.Button("Import", size="sm")
        loaded = gr.Textbox(label="What happened", interactive=False, lines=2)

    def listing(view: Any, words: Any, request: gr.Request) -> lead_tables.Rows:
        with asking(request) as name:
            return lead_tables.prompts(handlers.prompts(name, view, words))

    def on_import(rows: Any, request: gr.Request) -> str:
        with asking(request) as name:
            return handlers.import_gold(name, rows)

    def search(event: Callable[..., Any]) -> Any:
        return event(listing, [view, words], [listed], **QUIET)

    for event in (find.click, view.input, words.submit):
        search(event)
    open_prompt(listed.select)
    load.click(on_import, [rows], [loaded], **QUIET)
    return search


def _prompt_area(handlers: Handlers) -> Load:
    """One prompt with all that was said of it; empty until one is chosen."""
    with gr.Column(visible=False, elem_id="one-prompt") as area:
        task = gr.Textbox(label="Prompt", interactive=False, visible="hidden")
        shown = gr.Markdown(elem_classes="lead-text", latex_delimiters=[])
        widths = lead_tables.SAID_WIDTHS
        said = table(lead_tables.SAID, "What annotators said", widths=widths, pinned=1)
        known = gr.Markdown(
            "### Known answer\nA rank for each response in the order above; 1 is best. Select a row"
            " of the table to take over its ranks. Choose finished prompts: from others, somebody"
            " might get the same prompt twice."
        )
        with gr.Row(elem_classes="lead-act"):
            ranks = gr.Textbox(label="Ranks", placeholder="2 1 3", max_length=60)
            make = gr.Button("Use as a known answer", size="sm")
            retire = gr.Button("Retire this known answer", size="sm")
            again = gr.Button("Hand it out again", size="sm")

    def drawn(name: str, chosen: Any) -> Drawn:
        found = handlers.prompt(name, chosen)
        is_gold = found.kind == "gold"
        return {
            area: gr.Column(visible=True),
            task: found.id,
            shown: _text_of(found),
            said: lead_tables.said(found),
            known: gr.Markdown(visible=found.kind in ("rank", "gold")),
            ranks: gr.Textbox(
                " ".join(map(str, found.gold or ())),
                visible=found.kind in ("rank", "gold"),
                interactive=not is_gold,
            ),
            make: gr.Button(visible=found.kind == "rank"),
            retire: gr.Button(visible=is_gold and found.active),
            again: gr.Button(visible=is_gold and not found.active),
        }

    def on_row(event: gr.SelectData, request: gr.Request) -> Drawn:
        with asking(request) as name:
            return drawn(name, _cell(event, 0))

    def on_said(event: gr.SelectData) -> Any:
        chosen = _cell(event, lead_tables.SAID.index("Ranks"))
        return gr.skip() if chosen == lead_tables.NOTHING else chosen

    def on_make(task: Any, ranks: Any, request: gr.Request) -> None:
        with asking(request) as name:
            gr.Info(handlers.make_gold(name, task, ranks))

    def on_retire(task: Any, request: gr.Request) -> Drawn:
        with asking(request) as name:
            gr.Info(handlers.retire_gold(name, task, active=False))
            return drawn(name, task)

    def on_again(task: Any, request: gr.Request) -> Drawn:
        with asking(request) as name:
            gr.Info(handlers.retire_gold(name, task, active=True))
            return drawn(name, task)

    parts = [area, task, shown, said, known, ranks, make, retire, again]
    said.select(on_said, None, [ranks], **QUIET)
    make.click(on_make, [task, ranks], None, **QUIET)
    retire.click(on_retire, [task], parts, **QUIET)
    again.click(on_again, [task], parts, **QUIET)
    return lambda event: event(on_row, None, parts, **QUIET)


def _text_of(found: Prompt) -> str:
    """Prompt and responses, every character as it is."""
    parts = [together(found.messages, exact)]
    if found.warnings:
        parts += ["**Warnings of the import**", exact(found.warnings)]
    for i, response in enumerate(found.responses, 1):
        parts += [f"**Response {i}**", exact(response)]
    return "\n\n".join(parts)


def _cell(event: gr.SelectData, column: int) -> str:
    """A cell of the row that was selected; the browser may have sent anything."""
    row = event.row_value
    return str(row[column]) if isinstance(row, list) and len(row) > column else ""
