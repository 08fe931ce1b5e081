"""Making a user's model fit the line: what hub models and GGUF files leave out or get wrong.

Every repair is noted (`repairs_of`), so that a stage can say what was done.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stages.chat import CHAT_TEMPLATE, PAD, TURN_TOKENS

_UNUSED = re.compile(r"reserved|unused|dummy|extra_id|placeholder", re.IGNORECASE)
_CHATML_TURN = re.compile(
    r"\{\{-?\s*'<\|im_start\|>'\s*\+\s*message(?:\['role'\]|\.role)\s*\+\s*'\\?\n?n?'\s*\+\s*"
    r"message(?:\['content'\]|\.content)\s*\+\s*'<\|im_end\|>'\s*\+\s*'\\?\n?n?'\s*-?\}\}"
)
_CHATML_MARKED = (
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endif %}"
)
_PROBE = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def repairs_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What was mended when the tokenizer was loaded, one sentence each."""
    return tuple(getattr(tokenizer, "_prefline_repairs", ()))


def repair_tokenizer(tokenizer: PreTrainedTokenizerBase, gguf: Path | None) -> None:
    """Mend in place: pre-tokenizer of a GGUF file, template, end token, generation marks, pad."""
    notes: list[str] = []
    if gguf is not None and _mend_pre_tokenizer(tokenizer, gguf):
        notes.append("numbers are split into digits, as the GGUF file's tokenizer asks")
    if not tokenizer.chat_template:
        tokens = [AddedToken(t, special=True, normalized=False) for t in TURN_TOKENS]
        added = tokenizer.add_special_tokens({"extra_special_tokens": tokens})
        tokenizer.chat_template = CHAT_TEMPLATE
        notes.append(f"there was no chat template: ours is used, with {added} new turn tokens")
    end = _end_of_turn(tokenizer)
    if end and end != tokenizer.eos_token:
        notes.append(f"a turn ends with {end}, which replaces {tokenizer.eos_token} as end token")
        tokenizer.eos_token = end
    notes += _mark_generation(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        notes.append(_set_pad(tokenizer))
    tokenizer.padding_side = "right"
    tokenizer._prefline_repairs = notes


def _mend_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> bool:
    """transformers 5.23 ignores `tokenizer.ggml.pre`: numbered lists then get other tokens.

    Measured on 650 texts: 68 differ from llama.cpp without this, none with it.
    """
    from gguf import GGUFReader

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm":
        return False
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return True


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The special token that the template writes right behind an assistant's last words."""
    text = tokenizer.apply_chat_template(_PROBE[:2], tokenize=False)
    assert isinstance(text, str)
    rest = text.rpartition("two")[2].lstrip()
    found = [token for token in tokenizer.all_special_tokens if rest.startswith(token)]
    return max(found, key=len, default=None)


def _mark_generation(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    template = tokenizer.chat_template
    if not isinstance(template, str) or "{% generation %}" in template:
        return []
    marked = _CHATML_TURN.sub(lambda _: _CHATML_MARKED, template)
    if marked != template and _same_text(tokenizer, template, marked):
        tokenizer.chat_template = marked
        return ["the chat template got {% generation %} marks"]
    return [
        "the chat template has no {% generation %} marks; our own completion mask does not need them"
    ]


def _same_text(tokenizer: PreTrainedTokenizerBase, one: str, other: str) -> bool:
    def rendered(template: str, messages: list[dict[str, str]], begin: bool) -> Any:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=begin
        )

    system = [{"role": "system", "content": "zero"}]
    probes = [(_PROBE, False), (_PROBE[:3], True), (system + _PROBE, False)]
    return all(rendered(one, m, begin) == rendered(other, m, begin) for m, begin in probes)


def _set_pad(tokenizer: PreTrainedTokenizerBase) -> str:
    """A pad token that is not the end token: a mask made from `ids != pad` deletes end labels."""
    why = "pad was the end token" if tokenizer.pad_token else "there was no pad token"
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    names = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    free = [name for name in names if name not in taken and name not in template]
    padlike = [name for name in free if "pad" in name.lower()]
    unused = [name for name in free if _UNUSED.search(name)]
    special = [name for name in free if name in tokenizer.all_special_tokens or "<" in name]
    choice = (padlike[:1] or unused[:1] or special[-1:] or [None])[0]
    if choice is None:
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD, special=True, normalized=False)})
        return f"{why}: a new token {PAD} pads"
    tokenizer.pad_token = choice
    return f"{why}: {choice}, which chats do not use, pads"


def without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """A plain copy of a model loaded from GGUF: the loaded one refuses `save_pretrained`."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    switch_dropout_off(config)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    return plain


def switch_dropout_off(config: Any) -> None:
    """Every dropout of the architecture to 0: PPO compares logprobs of the same tokens twice."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and re.search(r"drop(out|_rate)?$|dropout|pdrop", key):
            setattr(config, key, 0.0)


@torch.no_grad()
def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Rows for tokens that the repairs added, and the special ids in the configuration.

    A new row is the mean of the rows of the word that the token is made of (`<|user|>`: user), or
    of all rows: the same every time, and useful even where adapters leave embeddings alone.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > old:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for token_id in range(old, len(tokenizer)):
            name = tokenizer.convert_ids_to_tokens(token_id)
            word = re.sub(r"\W", "", name)
            ids = tokenizer(word, add_special_tokens=False)["input_ids"] if name != PAD else []
            source = torch.tensor([i for i in ids if i < old] or list(range(old)))
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                if layer is not None:
                    layer.weight[token_id] = layer.weight[source].mean(0)
                if getattr(layer, "bias", None) is not None:
                    layer.bias[token_id] = layer.bias[source].mean(0)
    set_special_ids(model, tokenizer)


def set_special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """bos, eos and pad of the tokenizer in both configurations of the model."""
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    for key, value in ids.items():
        setattr(model.config, key, value)
    if model.can_generate():
        # sampling habits of the file are dropped: every stage states its own temperature
        model.generation_config = GenerationConfig(**ids)
