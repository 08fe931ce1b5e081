"""pretrain, pretrain_bf16: a step of our pretraining loop against a bare loop in the style of nanoGPT.

    python -m tests.benchmarks.pretrain [--precision bf16] [--isolate]

The bare loop is what remains when nothing is checked, logged or evaluated: forward, backward, clip,
fused AdamW, always in fp32. Both train the same Llama on the same 8 rows of 256 tokens a step. Ours
runs with the stage's own loop object, log and heartbeat included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.job import Job, Out
from pipeline.settings import Settings
from stages import pretrain
from stages import tokenizer as tokenizer_stage
from stages.common import start
from stages.packing import PackedRows
from tests.benchmarks import common, limits, workload

_ROWS, _LENGTH, _STEPS = 8, 256, 2
_DOCUMENT = 180


def _tokens(count: int, end_id: int) -> np.ndarray[Any, Any]:
    """Random words in documents of 180 tokens."""
    tokens = np.random.default_rng(0).integers(5, workload.VOCABULARY - 1, count)
    tokens[_DOCUMENT - 1 :: _DOCUMENT] = end_id
    return tokens.astype("<u2")


def _tokenizer() -> PreTrainedTokenizerBase:
    words = (f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{i}" for i in range(400))
    return tokenizer_stage.train(words, workload.VOCABULARY, 1)


def ours(precision: str, isolate: bool) -> common.Side:
    def side() -> common.Step:
        folder = Path(tempfile.mkdtemp(prefix="pretrain_benchmark"))
        tokenizer = _tokenizer()
        tokens = _tokens(_ROWS * _LENGTH * 64, tokenizer.eos_token_id)
        tokens.tofile(folder / "train.bin")
        meta = {"tokens": len(tokens), "documents": 1, "text_bytes": 1, "dtype": "<u2"}
        (folder / "packed.json").write_text(json.dumps({"train": meta, "heldout": meta}))
        rows = PackedRows(folder, "train", _LENGTH)
        settings = Settings.model_validate(
            {
                "model": {"precision": precision},
                "pretrain": {
                    "data": str(folder),
                    "steps": 10**6,
                    "sequence_length": _LENGTH,
                    "minibatch_rows": _ROWS,
                    "isolate_documents": isolate,
                    "eval_every_steps": 10**6,
                    "checkpoint_every_steps": 10**6,
                },
            }
        )
        job = Job("pretrain", "pretrain", "stages.pretrain", 1, "", folder, folder, {}, {}, {})
        out = Out(job)
        accelerator = start(settings, out)
        model = workload.small_llama()
        loop = pretrain.Loop(settings, model, tokenizer, (rows, rows), accelerator, out)
        loop.start()

        def step() -> None:
            for _ in range(_STEPS):
                loop.advance()

        return step

    return side


def peer() -> common.Step:
    tokens = _tokens(_ROWS * _LENGTH * 64, 2).astype(np.int64)
    model = workload.small_llama().train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    rng = np.random.default_rng(1)

    def step() -> None:
        for _ in range(_STEPS):
            starts = rng.integers(0, len(tokens) - _LENGTH, _ROWS)
            rows_BT = torch.from_numpy(np.stack([tokens[at : at + _LENGTH + 1] for at in starts]))
            logits_BTV = model(input_ids=rows_BT[:, :-1], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), rows_BT[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()

    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--isolate", action="store_true", help="documents do not see one another")
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    common.compare(
        "pretrain" if given.precision == "fp32" else f"pretrain_{given.precision}",
        ours(given.precision, given.isolate),
        peer,
        # backward is twice the forward: the gradients of weights and of inputs
        floor_flops=3 * _STEPS * limits.forward_flops(workload.small_llama(), [_LENGTH] * _ROWS),
        repeats=given.repeats,
        precision=given.precision,
    )
