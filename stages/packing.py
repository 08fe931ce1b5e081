"""Documents as one long memory-mapped array of tokens, and rows of it without padding.

Documents follow each other with an end token between them and are cut into rows wherever a row is
full, as in GPT-2 and GPT-3: a row may hold several documents and attention sees across them; the end
token tells the model that what came before does not matter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.records import canonical_json

_DOCUMENTS_AT_ONCE = 256

Tokens = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]


class TokenFile(NamedTuple):
    """tokens: all documents, memory-mapped. text_bytes: UTF-8 bytes of the text behind them."""

    tokens: Tokens
    documents: int
    text_bytes: int


def tokenise_documents(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, folder: Path, name: str = "tokens"
) -> TokenFile:
    """Write the documents as tokens under `folder` once; a finished file is used as it is.

    `texts` is not read at all when the file is already there. Call it on one rank.
    """
    meta_path = folder / f"{name}.json"
    if not meta_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32).newbyteorder("<")
        temporary = folder / f"{name}.bin.tmp"
        counts = {"documents": 0, "text_bytes": 0, "tokens": 0}
        with temporary.open("wb") as file:
            for text, ids in _encoded(texts, tokenizer):
                file.write(np.asarray(ids, dtype=dtype).tobytes())
                counts["documents"] += 1
                counts["text_bytes"] += len(text.encode())
                counts["tokens"] += len(ids)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / f"{name}.bin")
        # written last: its presence means that the tokens are whole
        meta_tmp = folder / f"{name}.json.tmp"
        meta_tmp.write_text(canonical_json({**counts, "dtype": dtype.str}), encoding="utf-8")
        os.replace(meta_tmp, meta_path)
    return open_tokens(folder, name)


def open_tokens(folder: Path, name: str = "tokens") -> TokenFile:
    """What `tokenise_documents` wrote; for the other ranks."""
    meta = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    dtype = np.dtype(meta["dtype"])
    if meta["tokens"] == 0:
        return TokenFile(np.zeros(0, dtype), 0, 0)
    tokens = np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r")
    if len(tokens) != meta["tokens"]:
        raise DataError(f"{folder}/{name}.bin has {len(tokens)} tokens instead of {meta['tokens']}")
    return TokenFile(tokens, meta["documents"], meta["text_bytes"])


def _encoded(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, list[int]]]:
    """Each text and its ids: begin token where the tokenizer writes one, end token always."""
    # encoders (BERT) have a separator in place of an end token
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    source = iter(texts)
    while part := list(islice(source, _DOCUMENTS_AT_ONCE)):
        encoded = tokenizer(part, split_special_tokens=True, return_attention_mask=False)
        for text, ids in zip(part, encoded["input_ids"], strict=True):
            yield text, ids if ids and ids[-1] == end else [*ids, end]


class PackedRows:
    """Rows of `length` + 1 tokens: `row[:-1]` is read, `row[1:]` is predicted.

    A row begins with the last token of the one before, so every token but the first is predicted
    exactly once an epoch. `left_over`: tokens at the end that do not fill a row.
    """

    def __init__(self, tokens: Tokens, length: int, what: str = "pretrain.data") -> None:
        self.tokens = tokens
        self.length = length
        count = max(0, len(tokens) - 1) // length
        if count == 0:
            raise DataError(
                f"{what}: {len(tokens)} tokens are not enough for one row of {length}",
                "Give more text or a smaller pretrain.sequence_length.",
            )
        self.left_over = len(tokens) - 1 - count * length
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if not 0 <= row < self._count:
            raise IndexError(row)
        start = row * self.length
        return np.asarray(self.tokens[start : start + self.length + 1], dtype=np.int64)
