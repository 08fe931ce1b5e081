"""scale: what a token costs as batch, length, vocabulary and model grow. A table, no peer, no ratio.

    python -m tests.benchmarks.scale

One thing grows at a time, from the Llama of the other benchmarks. Columns are CPU-microseconds of one
thread for each real token: decode (a response token, prompts read included), score (logprobs of prompt
and response without a gradient), train (the same with backward) and pretrain. In brackets, the share of
the measured fp32 matmul peak that is useful work: where it falls as something grows, there is a cliff.
Vocabulary and model may raise the microseconds, as they raise the work, but not lower the share.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaForCausalLM

from stages.generation import generate
from stages.rollout import Sequences, in_micro_batches, make_sequences, response_logprobs
from tests.benchmarks import common, limits, workload
from tests.benchmarks.workload import BOS, PAD


@dataclass(frozen=True)
class Size:
    rows: int = 32
    longest: int = 64  # tokens of the longest response; the longest prompt has half as many
    vocabulary: int = 2048
    width: int = 256
    layers: int = 8


_START = Size()
_GROWTH: dict[str, tuple[Size, ...]] = {
    "batch": tuple(replace(_START, rows=rows) for rows in (1, 8, 32, 128)),
    "length": tuple(replace(_START, rows=16, longest=n) for n in (32, 64, 128, 256)),
    "vocabulary": tuple(replace(_START, vocabulary=V) for V in (2048, 8192, 32768)),
    "model": tuple(
        replace(_START, rows=16, width=width, layers=layers)
        for width, layers in ((64, 2), (128, 4), (256, 8), (512, 8))
    ),
}


def measure(size: Size, peak: float, repeats: int) -> tuple[str, ...]:
    """CPU-microseconds a token, and the share of the peak, of decode, score, train and pretrain."""
    end = size.vocabulary - 1
    model = _llama(size)
    prompts = workload.prompts(size.rows, max(2, size.longest // 2))
    lengths = workload.response_lengths(size.rows, size.longest)
    responses = [[BOS] * (length - 1) + [end] for length in lengths]
    batch = make_sequences(prompts, responses, PAD, torch.device("cpu"))
    whole = [len(p) + n for p, n in zip(prompts, lengths, strict=True)]
    fed = sum(lengths)

    def decode() -> None:
        with workload.prescribed(dict(enumerate(lengths))):
            found = generate(
                model,
                prompts,
                list(range(size.rows)),
                eos_id=end,
                pad_id=PAD,
                max_response_tokens=size.longest,
            )
        assert [len(g.tokens) for g in found] == lengths

    rows_BT = torch.randint(2, end, (size.rows, size.longest))

    def pretrain() -> None:
        model(input_ids=rows_BT, labels=rows_BT, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    once = [n - 1 for n in whole]
    scoring = limits.forward_flops(model, once, fed)
    pretraining = 3 * limits.forward_flops(model, [size.longest] * size.rows)
    parts = (
        (decode, scoring, fed),
        (lambda: _score(model, batch, whole, backward=False), scoring, sum(whole)),
        (lambda: _score(model, batch, whole, backward=True), 3 * scoring, sum(whole)),
        (pretrain, pretraining, rows_BT.numel()),
    )
    cells = []
    for step, flops, tokens in parts:
        seconds = _best(step, repeats)
        cells.append(f"{1e6 * seconds / tokens:.0f} ({flops / seconds / peak:.0%})")
    return tuple(cells)


def _score(model: LlamaForCausalLM, batch: Sequences, lengths: list[int], backward: bool) -> None:
    for rows in in_micro_batches(lengths, 64, torch.device("cpu")):
        with torch.set_grad_enabled(backward):
            part = batch.rows(rows)
            logprobs_BR, _ = response_logprobs(model, part, 1.0)
            if backward:
                logprobs_BR[part.valid_BR].sum().backward()
    model.zero_grad(set_to_none=True)


def _llama(size: Size) -> LlamaForCausalLM:
    shape: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": round(size.width * 8 / 3 / 32) * 32,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 32,
    }
    return workload.small_llama(**shape)


def _best(step: Any, repeats: int) -> float:
    step()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=list(_GROWTH))
    given = parser.parse_args()
    torch.set_num_threads(1)
    peak = limits.matmul_peak("fp32")
    print(f"scale: CPU-microseconds a token, 1 thread, on {limits.machine()}")
    print(f"versions: {limits.versions()}")
    print(
        f"fp32 matmul peak, 1 thread: {peak / 1e9:.0f} GFLOP/s; in brackets the useful share of it\n"
    )
    rows = []
    for what, sizes in _GROWTH.items():
        if given.only in (None, what):
            for size in sizes:
                shape = f"{size.rows} x {size.longest}, V {size.vocabulary}, {size.layers} x {size.width}"
                rows.append((what, shape, *measure(size, peak, given.repeats)))
    print(common.table(("grows", "rows x longest, vocabulary, model", *_PARTS), rows))
    print(f"\npeak RSS {common.peak_rss():.0f} MB")


_PARTS = ("decode", "score", "train", "pretrain")

if __name__ == "__main__":
    main()
