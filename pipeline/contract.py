"""What two artifacts must agree on before a step may read both.

A contract is a dict: tokenizer (digest), chat_template (digest), vocab_size, bos_id, eos_id,
pad_id, max_length, padding_side, and for a reward model score_position, score_mean, score_std.
Keys that are absent or None claim nothing: samples and rankings carry a part of it, or none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.errors import ArtifactError
from pipeline.job import Input

KEYS = (
    "tokenizer",
    "chat_template",
    "vocab_size",
    "bos_id",
    "eos_id",
    "pad_id",
    "max_length",
    "padding_side",
    "score_position",
    "score_mean",
    "score_std",
)
# the rest may differ: each model pads and cuts for itself
AGREE = {
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
    "vocab_size": "vocabulary size",
    "bos_id": "begin token",
    "eos_id": "end token",
    "pad_id": "padding token",
}


def check_contract(step: str, contract: dict[str, Any]) -> None:
    """Refuse a contract that no later step could work with.

    Raises:
        ArtifactError: an unknown key, or a padding token that is also the end token.
    """
    unknown = sorted(set(contract) - set(KEYS))
    if unknown:
        raise ArtifactError(f"{step}: unknown contract key {', '.join(unknown)}")
    eos, pad = contract.get("eos_id"), contract.get("pad_id")
    if eos is not None and pad == eos:
        raise ArtifactError(
            f"{step}: the padding token is the end token (id {pad}), so the end of a response would"
            " be masked away",
            "Give the tokenizer a padding token of its own.",
        )


def check_contracts(step: str, inputs: Iterable[Input]) -> None:
    """Refuse inputs that do not fit together.

    Raises:
        ArtifactError: one sentence that names both sides.
    """
    seen: dict[str, tuple[Input, Any]] = {}
    for item in inputs:
        check_contract(_name(item), item.contract)
        for key, words in AGREE.items():
            value = item.contract.get(key)
            if value is None:
                continue
            other, expected = seen.setdefault(key, (item, value))
            if value != expected:
                raise ArtifactError(
                    f"{step}: {_name(item)} has {words} {_short(value)}, but {_name(other)} has"
                    f" {words} {_short(expected)}; they must be the same",
                    "Make both from the same base model and tokenizer.",
                )


def _name(item: Input) -> str:
    role = item.role.replace("_", " ")
    return f"the {role} (step {item.step})" if item.step else f"the {role}"


def _short(value: Any) -> str:
    text = str(value)
    return text[:19] if text.startswith("sha256:") else text
