"""The lead's page: draws what lead.py answers. The numbers are here, the other tabs in lead_prompts.py
and lead_tabs.py.

Prompts, responses and guidelines go through sanitised Markdown (display.py), all other texts of
people into tables of plain text; pictures hold names only as character numbers (lead_charts.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from labeling_ui import attention, lead_charts, lead_figures, lead_prompts, lead_tables, lead_tabs
from labeling_ui.lead import Handlers
from labeling_ui.lead_parts import QUIET, Drawn, asking, choice, table

ASSETS = Path(__file__).parent / "assets"
CSS = (ASSETS / "lead.css").read_text(encoding="utf-8")
HEAD = (ASSETS / "head.html").read_text(encoding="utf-8")
REFRESH_SECONDS = 60
_TOP = """<header class="lead-top"><h1>prefline <span>lead</span></h1><nav aria-label="Pages">
<a href="/ui/">Ranking page</a><a href="/lead/stats.json" download>Numbers as JSON</a>
<form method="post" action="/logout"><button type="submit">Log out</button></form></nav></header>"""


class _Numbers(NamedTuple):
    """The components that hold numbers: all are drawn together, from one look at the store."""

    as_of: gr.Markdown
    hints: gr.Dataframe
    no_hints: gr.Markdown
    tiles: gr.HTML
    coverage: gr.HTML
    pace: gr.HTML
    times: gr.HTML
    left_out: gr.Dataframe
    leases: gr.Dataframe
    lease: gr.Dropdown
    agreement: gr.HTML
    position: gr.HTML
    people: gr.Dataframe
    person: gr.Dropdown
    person_charts: gr.HTML
    queues: gr.Dataframe


def build(handlers: Handlers) -> gr.Blocks:
    """The page. Theme, css and head are given when it is mounted: here they would be ignored."""
    with gr.Blocks(title="prefline: lead", analytics_enabled=False) as page:
        gr.HTML(_TOP, apply_default_css=False)
        with gr.Row(elem_classes="lead-tools"):
            as_of = gr.Markdown(elem_id="as-of")
            refresh = gr.Button("Refresh", size="sm")
        with gr.Tabs():
            with gr.Tab("Overview"):
                overview, release = _overview_tab()
            with gr.Tab("Agreement"):
                figures = _agreement_tab()
            with gr.Tab("Annotators"):
                people, pause, resume = _annotators_tab()
            with gr.Tab("Prompts & gold"):
                prompts = lead_prompts.prompts_tab(handlers)
            with gr.Tab("Guidelines & queues"):
                guidelines = lead_tabs.guidelines_tab(handlers)
                queues = lead_tabs.queues_tab(handlers)
            with gr.Tab("Audit log"):
                audit = lead_tabs.audit_tab(handlers)
        numbers = _Numbers._make([as_of, *overview, *figures, *people, queues.listed])

        def look(request: gr.Request) -> Drawn:
            with asking(request) as name:
                return _drawn(numbers, handlers, name)

        def on_release(lease: Any, request: gr.Request) -> Drawn:
            with asking(request) as name:
                gr.Info(handlers.release(name, lease))
                return _drawn(numbers, handlers, name)

        def on_pause(person: Any, request: gr.Request) -> Drawn:
            with asking(request) as name:
                gr.Info(handlers.pause(name, person, resume=False))
                return _drawn(numbers, handlers, name)

        def on_resume(person: Any, request: gr.Request) -> Drawn:
            with asking(request) as name:
                gr.Info(handlers.pause(name, person, resume=True))
                return _drawn(numbers, handlers, name)

        for event in (page.load, refresh.click, gr.Timer(REFRESH_SECONDS).tick, *queues.changed):
            event(look, None, list(numbers), **QUIET)
        for load in (prompts, guidelines, queues.load, audit):
            load(page.load)
        audit(refresh.click)
        release.click(on_release, [numbers.lease], list(numbers), **QUIET)
        pause.click(on_pause, [numbers.person], list(numbers), **QUIET)
        resume.click(on_resume, [numbers.person], list(numbers), **QUIET)
    page.queue(default_concurrency_limit=5)
    return page


def _overview_tab() -> tuple[list[Any], gr.Button]:
    tiles = gr.HTML(apply_default_css=False)
    gr.Markdown("## Look at this first")
    hints = table(lead_tables.HINTS, "Hints", widths=["18%", "82%"])
    no_hints = gr.Markdown(visible=False)
    coverage = gr.HTML(apply_default_css=False)
    with gr.Row(elem_classes="lead-pair"):
        pace = gr.HTML(apply_default_css=False)
        times = gr.HTML(apply_default_css=False)
    with gr.Row(elem_classes="lead-pair"):
        with gr.Column():
            gr.Markdown("## What becomes of the answers")
            left_out = table(lead_tables.LEFT_OUT, "Answers by use", widths=["75%", "25%"])
        with gr.Column():
            gr.Markdown("## Who works on what now")
            leases = table(lead_tables.LEASES, "Leases", widths=lead_tables.LEASE_WIDTHS)
            with gr.Row(elem_classes="lead-act"):
                lease = choice("A lease that is stuck")
                release = gr.Button("Release it", size="sm")
    return [hints, no_hints, tiles, coverage, pace, times, left_out, leases, lease], release


def _agreement_tab() -> list[Any]:
    gr.Markdown(
        "Dots are estimates, lines their 95 % intervals (over prompts), dashes what chance gives, the"
        " grey field what is usual for people. Known answers and repeats are left out."
    )
    return [gr.HTML(apply_default_css=False), gr.HTML(apply_default_css=False)]


def _annotators_tab() -> tuple[list[Any], gr.Button, gr.Button]:
    gr.Markdown(
        "None of this is a verdict: who differs from the others may be the one who reads. Gold"
        " accuracy counts most. Behind a share stand its 95 % interval and the number of prompts; a"
        " wide interval says: wait for more."
    )
    widths = lead_tables.ANNOTATOR_WIDTHS
    people = table(lead_tables.ANNOTATORS, "Annotators", widths=widths, pinned=1, wrap=False)
    with gr.Row(elem_classes="lead-act"):
        person = choice("Annotator")
        pause = gr.Button("Pause", size="sm")
        resume = gr.Button("Resume", size="sm")
    return [people, person, gr.HTML(apply_default_css=False)], pause, resume


def _drawn(numbers: _Numbers, handlers: Handlers, name: str) -> Drawn:
    found = handlers.overview(name)
    hints = attention.hints(found)
    counts = found.counts
    leases = [(f"{one.name}: {one.task}", one.assignment) for one in counts.leases]
    people = [(one.name, one.id) for one in counts.people if one.kind == "person"]
    values = _Numbers(
        as_of=lead_figures.as_of(found),
        hints=gr.Dataframe(lead_tables.hints(hints), visible=bool(hints)),
        no_hints=gr.Markdown("Nothing stands out.", visible=not hints),
        tiles=lead_charts.tiles(lead_figures.tiles(found)),
        coverage=lead_charts.coverage(counts.queues),
        pace=lead_charts.pace_chart(counts.pace),
        times=lead_charts.times_chart(counts.times),
        left_out=lead_tables.left_out(found),
        leases=lead_tables.leases(counts.leases),
        lease=gr.Dropdown(leases),
        agreement=lead_figures.agreement(found.statistics),
        position=lead_figures.biases(found.statistics),
        people=lead_tables.annotators(found),
        person=gr.Dropdown(people),
        person_charts=lead_figures.people(found),
        queues=lead_tables.queues(counts.queues),
    )
    return dict(zip(numbers, values, strict=True))
