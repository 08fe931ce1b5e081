"""rollout: our decode loop against `generate` of transformers, 64 prompts, mixed lengths up to 64.

    python -m tests.benchmarks.rollout

Both sample at temperature 1 without top-p, from the same weights and prompts, responses of the same
prescribed lengths. Ours also hands back the logprobs of the tokens; `generate` is not asked for them.
"""

from __future__ import annotations

import argparse

import torch

from stages.generation import generate
from tests.benchmarks import common, limits, workload
from tests.benchmarks.workload import EOS, MAX_RESPONSE, PAD

_ROWS = 64
_PROMPTS = workload.prompts(_ROWS)
_LENGTHS = workload.response_lengths(_ROWS)


def ours() -> common.Step:
    model = workload.small_llama()
    lengths = dict(enumerate(_LENGTHS))

    def step() -> None:
        with workload.prescribed(lengths):
            found = generate(
                model,
                _PROMPTS,
                list(range(_ROWS)),
                eos_id=EOS,
                pad_id=PAD,
                max_response_tokens=MAX_RESPONSE,
            )
        assert [len(g.tokens) for g in found] == _LENGTHS

    return step


def peer() -> common.Step:
    model = workload.small_llama()
    width = max(len(prompt) for prompt in _PROMPTS)
    ids_BP = torch.tensor([[PAD] * (width - len(p)) + p for p in _PROMPTS])
    lengths = workload.PrescribedLengths(_LENGTHS, width)

    def step() -> None:
        found = model.generate(
            ids_BP,
            attention_mask=(ids_BP != PAD).long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_RESPONSE,
            logits_processor=[lengths],
        )
        responses_BR = found[:, width:]
        assert ((responses_BR == EOS).int().argmax(-1) + 1 == torch.tensor(_LENGTHS)).all()

    return step


def floor_flops() -> float:
    """Every prompt read once and every response token but the last fed once; one head a token."""
    lengths = [len(p) + n - 1 for p, n in zip(_PROMPTS, _LENGTHS, strict=True)]
    return limits.forward_flops(workload.small_llama(), lengths, sum(_LENGTHS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=11)
    repeats = parser.parse_args().repeats
    common.compare("rollout", ours, peer, floor_flops=floor_flops(), repeats=repeats)
