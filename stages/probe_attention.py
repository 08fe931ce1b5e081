"""What each head of a decoder looks at, from the queries and keys that the model itself made.

transformers lets a function of ours compute the attention (`AttentionInterface`): it is handed query
and key behind the projections and the rotary turn, just as the model uses them, whatever the
architecture. Vaswani et al., arXiv 1706.03762, eq. 1: softmax(q k / sqrt(d)); grouped keys: Ainslie et
al., arXiv 2305.13245; rotary positions: Su et al., arXiv 2104.09864.

Shapes: T tokens, A heads, G groups of heads with keys of their own, D numbers of a head.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "prefline_probe"
# of longer texts nobody can see a heat map, and it would fill the memory
MAX_TOKENS = 256
_CLOSED = -1e9


class Layer(NamedTuple):
    """Of one attention layer: query `[A, T, D]`, key `[G, T, D]`, and what is done to their products.

    mask_ATT: added to the products, 0 or hugely negative, the same for all heads (A = 1) or not; None
    adds nothing. softcap: products x become
    softcap * tanh(x / softcap). sinks_A: a further logit of each head that takes weight away (gpt-oss).
    """

    query: Tensor
    key: Tensor
    mask_ATT: Tensor | None
    scaling: float
    softcap: float | None
    sinks_A: Tensor | None


class Attention(NamedTuple):
    """layers: of every attention layer, or none where the model computes attention in its own way;
    then `weights` holds what it says of it, `[A, T, T]` each, or nothing."""

    layers: list[Layer]
    weights: list[Tensor]

    def __len__(self) -> int:
        return len(self.layers) or len(self.weights)

    def weights_of(self, layer: int) -> Tensor:
        """How much each token looks at each other one, `[A, T, T]`: rows are queries and sum to 1."""
        return weights(self.layers[layer]) if self.layers else self.weights[layer]


_recording = threading.local()


def _probe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The attention of transformers' eager code, which keeps what it is made of."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    mask_ATT = None if attention_mask is None else attention_mask[0, ..., : key.shape[-2]]
    if mask_ATT is None and getattr(module, "is_causal", False):
        mask_ATT = torch.full((1, *2 * query.shape[-2:-1]), -math.inf, device=query.device).triu(1)
    sinks_A = None if s_aux is None else s_aux.detach()
    layer = Layer(query[0], key[0], mask_ATT, scale, softcap, sinks_A)
    _recording.layers.append(layer)
    weights_ATT = weights(layer)
    value_ATD = _spread(value[0], weights_ATT.shape[0])
    states_TAD = (weights_ATT @ value_ATD).transpose(0, 1).contiguous()
    return states_TAD.unsqueeze(0), weights_ATT.unsqueeze(0)


ALL_ATTENTION_FUNCTIONS.register(NAME, _probe)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)


@torch.no_grad()
def look(model: PreTrainedModel, ids: list[int]) -> Attention:
    """The attention of every layer over one text.

    The model must not be used by another thread meanwhile: its way of computing attention is changed.
    """
    tokens_1T = torch.tensor([ids], device=model.device)
    _recording.layers = []
    with _computed_by(model, NAME):
        model(input_ids=tokens_1T, use_cache=False)
    layers, _recording.layers = _recording.layers, []
    if layers:
        return Attention(layers, [])
    with _computed_by(model, "eager"):
        try:
            found = model(input_ids=tokens_1T, use_cache=False, output_attentions=True)
        except (TypeError, ValueError):
            return Attention([], [])
    own = [w[0] for w in getattr(found, "attentions", None) or () if w is not None]
    return Attention([], own)


@contextmanager
def _computed_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError):
        # it can only do it in its own way
        yield
        return
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def hardest(found: Attention, at: int) -> tuple[int, int]:
    """(layer, head) that looks hardest from `at` at something further back than the token before it.

    The first token is left out, on which heads rest, and the one before, at which some always look.
    """
    back = slice(1, at - 1 if at > 2 else at)
    if at < 2:
        return 0, 0
    seen_LA = torch.stack([found.weights_of(i)[:, at, back].amax(-1) for i in range(len(found))])
    layer, head = divmod(int(seen_LA.argmax()), seen_LA.shape[1])
    return layer, head


def most_seen(weights_T: Tensor, at: int) -> int:
    """What a token looks at most, apart from the first token and itself where there are others."""
    return 1 + int(weights_T[1:at].argmax()) if at >= 2 else 0


def scores(layer: Layer) -> Tensor:
    """The products of queries and keys as the softmax reads them, `[A, T, T]`."""
    key_ATD = _spread(layer.key, layer.query.shape[0])
    scores_ATT = layer.query @ key_ATD.transpose(-1, -2) * layer.scaling
    if layer.softcap is not None:
        scores_ATT = layer.softcap * torch.tanh(scores_ATT / layer.softcap)
    return scores_ATT if layer.mask_ATT is None else scores_ATT + layer.mask_ATT


def weights(layer: Layer) -> Tensor:
    """softmax of the scores, `[A, T, T]`."""
    scores_ATT = scores(layer).float()
    if layer.sinks_A is not None:
        sinks_AT1 = layer.sinks_A.float().reshape(-1, 1, 1).expand(*scores_ATT.shape[:2], 1)
        return torch.cat([scores_ATT, sinks_AT1], -1).softmax(-1)[..., :-1]
    return scores_ATT.softmax(-1)


def _spread(x_GTD: Tensor, heads: int) -> Tensor:
    """Each group's keys once for each of its heads, `[A, T, D]`."""
    return x_GTD.repeat_interleave(heads // x_GTD.shape[0], dim=0)


def by_hand(layer: Layer, head: int, at: int, to: int) -> dict[str, Any]:
    """How much token `at` looks at token `to` in one head, step by step in plain numbers.

    rows: for each key its product with the query, that times the scaling (and capped), the logit (with
    what a mask adds; None where it hides the key), exp of its difference to the largest, and the
    weight. query, key: of the pair; products: theirs, number by number.
    """
    group = head // (layer.query.shape[0] // layer.key.shape[0])
    query_D = layer.query[head, at].double()
    keys_TD = layer.key[group].double()
    products = [sum((query_D * key_D).tolist()) for key_D in keys_TD]
    scaled = [product * layer.scaling for product in products]
    if layer.softcap is not None:
        cap = layer.softcap
        scaled = [cap * math.tanh(value / cap) for value in scaled]
    added = [0.0] * len(scaled)
    if layer.mask_ATT is not None:
        added = layer.mask_ATT[head % layer.mask_ATT.shape[0], at].tolist()
    # hidden keys have no logit at all: e to the minus a lot is 0
    logits = [
        value + more if more > _CLOSED else None for value, more in zip(scaled, added, strict=True)
    ]
    sink = None if layer.sinks_A is None else float(layer.sinks_A.reshape(-1)[head])
    seen = [value for value in [*logits, sink] if value is not None]
    largest = max(seen)
    exps = [0.0 if value is None else math.exp(value - largest) for value in logits]
    total = sum(exps) + (0.0 if sink is None else math.exp(sink - largest))
    return {
        "rows": [
            {"product": p, "scaled": s, "logit": x, "exp": e, "weight": e / total}
            for p, s, x, e in zip(products, scaled, logits, exps, strict=True)
        ],
        "scaling": layer.scaling,
        "head_size": layer.query.shape[-1],
        "softcap": layer.softcap,
        "sink": sink,
        "group": group,
        "groups": layer.key.shape[0],
        "largest": largest,
        "total": total,
        "query": query_D.tolist(),
        "key": keys_TD[to].tolist(),
        "products": (query_D * keys_TD[to]).tolist(),
    }
