"""Adapters apart from the model they were trained on, so that several can share one frozen base."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.models import backbone_and_head
from stages.sharding import state_of

FOLDER = "adapter"
_ORIGIN = "adapter.json"


def save_reward_adapter(model: PeftModel, artifact: Path, base_digest: str) -> None:
    """Write `artifact/adapter/`: the adapters of a reward model before they are merged, and its head.

    adapter_config.json and adapter_model.safetensors are peft's; `head.safetensors` holds the scalar
    head, `adapter.json` the digest of the model that they belong on. The bytes depend on the content
    only: no path, name or library version.
    """
    folder = artifact / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, state_dict=state_of(model))
    # the head is stored on its own: on a language model there is no place for it
    head = backbone_and_head(model)[1]
    lora = {name: t for name, t in weights.items() if "lora_" in name}
    save_file(_plain(lora), folder / "adapter_model.safetensors")
    save_file(_plain(dict(head.named_parameters())), folder / "head.safetensors")
    write_config(model, folder)
    _write(folder / _ORIGIN, {"base_digest": base_digest, "head": "head.safetensors"})


def write_config(model: PeftModel, folder: Path) -> None:
    """peft's adapter_config.json, without names and versions."""
    config = model.peft_config["default"].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": None, "auto_mapping": None}
    config.pop("peft_version", None)
    _write(folder / "adapter_config.json", config)


def adapter_base(artifact: Path) -> str | None:
    """Digest of the model that the adapter in `artifact` belongs on; None where there is no adapter."""
    path = artifact / FOLDER / _ORIGIN
    if not path.exists():
        return None
    origin: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return origin["base_digest"]


def load_head(artifact: Path) -> dict[str, Tensor]:
    """`weight` `[1, D]` and, where the architecture has one, `bias` `[1]` of the scalar head."""
    return load_file(artifact / FOLDER / "head.safetensors")


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _write(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=1, sort_keys=True, default=_as_json)
    path.write_text(text + "\n", encoding="utf-8")


def _as_json(value: Any) -> Any:
    # peft keeps module names in sets, whose order differs from process to process
    return value.value if isinstance(value, Enum) else sorted(value)
