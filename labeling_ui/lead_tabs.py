"""The tabs of the lead's page that show and change single things: prompts, guidelines, queues, events.

Each returns how to load it: a function that takes an event, such as `page.load`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import gradio as gr

from labeling_ui import lead_tables
from labeling_ui.display import exact, rendered, together
from labeling_ui.forms import Refused
from labeling_ui.inspection import VIEWS, Prompt
from labeling_ui.lead import QUEUE_FIELDS, Handlers

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
Drawn = dict[Any, Any]
"""Component -> its new value."""
Load = Callable[[Callable[..., Any]], Any]
_IMPORT_EXAMPLE = (
    '{"prompt": "…", "responses": [{"text": "…", "rank": 1}, {"text": "…", "rank": 2}]}'
)


class Queues(NamedTuple):
    """What the page needs of the tab of queues."""

    listed: gr.Dataframe
    load: Load
    changed: list[Callable[..., Any]]
    """Events after which the numbers are other ones."""


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


# ---- prompts and known answers -------------------------------------------------------------


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


# ---- guidelines and queues -----------------------------------------------------------------


def guidelines_tab(handlers: Handlers) -> Load:
    gr.Markdown("## Guidelines")
    version = gr.Markdown()
    with gr.Row(elem_classes="lead-pair"):
        words = gr.Textbox(
            label="What annotators read (Markdown)", lines=12, max_lines=30, max_length=20_000
        )
        with gr.Column():
            gr.Markdown("In force now:")
            preview = gr.Markdown(elem_classes="lead-text", latex_delimiters=[])
    with gr.Row(elem_classes="lead-act"):
        save = gr.Button("Put this text in force", size="sm")

    def drawn(name: str) -> Drawn:
        text, number = handlers.guidelines(name)
        said = (
            "There are none yet."
            if number is None
            else f"Version {number}. Each ranking remembers the version it was made under."
        )
        return {words: text, preview: rendered(text) if text else "", version: said}

    def on_load(request: gr.Request) -> Drawn:
        with asking(request) as name:
            return drawn(name)

    def on_save(text: Any, request: gr.Request) -> Drawn:
        with asking(request) as name:
            gr.Info(handlers.set_guidelines(name, text))
            return drawn(name)

    loaded = [words, preview, version]
    save.click(on_save, [words], loaded, **QUIET)
    return lambda event: event(on_load, None, loaded, **QUIET)


def queues_tab(handlers: Handlers) -> Queues:
    gr.Markdown("## Queues\nWhat is changed here stays when the line is resumed.")
    listed = table(lead_tables.QUEUES, "Queues", widths=lead_tables.QUEUE_WIDTHS, pinned=1)
    with gr.Row(elem_classes="lead-act"):
        step = choice("Queue")
        fields = [
            gr.Number(label="Overlap (annotators)", precision=0, minimum=1),
            gr.Number(label="Minimum (empty: all)", value=None),
            gr.Number(label="Lease, minutes", precision=0, minimum=1),
            gr.Number(label="Gold rate, 0 to 0.5", minimum=0, maximum=0.5, step=0.01),
            gr.Number(label="Repeat rate, 0 to 0.5", minimum=0, maximum=0.5, step=0.01),
        ]
    with gr.Row(elem_classes="lead-act"):
        save = gr.Button("Save these settings", size="sm")
        freeze = gr.Button("Freeze this queue", size="sm")
        unfreeze = gr.Button("Unfreeze it", size="sm")

    def on_load(request: gr.Request) -> list[Any]:
        with asking(request) as name:
            steps = handlers.steps(name)
            first = (
                [handlers.queue(name, steps[0])[field] for field in QUEUE_FIELDS] if steps else []
            )
            return [gr.Dropdown(steps, value=steps[0] if steps else None), *(first or [None] * 5)]

    def on_step(step: Any, request: gr.Request) -> list[Any]:
        with asking(request) as name:
            found = handlers.queue(name, step)
            return [found[field] for field in QUEUE_FIELDS]

    def on_save(
        step: Any, overlap: Any, minimum: Any, minutes: Any, gold: Any, repeat: Any,
        request: gr.Request,
    ) -> None:  # fmt: skip
        with asking(request) as name:
            gr.Info(handlers.change_queue(name, step, overlap, minimum, minutes, gold, repeat))

    def on_freeze(step: Any, request: gr.Request) -> None:
        with asking(request) as name:
            gr.Info(handlers.freeze(name, step, True))

    def on_unfreeze(step: Any, request: gr.Request) -> None:
        with asking(request) as name:
            gr.Info(handlers.freeze(name, step, False))

    step.input(on_step, [step], fields, **QUIET)
    changed = [
        save.click(on_save, [step, *fields], None, **QUIET).success,
        freeze.click(on_freeze, [step], None, **QUIET).success,
        unfreeze.click(on_unfreeze, [step], None, **QUIET).success,
    ]
    return Queues(listed, lambda event: event(on_load, None, [step, *fields], **QUIET), changed)


# ---- audit log -----------------------------------------------------------------------------


def audit_tab(handlers: Handlers) -> Load:
    with gr.Row(elem_classes="lead-act"):
        kind = choice("What", [("all", "")], "")
        who = choice("Who", [("all", 0)], 0)
        most = gr.Dropdown([100, 500, 2000], label="Last", value=100)
    log = table(lead_tables.AUDIT, "Audit log", max_chars=300)

    def listing(name: str, chosen: Sequence[Any]) -> lead_tables.Rows:
        kind, who, most = chosen
        return lead_tables.audit(handlers.audit(name, kind, who, most))

    def on_change(kind: Any, who: Any, most: Any, request: gr.Request) -> lead_tables.Rows:
        with asking(request) as name:
            return listing(name, (kind, who, most))

    def on_load(chosen: Any, person: Any, count: Any, request: gr.Request) -> Drawn:
        with asking(request) as name:
            names = [("all", 0), *handlers.people(name)]
            kinds = [("all", ""), *((word, word) for word in handlers.event_kinds(name))]
            return {
                kind: gr.Dropdown(kinds),
                who: gr.Dropdown(names),
                log: listing(name, (chosen, person, count)),
            }

    for one in (kind, who, most):
        one.input(on_change, [kind, who, most], [log], **QUIET)
    return lambda event: event(on_load, [kind, who, most], [kind, who, log], **QUIET)
