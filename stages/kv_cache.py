"""A key-value cache in place: a token is written, not concatenated, and rows leave cheaply.

Shapes: B rows, C columns of the cache, N new tokens. The cache of transformers copies everything that
it holds at every token (measured: a fifth of the time of decoding on a CPU), and again for every row
that is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class InPlaceLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values `[B, heads, C, width]`: views of two buffers that do not grow.

    parts: what was read so far, B together; rows of fewer columns end where the longest end.
    room: columns that it can hold.
    """

    def __init__(self, parts: list[DynamicLayer], room: int) -> None:
        super().__init__()
        self._keys, self.keys = _joined([part.keys for part in parts], room)
        self._values, self.values = _joined([part.values for part in parts], room)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write `[B, heads, N, width]` behind what is there; all keys and values so far."""
        B, begin = self.keys.shape[0], self.keys.shape[2]
        end = begin + key_states.shape[2]
        self.keys, self.values = self._keys[:B, :, :end], self._values[:B, :, :end]
        self.keys[:, :, begin:] = key_states
        self.values[:, :, begin:] = value_states
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row b becomes what row indices[b] was; only rows that change their place are copied."""
        spots = torch.arange(len(indices), device=indices.device)
        to = spots[indices != spots]
        count, columns = len(indices), self.keys.shape[2]
        for states in (self.keys, self.values):
            states[to] = states[indices[to]]
        self.keys = self._keys[:count, :, :columns]
        self.values = self._values[:count, :, :columns]


def _joined(parts: list[Tensor], room: int) -> tuple[Tensor, Tensor]:
    """A buffer of `room` columns, and the view of it that holds the parts, aligned on the right."""
    rows, columns = sum(len(part) for part in parts), max(part.shape[2] for part in parts)
    heads, width = parts[0].shape[1], parts[0].shape[3]
    # zeros: what is masked must still be finite, because attention multiplies it by 0
    buffer = parts[0].new_zeros(rows, heads, room, width)
    first = 0
    for part in parts:
        buffer[first : first + len(part), :, columns - part.shape[2] : columns] = part
        first += len(part)
    return buffer, buffer[:, :, :columns]


def holds_plain_states(config: PretrainedConfig) -> bool:
    """Whether every layer keeps keys and values of all tokens: no sliding windows, no states of linear
    attention, which InPlaceLayer cannot hold."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def join(parts: list[DynamicCache], room: int) -> DynamicCache:
    """The rows of all parts in one cache that can hold `room` columns; the parts are empty afterwards."""
    layers = []
    for number in range(len(parts[0].layers)):
        here = [part.layers[number] for part in parts]
        layers.append(InPlaceLayer(here, room))
        # layer by layer, so that the keys and values are never in memory twice
        for layer in here:
            layer.reset()
    joined = DynamicCache()
    joined.layers = layers
    return joined
