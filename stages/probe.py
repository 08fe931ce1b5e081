"""Looking into a language model: its tokens, odds, losses and neighbours; pure functions.

Shapes: T tokens of one text, V vocabulary, H hidden width. All numbers are float32 and in nats.
Attention is in `probe_attention.py`, what PPO sees of a response in `probe_policy.py`.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 1024


# ---- tokens --------------------------------------------------------------------------------


class Vocabulary:
    """The tokens of a tokenizer as bytes, and the merges that make them where it is a BPE."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        self.kind: str = whole["model"].get("type") or "BPE"
        self._special = {row["id"] for row in whole.get("added_tokens", [])}
        # said in either place, alone or as a part of a sequence
        steps = json.dumps([whole.get("pre_tokenizer"), whole.get("decoder")])
        self._byte_of = _byte_alphabet() if '"ByteLevel"' in steps else None
        self._byte_fallback = bool(whole["model"].get("byte_fallback"))
        self.ranks = _merge_ranks(whole["model"])

    def piece(self, token: int) -> str:
        """The token as it stands in the vocabulary."""
        found = self.tokenizer.convert_ids_to_tokens(token)
        return found if isinstance(found, str) else f"(no token {token})"

    def raw(self, token: int) -> bytes:
        """The bytes of text that a token stands for."""
        piece = self.piece(token)
        return piece.encode("utf-8", "replace") if token in self._special else self._bytes(piece)

    def text(self, token: int) -> str:
        """The token as text; a part of a character is U+FFFD."""
        return self.raw(token).decode("utf-8", "replace")

    def describe(self, token: int) -> dict[str, Any]:
        """id, piece, text, bytes (hex) and whether it is a control token."""
        return {
            "id": token,
            "piece": self.piece(token),
            "text": self.text(token),
            "bytes": self.raw(token).hex(" "),
            "special": token in self._special,
        }

    def merges(self, token: int) -> dict[str, Any]:
        """How the token is put together: steps of texts, each with the rank of the merge that it took.

        `why` says in words why there are none.
        """
        piece = self.piece(token)
        if token in self._special:
            return {"steps": [], "why": "a control token is in the vocabulary as a whole"}
        if self.ranks is None:
            return {"steps": [], "why": f"a {self.kind} tokenizer does not merge"}
        if piece.startswith("<0x") and self._byte_fallback:
            return {"steps": [], "why": "a single byte that no other token covers"}
        states, ranks = merge_steps(piece, self.ranks)
        steps = [
            {"parts": [self._shown(part) for part in parts], "rank": rank}
            for parts, rank in zip(states, [None, *ranks], strict=True)
        ]
        why = "" if len(states[-1]) == 1 else "no merges lead to it: it was put in as a whole"
        return {"steps": steps, "why": why if len(piece) > 1 else "a single byte or character"}

    def _bytes(self, piece: str) -> bytes:
        if self._byte_of is not None and all(sign in self._byte_of for sign in piece):
            return bytes(self._byte_of[sign] for sign in piece)
        if self._byte_fallback and piece.startswith("<0x") and len(piece) == 6:
            return bytes([int(piece[3:5], 16)])
        text = piece.removeprefix("##") if self.kind == "WordPiece" else piece
        return text.replace("\u2581", " ").encode("utf-8", "replace")

    def _shown(self, part: str) -> str:
        raw = self._bytes(part)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw.hex(" ")


def merge_steps(piece: str, ranks: dict[tuple[str, str], int]) -> tuple[list[list[str]], list[int]]:
    """Byte-pair encoding of one piece (Sennrich et al., arXiv 1508.07909): all states, and the merges.

    The pair of the lowest rank is merged first, the leftmost of equal ones. What this gives for a token
    alone is what happened inside of a longer word: a merge is never undone, so none crossed its border.
    """
    parts = list(piece)
    states, used = [parts], []
    while len(parts) > 1:
        pairs = [ranks.get(pair, math.inf) for pair in itertools.pairwise(parts)]
        best = min(pairs)
        if best == math.inf:
            break
        at = pairs.index(best)
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]
        states.append(parts)
        used.append(int(best))
    return states, used


def _merge_ranks(model: dict[str, Any]) -> dict[tuple[str, str], int] | None:
    if model.get("merges") is None:
        return None
    # older files hold "a b", newer ones ["a", "b"]
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return {(left, right): rank for rank, (left, right) in enumerate(pairs)}


def _byte_alphabet() -> dict[str, int]:
    """Sign -> byte of byte-level BPE (GPT-2): printable Latin-1 stands for itself, the other bytes for
    the signs from U+0100 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    signs = {chr(byte): byte for byte in plain}
    return signs | {chr(0x100 + i): byte for i, byte in enumerate(others)}


# ---- odds ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shaping:
    """What is done to the odds before a token is drawn, in this order: repetition_penalty (CTRL, arXiv
    1909.05858; 1 is none), temperature (0 takes the most probable), top_k (0 is none), top_p (Holtzman
    et al., arXiv 1904.09751; 1 is none)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def penalised(logits_V: Tensor, seen: list[int], penalty: float) -> Tensor:
    """Logits of tokens that were seen divided by `penalty`, or multiplied where they are negative."""
    if penalty == 1 or not seen:
        return logits_V
    at = torch.tensor(sorted(set(seen)), device=logits_V.device)
    known = logits_V[at]
    return logits_V.index_copy(0, at, torch.where(known > 0, known / penalty, known * penalty))


def top_k_only(logits_V: Tensor, top_k: int) -> Tensor:
    """-inf outside of the `top_k` largest; equal ones at the border all stay. 0 keeps all."""
    if top_k <= 0 or top_k >= logits_V.shape[-1]:
        return logits_V
    border = logits_V.topk(top_k).values[-1]
    return logits_V.masked_fill(logits_V < border, -math.inf)


def odds(logits_V: Tensor, seen: list[int], shaping: Shaping, count: int = 20) -> dict[str, Any]:
    """The next token's distribution before and after shaping, for the `count` most probable ones.

    rows: id, logit, before (softmax of the logits), tempered (after penalty and temperature), after
    (what is drawn from), cut (`top-k`, `top-p` or null). kept: tokens that can be drawn. cut_mass: of
    the tempered distribution. entropy in nats before and after.
    """
    logits_V = logits_V.float()
    before_V = logits_V.softmax(-1)
    scores_V = penalised(logits_V, seen, shaping.repetition_penalty)
    if shaping.temperature == 0:
        tempered_V = torch.zeros_like(before_V).index_fill(0, scores_V.argmax(), 1.0)
    else:
        tempered_V = (scores_V / shaping.temperature).softmax(-1)
    in_k_V = top_k_only(scores_V, shaping.top_k) > -math.inf
    after_V = torch.where(in_k_V, tempered_V, 0.0)
    after_V = after_V / after_V.sum()
    in_p_V = in_k_V & in_nucleus(after_V, shaping.top_p)
    after_V = torch.where(in_p_V, after_V, 0.0)
    after_V = after_V / after_V.sum()
    top = before_V.topk(min(count, len(before_V))).indices
    rows = [
        {
            "id": int(i),
            "logit": float(logits_V[i]),
            "before": float(before_V[i]),
            "tempered": float(tempered_V[i]),
            "after": float(after_V[i]),
            "cut": None if in_p_V[i] else "top-p" if in_k_V[i] else "top-k",
        }
        for i in top.tolist()
    ]
    return {
        "rows": rows,
        "vocabulary": len(before_V),
        "kept": int((after_V > 0).sum()),
        "cut_mass": float(tempered_V[~in_p_V].sum()),
        "rest": float(1 - before_V[top].sum()),
        "entropy_before": _entropy(before_V),
        "entropy_after": _entropy(after_V),
    }


def in_nucleus(probs_V: Tensor, top_p: float) -> Tensor:
    """True on the most probable tokens up to the one with which their sum reaches `top_p`."""
    if top_p >= 1:
        return torch.ones_like(probs_V, dtype=torch.bool)
    sorted_V, order_V = probs_V.sort(-1, descending=True)
    before_V = sorted_V.cumsum(-1, dtype=torch.float64) - sorted_V
    return torch.zeros_like(probs_V, dtype=torch.bool).scatter(-1, order_V, before_V < top_p)


def _entropy(probs_V: Tensor) -> float:
    return float(-torch.xlogy(probs_V, probs_V).sum())


# ---- losses and neighbours -----------------------------------------------------------------


def losses(logits_TV: Tensor, ids: list[int], raw_bytes: list[int]) -> dict[str, Any]:
    """-log p of each token given those before it; the first has none.

    raw_bytes: how many bytes each token stands for. rows: loss, rank of the token among all (1: it was
    the most probable), guess (the most probable one) and its probability. bits_per_byte counts the
    bytes of the tokens that have a loss.
    """
    rows: list[dict[str, Any]] = [{"loss": None, "rank": None, "guess": None, "guess_prob": None}]
    logprobs_TV = logits_TV[:-1].float().log_softmax(-1)
    for logprobs_V, token in zip(logprobs_TV, ids[1:], strict=True):
        own = logprobs_V[token]
        guess = int(logprobs_V.argmax())
        rows.append(
            {
                "loss": float(-own),
                "rank": 1 + int((logprobs_V > own).sum()),
                "guess": guess,
                "guess_prob": float(logprobs_V[guess].exp()),
            }
        )
    total = sum(row["loss"] for row in rows[1:])
    count, size = len(rows) - 1, sum(raw_bytes[1:])
    return {
        "rows": rows,
        "total": total,
        "mean": total / count if count else None,
        "perplexity": math.exp(min(700.0, total / count)) if count else None,
        "bits_per_byte": total / math.log(2) / size if size else None,
        "uniform": math.log(logits_TV.shape[-1]),
    }


def neighbours(embeddings_VH: Tensor, token: int, count: int = 15) -> list[tuple[int, float]]:
    """The tokens whose embedding points most nearly the same way: (id, cosine), the nearest first."""
    own_H = embeddings_VH[token].float()
    norms_V = embeddings_VH.float().norm(dim=-1)
    cosine_V = (embeddings_VH.float() @ own_H) / (norms_V * own_H.norm()).clamp(min=1e-12)
    cosine_V[token] = -math.inf
    best = cosine_V.topk(min(count, len(cosine_V) - 1))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits `[T, V]` of one text."""
    tokens_1T = torch.tensor([ids], device=model.device)
    found: Tensor = model(input_ids=tokens_1T, use_cache=False).logits[0]
    return found


def shape_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a reader wants to know of a model first: its kind and sizes."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    embeddings: Any = model.get_input_embeddings()
    return {
        "architecture": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": getattr(config, "num_hidden_layers", None),
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "hidden_size": getattr(config, "hidden_size", None),
        "positions": getattr(config, "max_position_embeddings", None),
        "vocabulary": len(embeddings.weight),
    }
