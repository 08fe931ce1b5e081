"""The page of `prefline inspect`: what happens inside of a model, for one text.

A session holds where its person looks (`_Place`); all that is drawn is asked for anew each time, so
that people who look at the same time do not mix.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

import gradio as gr

from labeling_ui import playground_heads as heads
from labeling_ui import playground_pictures as pictures
from labeling_ui import playground_tabs
from labeling_ui.forms import Refused
from labeling_ui.playground_models import Models
from labeling_ui.playground_parts import chips, note, refused
from labeling_ui.playground_tabs import LONGEST, QUIET

SENTENCE = "The cat sat on the mat because it was soft"
_PICKS = """
element.addEventListener('click', event => {
  const chosen = event.target.closest('[data-pick]');
  if (chosen) trigger('pick', {pick: chosen.dataset.pick});
});
"""


@dataclass
class _Place:
    """Where a person looks. at: the chosen token. to, layer, head: of attention; -1 is what stands out."""

    view: str = "tokens"
    at: int = -1
    to: int = -1
    layer: int = -1
    head: int = 0


def build(models: Models, prompts: list[str], nav: str) -> gr.Blocks:
    choices = [(one.label, one.name) for one in models.offered]
    with gr.Blocks(title="prefline: inspect", analytics_enabled=False) as page:
        gr.HTML(nav, apply_default_css=False, elem_classes="pg-nav")
        place = gr.State()
        with gr.Row(elem_classes="pg-write"):
            text = gr.Textbox(
                SENTENCE, label="Text", lines=1, max_lines=8, max_length=LONGEST,
                elem_id="text", scale=4,
            )  # fmt: skip
            with gr.Column(scale=2, min_width=220):
                model = gr.Dropdown(choices, value=models.names[0], label="Model", elem_id="model")
                chat = gr.Checkbox(
                    False, label="as a user's turn, in the chat template", elem_id="as-chat"
                )
            look = gr.Button("Look", variant="primary", elem_id="look", scale=0, min_width=110)
        facts = gr.HTML(
            note("The model is being loaded …"), apply_default_css=False, elem_id="facts"
        )
        strip = _picture("strip")
        with gr.Tabs(elem_id="views"):
            drawn: dict[str, gr.HTML] = {}
            tabs: dict[str, gr.Tab] = {}
            with gr.Tab("Tokens") as tabs["tokens"]:
                drawn["tokens"] = _picture("tokens")
            with gr.Tab("Next token") as tabs["odds"]:
                shaping = _shaping()
                drawn["odds"] = _picture("odds")
            with gr.Tab("Attention") as tabs["attention"]:
                drawn["attention"] = _picture("attention")
            with gr.Tab("Surprise") as tabs["losses"]:
                drawn["losses"] = _picture("losses")
            with gr.Tab("Neighbours") as tabs["neighbours"]:
                drawn["neighbours"] = _picture("neighbours")
            with gr.Tab("Stage by stage") as tabs["stages"]:
                playground_tabs.stages_tab(models, text, chat)
            with gr.Tab("What PPO sees") as tabs["policy"]:
                playground_tabs.policy_tab(models, prompts)

        pictures_ = list(drawn.values())
        asked = [place, model, text, chat, *shaping]

        async def draw(
            state: _Place | None, name: str, words: str, as_chat: bool, *values: Any
        ) -> list[Any]:
            """The tokens and the picture in front; the others are drawn when they are."""
            state = state or _Place()
            try:
                given = {"model": str(name), "text": str(words)[:LONGEST], "chat": bool(as_chat)}
                found = (await models.ask("tokens", **given))["tokens"]
                if not 0 <= state.at < len(found):
                    state.at, state.to = _first_place(found), -1
                shown = await _view(models, state, given, found, values)
            except Refused as error:
                shown, found = refused(error.message), []
            row = chips(found, state.at, label="The text as tokens: choose one") if found else ""
            answers = [shown if view == state.view else gr.skip() for view in drawn]
            return [state, row, *answers]

        async def on_look(state: _Place | None, *given: Any) -> list[Any]:
            """A new text or model: nothing is chosen any more."""
            fresh = _Place(view=state.view if state else _Place.view)
            return [await _facts(models, given[0]), *await draw(fresh, *given)]

        async def on_model(state: _Place | None, *given: Any) -> list[Any]:
            """The same place in another model."""
            return [await _facts(models, given[0]), *await draw(state, *given)]

        async def on_pick(state: _Place | None, *given: Any, event: gr.EventData) -> list[Any]:
            state = state or _Place()
            _pick(state, getattr(event, "_data", None))
            return await draw(state, *given)

        async def on_tab(view: str, state: _Place | None, *given: Any) -> list[Any]:
            state = state or _Place()
            state.view = view
            return await draw(state, *given)

        outputs = [place, strip, *pictures_]
        gr.on(
            [page.load, look.click, text.submit, chat.input],
            on_look,
            asked,
            [facts, *outputs],
            **QUIET,
        )
        model.input(on_model, asked, [facts, *outputs], **QUIET)
        for part in (strip, *pictures_):
            part.pick(_with_event(on_pick), asked, outputs, **QUIET)
        for control in shaping:
            control.input(draw, asked, outputs, trigger_mode="always_last", **QUIET)
        for view, tab in tabs.items():
            tab.select(_at_tab(on_tab, view), asked, outputs, **QUIET)
    page.queue(default_concurrency_limit=16)
    return page


async def _view(
    models: Models, state: _Place, given: dict[str, Any], found: list[Any], values: tuple[Any, ...]
) -> str:
    """The picture in front."""
    at = state.at
    if state.view == "tokens":
        merges = await models.ask("merges", model=given["model"], token=found[at]["id"])
        return pictures.tokens(found, at, merges)
    if state.view == "odds":
        answer = await models.ask("odds", **given, at=at, shaping=_shaped(values))
        return pictures.odds(answer, at)
    if state.view == "attention":
        answer = await models.ask(
            "attention", **given, at=at, to=state.to, layer=state.layer, head=state.head
        )
        state.to, state.layer, state.head = answer["to"], answer["layer"], answer["head"]
        return await asyncio.to_thread(heads.attention, answer)
    if state.view == "losses":
        return pictures.losses(await models.ask("losses", **given))
    if state.view == "neighbours":
        answer = await models.ask("neighbours", model=given["model"], token=found[at]["id"])
        return pictures.neighbours(answer)
    return ""


async def _facts(models: Models, name: Any) -> str:
    try:
        return pictures.facts(await models.ask("load", model=str(name)), models.label_of(str(name)))
    except Refused as error:
        return refused(error.message)


def _pick(state: _Place, data: Any) -> None:
    """What was clicked: `at,3`, `pair,6,2` or `head,0,4`; the browser may send anything."""
    words = str(data.get("pick", "") if isinstance(data, dict) else "").split(",")
    numbers = [int(word) for word in words[1:] if word.isdecimal() and len(word) < 6]
    if words[0] == "at" and len(numbers) == 1:
        state.at, state.to = numbers[0], -1
    elif words[0] == "pair" and len(numbers) == 2:
        state.at, state.to = numbers
    elif words[0] == "head" and len(numbers) == 2:
        state.layer, state.head = numbers


def _first_place(found: list[Any]) -> int:
    """Where the last `it` of the text ends, a word that stands for another; else the last token."""
    text, ends = "", []
    for row in found:
        text += row["text"]
        ends.append(len(text))
    words = list(re.finditer(r"\bit\b", text))
    if not words:
        return len(found) - 1
    return next(at for at, end in enumerate(ends) if end >= words[-1].end())


def _picture(name: str) -> gr.HTML:
    # a function and no subclass: a subclass makes Gradio write a .pyi file beside this one
    return gr.HTML("", js_on_load=_PICKS, apply_default_css=False, elem_id=f"pic-{name}")


def _with_event(handler: Any) -> Any:
    """Gradio hands the event over by the type of a parameter."""

    async def on_event(
        place: Any, model: Any, text: Any, chat: Any, a: Any, b: Any, c: Any, d: Any,
        event: gr.EventData,
    ) -> Any:  # fmt: skip
        return await handler(place, model, text, chat, a, b, c, d, event=event)

    # names as text would not be found: this module's annotations are postponed
    on_event.__annotations__["event"] = gr.EventData
    return on_event


def _at_tab(handler: Any, view: str) -> Any:
    async def on_select(*given: Any) -> Any:
        return await handler(view, *given)

    return on_select


def _shaping() -> list[Any]:
    with gr.Row():
        return [
            gr.Slider(0, 2, 1.0, step=0.05, label="Temperature", elem_id="temperature"),
            gr.Slider(0, 100, 0, step=1, label="Top-k (0: no limit)", elem_id="top-k"),
            gr.Slider(0, 1, 1.0, step=0.05, label="Top-p (1: no limit)", elem_id="top-p"),
            gr.Slider(1, 2, 1.0, step=0.05, label="Repetition penalty (1: none)"),
        ]


def _shaped(values: tuple[Any, ...]) -> dict[str, Any]:
    try:
        temperature, top_k, top_p, penalty = values
        return {
            "temperature": max(0.0, float(temperature)),
            "top_k": max(0, int(top_k)),
            "top_p": max(0.01, float(top_p)),
            "repetition_penalty": max(1.0, float(penalty)),
        }
    except (TypeError, ValueError):
        raise Refused("One of the settings is no number.") from None
