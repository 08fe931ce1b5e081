"""Exact sizes of a model that need not be there: parameters by kind, and what a training step keeps.

Parameters are counted on the meta device, activations on fake tensors: they have shapes and types, and
take neither memory nor time to speak of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig

from pipeline.scaling import ModelSize
from pipeline.settings import LoraSettings
from stages.models import add_lora


def count(
    config: PreTrainedConfig, lora: LoraSettings | None = None, masked: bool = False
) -> ModelSize:
    """Counts of a model of this configuration, with adapters where `lora` asks for them.

    Embeddings are what `nn.Embedding` layers hold; one that is tied to the output head multiplies, the
    others are looked up.
    """
    with torch.device("meta"):
        model = _auto(masked).from_config(config)
        parameters = sum(p.numel() for p in model.parameters())
        tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        head = model.get_output_embeddings()
        tied = head is not None and id(head.weight) in tables
        looked_up = sum(w.numel() for w in tables.values()) - (head.weight.numel() if tied else 0)
        adapters = 0
        if lora is not None and lora.rank:
            adapted: Any = add_lora(model, lora, "causal")
            adapters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return ModelSize(
        parameters=parameters,
        embedding=sum(w.numel() for w in tables.values()),
        multiplying=parameters - looked_up,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        attention_width=heads * head_width,
        kv_width=kv_heads * head_width,
        vocabulary=config.vocab_size,
        adapters=adapters,
    )


def kept_for_backward(
    config: PreTrainedConfig,
    rows: int,
    tokens: int,
    *,
    bf16: bool = False,
    lora: LoraSettings | None = None,
    logits: bool = True,
    masked: bool = False,
    attention_mask: bool = False,
) -> float:
    """Bytes that forward keeps for backward, for `rows` rows of `tokens` tokens.

    Every tensor that autograd saves is counted once, by its storage, weights excepted: attention, softmax
    and loss as this version of torch really does them. logits: of every token, with their loss; without
    them what comes below the output head. attention_mask: whether attention is given one, as where
    documents of a row are kept apart; causal attention alone needs none.
    """
    # this import takes a hundred megabytes, which no stage does: not before they have been measured
    from torch._subclasses.fake_tensor import FakeTensorMode

    storages: dict[int, tuple[int, Any]] = {}
    with torch.device("meta"):
        model: Any = _auto(masked).from_config(config)
        if lora is not None and lora.rank:
            model = add_lora(model, lora, "causal")
    with FakeTensorMode():
        _as_if_on_cpu(model)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def save(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            # on fake tensors transformers makes a mask where it would not on real ones
            is_mask = tensor.shape[-2:] == (tokens, tokens) and tensor.grad_fn is None
            if storage._cdata not in weights and (attention_mask or not is_mask):
                # held on to, so that none takes the place of another
                storages[storage._cdata] = (storage.nbytes(), storage)
            return tensor

        ids = torch.zeros((rows, tokens), dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, **({} if masked else {"use_cache": False})}
        with (
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            if logits:
                model(**inputs, labels=ids)
            else:
                base = model.get_base_model() if hasattr(model, "get_base_model") else model
                base.base_model(**inputs)
    return float(sum(size for size, _ in storages.values()))


def _as_if_on_cpu(model: nn.Module) -> None:
    """Put fake tensors in the place of a model's tensors, tied ones once."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_weight else copy
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


def _auto(masked: bool) -> Any:
    return AutoModelForMaskedLM if masked else AutoModelForCausalLM
