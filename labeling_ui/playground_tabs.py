"""Two tabs of `prefline inspect` with a button of their own, because they make a model write."""

from __future__ import annotations

import asyncio
from typing import Any

import gradio as gr

from labeling_ui import playground_pictures as pictures
from labeling_ui import playground_policy as policies
from labeling_ui.forms import Refused
from labeling_ui.playground_models import Models
from labeling_ui.playground_parts import note, refused

LONGEST = 20_000
"""Characters of a text."""
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_WAITING = {**QUIET, "show_progress": "minimal"}


def stages_tab(models: Models, text: gr.Textbox, chat: gr.Checkbox) -> None:
    gr.HTML(
        note(
            "The same text before each model, in the order in which they were made. Temperature 0 always"
            " takes the likeliest token."
        ),
        apply_default_css=False,
    )
    with gr.Row():
        which = gr.CheckboxGroup(_choices(models), value=models.names[:6], label="Models", scale=3)
        temperature = gr.Slider(0, 2, 0.0, step=0.05, label="Temperature")
        seed = gr.Number(0, precision=0, label="Seed", minimum=0)
        most = gr.Slider(1, 200, 40, step=1, label="Tokens to write")
    go = gr.Button("Let them go on", variant="primary", elem_id="go-on", elem_classes="pg-go")
    shown = gr.HTML("", apply_default_css=False, elem_id="pic-stages")

    async def on_go(words: str, as_chat: bool, names: list[str], *values: Any) -> str:
        try:
            if not names:
                raise Refused("Choose at least one model.")
            heat, number, count = float(values[0]), int(values[1] or 0), int(values[2])
            answer = await models.ask(
                "stages", names=names, text=str(words)[:LONGEST], chat=bool(as_chat), seed=number,
                shaping={"temperature": heat}, max_tokens=count,
            )  # fmt: skip
        except Refused as error:
            return refused(error.message)
        return pictures.stages(answer, models.label_of)

    go.click(on_go, [text, chat, which, temperature, seed, most], [shown], **_WAITING)


def policy_tab(models: Models, prompts: list[str]) -> None:
    gr.HTML(
        note(
            "A response to a prompt, token by token, as PPO sees it. Leave the response empty to let the"
            " policy write one."
        ),
        apply_default_css=False,
    )
    with gr.Row():
        prompt = gr.Textbox(
            prompts[0] if prompts else "Tell me a story about a cat.",
            label="Prompt", lines=2, max_length=LONGEST, elem_id="ppo-prompt",
        )  # fmt: skip
        response = gr.Textbox(
            label="Response (empty: the policy writes)", lines=2, max_length=LONGEST,
            elem_id="ppo-response",
        )  # fmt: skip
    with gr.Row():
        model = gr.Dropdown(
            _choices(models), value=models.names[-1], label="Policy", elem_id="policy",
        )  # fmt: skip
        seed = gr.Number(0, precision=0, label="Seed", minimum=0)
    go = gr.Button("Show what PPO sees", variant="primary", elem_id="ppo-go", elem_classes="pg-go")
    shown = gr.HTML("", apply_default_css=False, elem_id="pic-policy")

    async def on_go(name: str, words: str, said: str, number: Any) -> str:
        try:
            answer = await models.ask(
                "policy", model=str(name), prompt=str(words)[:LONGEST],
                response=str(said)[:LONGEST] if said else None, seed=int(number or 0),
            )  # fmt: skip
        except Refused as error:
            return refused(error.message)
        return await asyncio.to_thread(policies.policy, answer)

    go.click(on_go, [model, prompt, response, seed], [shown], **_WAITING)


def _choices(models: Models) -> list[tuple[str, str]]:
    return [(one.label, one.name) for one in models.offered]
