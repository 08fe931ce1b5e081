"""Whether training in bf16 is really faster than in fp32 here: asked of the device, not of its data sheet.

    python -m stages.precision WIDTH

Prints {"device": ..., "bf16_speedup": ...}. Some CPUs have bf16 units and some emulate them, and at small
widths the conversions cost more than the units gain.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.attention import use_attention_in_fp32

_ROWS, _TOKENS = 4, 256
_LAYERS = 2
_WIDEST = 1024  # wider ones gain at least as much, and would take long to probe
_REPEATS = 5


def bf16_speedup(width: int, device: torch.device) -> float:
    """fp32 seconds / bf16-autocast seconds of forward and backward of a small Llama.

    width: that of the model to be trained. Both are the best of 5 in turns: other work on the machine
    only ever makes a run slower.
    """
    heads = max(1, min(width, _WIDEST) // 64)
    size = min(width, _WIDEST) // (2 * heads) * 2 * heads
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=size,
            intermediate_size=8 * size // 3,
            num_hidden_layers=_LAYERS,
            num_attention_heads=heads,
        )
    ).to(device)
    tokens_BT = torch.randint(2048, (_ROWS, _TOKENS), device=device)

    # as in training, see common.start
    use_attention_in_fp32(device.type == "cpu")

    def seconds(bf16: bool) -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for bf16 in (False, True):
        seconds(bf16)
    pairs = [(seconds(False), seconds(True)) for _ in range(_REPEATS)]
    return min(fp32 for fp32, _ in pairs) / min(bf16 for _, bf16 in pairs)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speedup = bf16_speedup(int(sys.argv[1]), device)
    print(json.dumps({"device": device.type, "bf16_speedup": round(speedup, 3)}))  # noqa: T201


if __name__ == "__main__":
    main()
