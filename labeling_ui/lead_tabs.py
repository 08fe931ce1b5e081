"""The tabs of the lead's page that show and change guidelines and queues, and the log of events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr

from labeling_ui import lead_tables
from labeling_ui.display import rendered
from labeling_ui.lead import QUEUE_FIELDS, Handlers
from labeling_ui.lead_parts import QUIET, Drawn, Load, asking, choice, table


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


class Queues(NamedTuple):
    """What the page needs of the tab of queues."""

    listed: gr.Dataframe
    load: Load
    changed: list[Callable[..., Any]]
    """Events after which the numbers are other ones."""


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
