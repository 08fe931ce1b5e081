"""Attention in fp32 while everything else is in bf16, for CPUs.

There the fused attention of torch 2.13 is slower in bf16 than in fp32 (measured: backward 1.9 times, at
8 rows x 8 heads x 256 tokens x 32), although matrix products are several times faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def use_attention_in_fp32(wanted: bool) -> None:
    """Whether every model of this process that uses `sdpa` computes its attention in fp32.

    Replaces the function in the table of transformers: models and their configurations stay as they are.
    """
    function = _attention_in_fp32 if wanted else sdpa_attention_forward
    ALL_ATTENTION_FUNCTIONS.register("sdpa", function)


def _attention_in_fp32(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `sdpa_attention_forward`; the result has the type of the query."""
    with torch.autocast(query.device.type, enabled=False):
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        states, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
        return states.to(query.dtype), None
