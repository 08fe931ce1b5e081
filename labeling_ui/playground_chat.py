"""The page of `prefline chat`: several models answer one person side by side."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from labeling_ui.forms import Refused
from labeling_ui.playground_models import Models
from labeling_ui.playground_parts import escaped, note, refused, shown
from labeling_ui.playground_talk import OWN, Answer, Talk, Turn

Save = Callable[[dict[str, Any], dict[str, Any]], bool]
_REDRAW_SECONDS = 0.1
_MOST_MODELS = 6
_STATES = {
    "cut": "cut at the limit of tokens",
    "stopped": "stopped",
    "failed": "failed",
    "writing": "writing …",
}
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build(models: Models, prompts: list[str], save: Save | None, nav: str) -> gr.Blocks:
    """The page. save: None where there is no run whose people could rank."""
    choices = [(one.label, one.name) for one in models.offered]
    with gr.Blocks(title="prefline: chat", analytics_enabled=False) as page:
        gr.HTML(nav, apply_default_css=False, elem_classes="pg-nav")
        # one object for all events of a person: what one changes, those under way see
        talk = gr.State(Talk())
        chosen = gr.CheckboxGroup(
            choices, value=_first_choice(models), label="Models", elem_id="models"
        )
        board = gr.HTML(_drawn(Talk(), models), apply_default_css=False, elem_id="board")
        with gr.Row(elem_classes="pg-write"):
            box = gr.Textbox(
                label="Your prompt",
                placeholder="Write to all chosen models. Enter sends, Shift+Enter begins a new line.",
                # with one line at first, Enter sends
                lines=1,
                max_lines=8,
                max_length=20_000,
                elem_id="prompt",
                scale=5,
            )
            with gr.Column(scale=1, min_width=150):
                send = gr.Button("Send", variant="primary", elem_id="send")
                stop = gr.Button("Stop", elem_id="stop")
        with gr.Row(elem_classes="pg-act"):
            clear = gr.Button("Begin anew", elem_id="clear")
            keep = gr.Button(
                "Save this comparison as a ranking task", elem_id="save", visible=save is not None
            )
        told = gr.HTML("", apply_default_css=False, elem_id="told")
        if prompts:
            example = gr.Dropdown(
                [(_short(text), text) for text in prompts],
                value=None,
                label="Take a prompt of this run (none that a model was trained on)",
                elem_id="example",
            )
            example.input(lambda text: text or "", example, box, **QUIET)
        controls = _sampling(choices)

        async def on_send(
            state: Talk, prompt: str, names: list[str], *values: Any
        ) -> AsyncIterator[tuple[Any, ...]]:
            try:
                shared, seed, shaping, max_tokens = _settings(values)
                turn = _begun(state, prompt, names, shared)
            except Refused as error:
                yield gr.skip(), gr.skip(), refused(error.message)
                return
            state.sampling = {**shaping, "seed": seed, "max_tokens": max_tokens}
            yield _drawn(state, models), "", ""
            async for _ in _written(models, turn, seed, shaping, max_tokens):
                yield _drawn(state, models), gr.skip(), gr.skip()

        def on_clear(state: Talk) -> tuple[str, str]:
            state.clear()
            return _drawn(state, models), ""

        async def on_save(state: Talk) -> str:
            assert save is not None
            try:
                row = state.comparison(models.version_of)
                new = await asyncio.to_thread(save, row, state.sampling)
            except Refused as error:
                return refused(error.message)
            if new:
                return note(
                    "Saved: people are handed it in the ranking app, without the names of the models, in a"
                    " random order. What they rank counts in the next rank step."
                )
            return note("This comparison is in the label store already; nothing was added.")

        gr.on(
            [send.click, box.submit],
            on_send,
            [talk, box, chosen, *controls],
            [board, box, told],
            concurrency_limit=16,
            **QUIET,
        )
        # not Gradio's `cancels`: the answer to an event that comes right behind a cancelled one is
        # lost now and then, since the stream for answers is closed in between. What is being sent
        # sees that it was stopped, and draws that.
        stop.click(lambda state: state.stop(), [talk], None, queue=False, **QUIET)
        clear.click(on_clear, [talk], [board, told], queue=False, **QUIET)
        keep.click(on_save, [talk], [told], **QUIET)
    page.queue(default_concurrency_limit=16)
    return page


def _sampling(choices: list[tuple[str, str]]) -> list[Any]:
    """What decides how the models write; in the order in which `_settings` reads it."""
    with gr.Accordion("How they write", open=False, elem_id="sampling"):
        with gr.Row():
            temperature = gr.Slider(
                0, 2, 1.0, step=0.05, label="Temperature", info="0: always the likeliest token"
            )
            top_k = gr.Slider(0, 200, 0, step=1, label="Top-k", info="0: no limit")
            top_p = gr.Slider(0, 1, 1.0, step=0.05, label="Top-p", info="1: no limit")
        with gr.Row():
            penalty = gr.Slider(1, 2, 1.0, step=0.05, label="Repetition penalty", info="1: none")
            most = gr.Slider(
                1, 512, 120, step=1, label="Longest answer, in tokens", elem_id="longest"
            )
            seed = gr.Number(0, precision=0, label="Seed", info="the same seed gives the same text")
        shared = gr.Dropdown(
            [("each model's own answers", OWN), *((f"the answers of {label}", name) for label, name in choices)],
            value=OWN,
            label="Earlier turns: what the models read as theirs",
            info="Answers of a later turn can only be ranked if all models have read the same.",
        )  # fmt: skip
    return [temperature, top_k, top_p, penalty, most, seed, shared]


def _settings(values: tuple[Any, ...]) -> tuple[str, int, dict[str, Any], int]:
    """(whose earlier turns, seed, shaping, longest answer); the browser may send anything."""
    temperature, top_k, top_p, penalty, most, seed, shared = values
    try:
        shaping = {
            "temperature": min(2.0, max(0.0, float(temperature))),
            "top_k": max(0, int(top_k)),
            "top_p": min(1.0, max(0.01, float(top_p))),
            "repetition_penalty": min(2.0, max(1.0, float(penalty))),
        }
        return str(shared), int(seed or 0), shaping, min(512, max(1, int(most)))
    except (TypeError, ValueError):
        raise Refused("One of the settings is no number.") from None


def _begun(state: Talk, prompt: str, names: list[str], shared: str) -> Turn:
    if not isinstance(prompt, str) or not prompt.strip():
        raise Refused("Write a prompt first.")
    if not names:
        raise Refused("Choose at least one model.")
    if len(names) > _MOST_MODELS:
        raise Refused(f"At most {_MOST_MODELS} models can answer at the same time.")
    state.stop()
    answers = {name: Answer(state.messages_for(name, prompt, shared)) for name in names}
    turn = Turn(prompt, answers)
    state.turns.append(turn)
    return turn


async def _written(
    models: Models, turn: Turn, seed: int, shaping: dict[str, Any], max_tokens: int
) -> AsyncIterator[None]:
    """Fills the answers of a turn, all models at the same time; yields when there is something new."""
    news = asyncio.Event()

    async def fill(name: str, answer: Answer) -> None:
        try:
            stream = models.stream(
                "chat", model=name, messages=answer.messages, shaping=shaping, seed=seed,
                max_tokens=max_tokens,
            )  # fmt: skip
            last: dict[str, Any] = {}
            async with contextlib.aclosing(stream) as rows:
                async for last in rows:
                    if answer.state != "writing":
                        return
                    answer.text, answer.tokens = last["text"], last["tokens"]
                    answer.seconds = last["seconds"]
                    news.set()
            answer.state = "done" if last.get("ended") else "cut"
            if last.get("full") and answer.state == "cut":
                answer.note = "the model reads no more than this"
        except Refused as error:
            answer.state, answer.note = "failed", error.message
        except Exception:  # noqa: BLE001 - a card that says "writing" for ever tells nobody anything
            traceback.print_exc()
            answer.state, answer.note = "failed", "The terminal of the playground says why."
        finally:
            news.set()

    work = [asyncio.create_task(fill(name, answer)) for name, answer in turn.answers.items()]
    try:
        while turn.writing:
            try:
                await asyncio.wait_for(news.wait(), _REDRAW_SECONDS)
            except TimeoutError:
                # stop may have been pressed meanwhile
                continue
            news.clear()
            yield
            await asyncio.sleep(_REDRAW_SECONDS)
        yield
    finally:
        # done, stopped, or the page was closed: leaving the streams stops the models
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)


def _drawn(state: Talk, models: Models) -> str:
    """The conversation as HTML."""
    if not state.turns:
        return note(
            "One prompt, all models of the run side by side: the base model that has only read text, the"
            " one that was shown how to answer (sft), and what people's rankings made of it. With the"
            " same seed the same random numbers decide, so that only the models make a difference."
        )
    parts = []
    for number, turn in enumerate(state.turns):
        cards = "".join(
            _card(name, answer, models, number) for name, answer in turn.answers.items()
        )
        parts.append(
            f'<div class="pg-turn"><p class="pg-you"><b>You</b>{shown(turn.prompt)}</p>'
            f'<div class="pg-cards">{cards}</div></div>'
        )
    return "".join(parts)


def _card(name: str, answer: Answer, models: Models, number: int) -> str:
    state = answer.state
    pace = f", {answer.tokens / answer.seconds:.0f} a second" if answer.seconds > 0 else ""
    words = [
        f"{answer.tokens} tokens{pace}" if answer.tokens else "",
        _STATES.get(state, "ended by itself"),
    ]
    said = shown(answer.text) or ("" if state == "writing" else "<i>nothing</i>")
    why = f'<p class="pg-why">{shown(answer.note)}</p>' if answer.note else ""
    return (
        f'<section class="pg-card" data-model="{escaped(name)}" data-state="{state}"'
        f' aria-label="{escaped(f"{models.label_of(name)}, turn {number + 1}")}">'
        f'<h4>{shown(models.label_of(name))}</h4><p class="pg-said">{said}</p>{why}'
        f"<footer>{escaped('; '.join(word for word in words if word))}</footer></section>"
    )


def _first_choice(models: Models) -> list[str]:
    """What came first, sft, and the last policy: the whole way in three steps."""
    names = models.names
    picked = [names[0], *(one.name for one in models.offered if one.stage == "sft"), names[-1]]
    return list(dict.fromkeys(picked))


def _short(text: str) -> str:
    return text if len(text) <= 110 else text[:109] + "…"
