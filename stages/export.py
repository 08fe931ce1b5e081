"""Adapters out of merged weights, for `prefline export RUN --adapter`.

Stages merge their adapters, so that every artifact is a plain model. What LoRA of rank r has added to a
matrix has rank r at most, so that its singular value decomposition, cut after r values, gives it back up
to rounding. Adapters of several stages on top of each other come back as one, of the sum of their ranks.

Reads: the model, and the one below it, as a stage would load them. Writes adapter_config.json and
adapter_model.safetensors, as peft reads them. A matrix that was trained whole is told, not approximated.

Command: python -m stages.export JOB.json (called by the export; the answer is JOB.done).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from pipeline.errors import ConfigError, ToolkitError
from pipeline.job import Input
from pipeline.settings import LoraSettings
from stages.adapters import write_config
from stages.models import add_lora, load_causal_lm, merge_lora

# rounding of merged fp32 weights is 1e-7 of them; what is left of a full training is as large as the change
_WORST_RELATIVE = 1e-3
_ROUNDING = 1e-6


def extract(policy: PreTrainedModel, base: PreTrainedModel, rank: int) -> PeftModel:
    """`base` with adapters that make it `policy`.

    Raises:
        ConfigError: the two differ by more than adapters of this rank.
    """
    for name, own in policy.named_parameters():
        if name not in (below := dict(base.named_parameters())) or below[name].shape != own.shape:
            raise ConfigError(f"--adapter: {name} has another shape in the model below")
    # alpha is the rank: what the adapters give is added as it is
    adapted = add_lora(base, LoraSettings(rank=rank, alpha=rank), "policy")
    assert isinstance(adapted, PeftModel)
    targets = dict(policy.named_modules())
    inside: set[str] = set()
    for name, layer in adapted.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        inside.add(f"{name}.weight")
        _fill(name, layer, _weight(targets[name]) - _weight(layer.base_layer), rank)
    _refuse_other_changes(policy, adapted, inside)
    return adapted


def _weight(layer: Any) -> Tensor:
    """`[out, in]`, which is not how GPT-2's Conv1D keeps it."""
    weight: Tensor = layer.weight.detach().double()
    return weight if isinstance(layer, nn.Linear) else weight.T


def _fill(name: str, layer: Any, change_OI: Tensor, rank: int) -> None:
    """Set both factors of a layer's adapter to those of the change."""
    left_OS, values_S, right_SI = torch.linalg.svd(change_OI, full_matrices=False)
    kept, lost = values_S[:rank], values_S[rank:]
    noise = _ROUNDING * float(_weight(layer.base_layer).norm())
    if float(lost.norm()) > max(_WORST_RELATIVE * float(values_S.norm()), noise):
        raise ConfigError(
            f"--adapter: {name} has changed by more than adapters of rank {rank} can say",
            "Leave --adapter out to export the whole model.",
        )
    roots = kept.sqrt()
    with torch.no_grad():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        down.zero_()
        up.zero_()
        down[: len(kept)] = roots[:, None] * right_SI[:rank]
        up[:, : len(kept)] = left_OS[:, :rank] * roots


def _refuse_other_changes(policy: nn.Module, adapted: PeftModel, inside: set[str]) -> None:
    below = {
        name.replace(".base_layer.", "."): p
        for name, p in adapted.get_base_model().named_parameters()
    }
    for name, own in policy.named_parameters():
        if name not in inside and not torch.allclose(own, below[name], rtol=1e-5, atol=1e-6):
            raise ConfigError(
                f"--adapter: {name}, which has no adapter, differs from the model below",
                "Leave --adapter out to export the whole model.",
            )


def save(adapted: PeftModel, folder: Path) -> None:
    """peft's two files; their bytes depend on the content only."""
    tensors = get_peft_model_state_dict(adapted)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_config(adapted, folder)


def largest_difference(policy: PreTrainedModel, adapted: PeftModel) -> float:
    """Between a weight of the policy and the same after merging the adapters."""
    merged = dict(merge_lora(adapted).named_parameters())
    return max(
        float((own - merged[name]).detach().abs().max()) for name, own in policy.named_parameters()
    )


def _base(given: dict[str, Any]) -> PreTrainedModel:
    """The model below, if it is the one that others would load.

    Raises:
        ConfigError: the tokenizer was mended by tokens that the original has no rows for.
    """
    if "path" in given:
        return load_causal_lm(Input("model", "", path=Path(given["path"])))
    source = given["sources"][0]
    model = load_causal_lm(Input("model", "", sources=(source,)))
    rows = model.get_input_embeddings().weight.shape[0]
    own = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config().vocab_size
    if rows != own:
        raise ConfigError(
            f"--adapter: {rows - own} tokens were added to the vocabulary of the model below, so that others"
            " cannot put the adapters on it",
            "Leave --adapter out to export the whole model.",
        )
    return model


def run(file: Path) -> None:
    """Do the job in `file`."""
    job = json.loads(file.read_text(encoding="utf-8"))
    policy = load_causal_lm(Input("model", "", path=Path(job["policy"])))
    adapted = extract(policy, _base(job["base"]), job["rank"])
    save(adapted, Path(job["folder"]))
    found = {"max_error": largest_difference(policy, adapted)}
    file.with_suffix(".done").write_text(json.dumps(found), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """The exit code."""
    try:
        run(Path(arguments[0]))
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201 - a program of its own
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
