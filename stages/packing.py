"""Documents as one long memory-mapped array of tokens, and rows of it without padding.

Documents follow each other with an end token behind each and are cut into rows wherever a row is
full: a row may hold several documents. Whether attention sees across them is the stage's choice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline import worker
from pipeline.errors import Stopped
from pipeline.files import replace_durably
from pipeline.job import Input, Out
from pipeline.records import canonical_json
from pipeline.settings.pretrain import PretrainSettings
from stages.data import is_heldout, read_texts

PARTS = ("train", "heldout")
_DOCUMENTS_AT_ONCE = 256


def pack_sources(
    item: Input,
    own: PretrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    key: str,
    out: Out,
) -> dict[str, int]:
    """Tokenise a step's text into `folder`, once; by reason, how many documents were left out.

    key: the setting that names the text. A resumed step finds the files, and the counts, again.

    Raises:
        DataError: more unusable rows than `pretrain.max_bad_fraction`.
        Stopped: a signal came.
    """
    texts, tally = read_texts(item.sources, own.text_field, own.max_documents)
    counts = folder / "dropped.json"

    def checked() -> Iterator[str]:
        for text in texts:
            if worker.stop_requested():
                raise Stopped(f"{out.step}: stopped by a signal while reading the text")
            yield text
        # before the files count as whole: a second start does not read the texts again
        tally.check(key, own.max_bad_fraction)
        counts.write_text(canonical_json(dict(tally.reasons)), encoding="utf-8")

    done = pack_documents(checked(), tokenizer, folder, own.heldout_fraction, out.progress)
    if done is not None:
        out.say(f"text: {tally.summary()}")
    # none where the text was packed before these counts were kept
    dropped: dict[str, int] = (
        json.loads(counts.read_text(encoding="utf-8")) if counts.exists() else {}
    )
    return dropped


def pack_documents(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    heldout_fraction: float,
    progress: Callable[[int, int, str], Any] | None = None,
) -> dict[str, dict[str, Any]] | None:
    """Write the documents as tokens, `train` and `heldout` apart, once; on one rank.

    Returns the counts of both parts (documents, text_bytes, tokens), or None where the files were
    there already: then `texts` is not read at all.
    """
    done = folder / "packed.json"
    if done.exists():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
    counts: dict[str, dict[str, Any]] = {
        part: {"documents": 0, "text_bytes": 0, "tokens": 0, "dtype": dtype.str} for part in PARTS
    }
    with ExitStack() as stack:
        files = {part: stack.enter_context((folder / f"{part}.bin").open("wb")) for part in PARTS}
        for number, (text, ids) in enumerate(_encoded(texts, tokenizer), 1):
            part = "heldout" if is_heldout(text, heldout_fraction) else "train"
            files[part].write(np.asarray(ids, dtype=dtype).tobytes())
            counts[part]["documents"] += 1
            counts[part]["text_bytes"] += len(text.encode())
            counts[part]["tokens"] += len(ids)
            # how many there will be is not known before the last one
            if progress is not None and number % _DOCUMENTS_AT_ONCE == 0:
                progress(number, number + 1, "document")
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    # written last: its presence means that both parts are whole
    temporary = done.with_suffix(".tmp")
    temporary.write_text(canonical_json(counts), encoding="utf-8")
    replace_durably(temporary, done)
    return counts


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
    """Rows of `length` tokens of one part; what does not fill a row at the end is `left_over`."""

    def __init__(self, folder: Path, part: str, length: int) -> None:
        meta = json.loads((folder / "packed.json").read_text(encoding="utf-8"))[part]
        self.tokens: np.ndarray[Any, Any] = np.zeros(0, dtype=meta["dtype"])
        # an empty file cannot be mapped
        if meta["tokens"]:
            self.tokens = np.memmap(folder / f"{part}.bin", dtype=meta["dtype"], mode="r")
        assert len(self.tokens) == meta["tokens"], (folder, part)
        self.length = length
        self.documents: int = meta["documents"]
        self.left_over = len(self.tokens) % length
        self.bytes_per_token: float = meta["text_bytes"] / max(1, meta["tokens"])

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def rows(self, picked: list[int]) -> Tensor:
        """Rows by number, as `[B, T]`."""
        assert all(0 <= row < len(self) for row in picked), picked
        parts = [self.tokens[row * self.length : (row + 1) * self.length] for row in picked]
        return torch.from_numpy(np.stack(parts).astype(np.int64))
