"""Our decode loop: left-padded, finished rows dropped, random numbers fixed per row.

Shapes: B rows, P prompt tokens, V vocabulary. Each row draws from its own counter-based stream, so
what a row becomes does not depend on the rows that happen to share its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

# compacting the cache copies it: worth it once a quarter of the rows is done (measured 1.6-1.7x)
_LIVE_FRACTION = 0.75


@dataclass(frozen=True)
class Generated:
    """tokens: the response, with the end token if it ended by itself. logprobs: one per token,
    of the sampling distribution at the given temperature (before top-p)."""

    tokens: list[int]
    logprobs: list[float]
    ended: bool


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    seeds: list[int],
    *,
    eos_id: int,
    pad_id: int,
    max_response_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    rows_at_once: int = 128,
) -> list[Generated]:
    """Sample one response for each prompt; results in the order of `prompts`.

    seeds: one per prompt; the same seed, prompt and weights give the same response.
    temperature 0 takes the most probable token.
    """
    # equal lengths together: less padding
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    results: list[Generated | None] = [None] * len(prompts)
    was_training = model.training
    model.eval()
    for at in range(0, len(order), rows_at_once):
        rows = order[at : at + rows_at_once]
        batch = _decode(
            model,
            [prompts[i] for i in rows],
            _uniforms([seeds[i] for i in rows], max_response_tokens),
            eos_id,
            pad_id,
            temperature,
            top_p,
        )
        for i, generated in zip(rows, batch, strict=True):
            results[i] = generated
    model.train(was_training)
    return [generated for generated in results if generated is not None]


def _uniforms(seeds: list[int], count: int) -> Tensor:
    """`[B, count]` numbers in [0, 1): row b is the stream of seeds[b]."""
    rng = torch.Generator()
    return torch.stack(
        [torch.rand(count, generator=rng.manual_seed(seed), dtype=torch.float64) for seed in seeds]
    )


def _decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    uniforms_BN: Tensor,
    eos_id: int,
    pad_id: int,
    temperature: float,
    top_p: float,
) -> list[Generated]:
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.tensor(
        [[pad_id] * (width - len(p)) + p for p in prompts], dtype=torch.long, device=device
    )
    # from lengths, not from ids != pad: a prompt may hold the pad token
    mask_BT = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], dtype=torch.long, device=device
    )
    position_B1 = mask_BT.sum(-1, keepdim=True)
    # explicit positions: without them GPT-2 is wrong by nats under left padding (RoPE hides it)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    uniforms_BN = uniforms_BN.to(device)
    cache = DynamicCache(config=model.config)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    live = list(range(len(prompts)))  # rows of the batch -> position in `prompts`
    running = [True] * len(prompts)
    for step in range(uniforms_BN.shape[1]):
        output = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen_B, logprobs_B = _choose(
            output.logits[:, -1], uniforms_BN[:, step], temperature, top_p
        )
        for row, (token, logprob) in enumerate(
            zip(chosen_B.tolist(), logprobs_B.tolist(), strict=True)
        ):
            if running[live[row]]:
                tokens[live[row]].append(token)
                logprobs[live[row]].append(logprob)
                running[live[row]] = token != eos_id
        alive = [row for row in range(len(live)) if running[live[row]]]
        if not alive:
            break
        ids_BT, positions_BT = chosen_B.unsqueeze(-1), position_B1
        mask_BT = torch.cat([mask_BT, torch.ones_like(position_B1)], dim=-1)
        position_B1 = position_B1 + 1
        if len(alive) <= _LIVE_FRACTION * len(live):
            keep = torch.tensor(alive, device=device)
            cache.batch_select_indices(keep)
            ids_BT, positions_BT, mask_BT = ids_BT[keep], positions_BT[keep], mask_BT[keep]
            position_B1, uniforms_BN = position_B1[keep], uniforms_BN[keep]
            live = [live[row] for row in alive]
    return [
        Generated(ids, values, bool(ids) and ids[-1] == eos_id)
        for ids, values in zip(tokens, logprobs, strict=True)
    ]


def _choose(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """A token for each row by inverting the cumulative distribution, and its logprob."""
    logits_BV = logits_BV.float()
    if temperature == 0:
        logprobs_BV = logits_BV.log_softmax(-1)
        chosen_B = logits_BV.argmax(-1)
        return chosen_B, logprobs_BV.gather(-1, chosen_B.unsqueeze(-1)).squeeze(-1)
    logprobs_BV = (logits_BV / temperature).log_softmax(-1)
    # float64: in float32 the sum over 50,000 tokens is off by more than the rarest token
    probs_BV = logprobs_BV.double().exp()
    if top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        sorted_BV = sorted_BV.masked_fill(before_BV >= top_p, 0.0)
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV)
    cumulative_BV = probs_BV.cumsum(-1)
    target_B1 = (uniform_B * cumulative_BV[:, -1]).unsqueeze(-1)
    chosen_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    chosen_B1 = chosen_B1.clamp(max=logits_BV.shape[-1] - 1)
    return chosen_B1.squeeze(-1), logprobs_BV.gather(-1, chosen_B1).squeeze(-1)
