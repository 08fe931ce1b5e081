"""Our decode loop: left-padded, finished rows dropped, random numbers fixed per row.

Shapes: B rows, C columns of the cache (prompt and response), H width, V vocabulary. Each row draws from
its own counter-based stream, so what a row becomes does not depend on the rows that happen to share its
batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from stages.common import micro_batches, pad_left
from stages.kv_cache import holds_plain_states, join

# a cache that is copied whole when a row leaves: worth it once a quarter of them is done
_LIVE_FRACTION = 0.75
# tokens that are summed first when one is drawn: about the root of a large vocabulary
_CHUNK = 256
# prompts read at once: short batches win on a CPU, wide ones on a GPU
_PROMPT_TOKENS = {True: 512, False: 16384}


@dataclass(frozen=True)
class Generated:
    """tokens: the response, with the end token if it ended by itself. logprobs: one per token,
    of the sampling distribution at the given temperature (before top-p). values: one per token, the
    value of the state before it; none without a value head."""

    tokens: list[int]
    logprobs: list[float]
    ended: bool
    values: list[float] = field(default_factory=list)


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
    value_head: nn.Module | None = None,
) -> list[Generated]:
    """Sample one response for each prompt; results in the order of `prompts`.

    seeds: one per prompt; the same seed, prompt and weights give the same response.
    temperature 0 takes the most probable token. value_head: maps what the output head reads, `[B, H]`,
    to values `[B]` or `[B, 1]`: a critic on the policy's own trunk then needs no forward of its own.
    """
    # equal lengths together: less padding
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    results: list[Generated | None] = [None] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for at in range(0, len(order), rows_at_once):
            rows = order[at : at + rows_at_once]
            batch = _decode(
                model,
                [prompts[i] for i in rows],
                uniforms([seeds[i] for i in rows], max_response_tokens),
                eos_id,
                pad_id,
                temperature,
                top_p,
                value_head,
            )
            for i, generated in zip(rows, batch, strict=True):
                results[i] = generated
    finally:
        model.train(was_training)
    return [generated for generated in results if generated is not None]


def uniforms(seeds: list[int], count: int) -> Tensor:
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
    value_head: nn.Module | None,
) -> list[Generated]:
    """One response to each prompt; prompts of similar length stand together."""
    device = model.device
    uniforms_BN = uniforms_BN.to(device)
    steps = uniforms_BN.shape[1]
    in_place = holds_plain_states(model.config)
    logits_BV, values_B, cache = _read_prompts(model, prompts, pad_id, steps, in_place, value_head)
    mask_BC, positions_BC = _padding(prompts, steps, device)
    width = positions_BC.shape[1] - steps
    is_padded = not bool(mask_BC.all())
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    values: list[list[float]] = [[] for _ in prompts]
    live = list(range(len(prompts)))  # rows of the batch -> position in `prompts`
    is_live = [True] * len(prompts)  # the same rows
    for step in range(steps):
        chosen_B, logprobs_B = choose(logits_BV, uniforms_BN[:, step], temperature, top_p)
        known_B = [] if values_B is None else values_B.tolist()
        for row, (token, logprob) in enumerate(
            zip(chosen_B.tolist(), logprobs_B.tolist(), strict=True)
        ):
            if is_live[row]:
                tokens[live[row]].append(token)
                logprobs[live[row]].append(logprob)
                values[live[row]] += known_B[row : row + 1]
                is_live[row] = token != eos_id
        left = sum(is_live)
        if not left or step == steps - 1:
            break
        if left < len(live) and (in_place or left <= _LIVE_FRACTION * len(live)):
            keep = _closed_up(is_live)
            keep_B = torch.tensor(keep, device=device)
            cache.batch_select_indices(keep_B)
            chosen_B, uniforms_BN = chosen_B[keep_B], uniforms_BN[keep_B]
            mask_BC, positions_BC = mask_BC[keep_B], positions_BC[keep_B]
            live, is_live = [live[row] for row in keep], [True] * left
        at = width + step
        logits_BV, values_B = _read(
            model,
            value_head,
            input_ids=chosen_B.unsqueeze(-1),
            # without padding a row sees everything
            attention_mask=mask_BC[:, : at + 1] if is_padded else None,
            position_ids=positions_BC[:, at : at + 1],
            past_key_values=cache,
        )
    return [
        Generated(ids, odds, ids[-1:] == [eos_id], known)
        for ids, odds, known in zip(tokens, logprobs, values, strict=True)
    ]


def _closed_up(is_live: list[bool]) -> list[int]:
    """The live rows, the last ones in the places of the finished ones: few rows have to move."""
    left = sum(is_live)
    movers = (row for row in range(left, len(is_live)) if is_live[row])
    return [row if is_live[row] else next(movers) for row in range(left)]


def _padding(prompts: list[list[int]], steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of left-padded prompts and `steps` tokens behind them: 1 where there is a token, and the position
    in its row, `[B, C]` each."""
    # from lengths, not from ids != pad: a prompt may hold the pad token
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths_B.max())
    # explicit positions: without them GPT-2 is wrong by nats under left padding (RoPE hides it)
    positions_BC = torch.arange(width + steps, device=device) - (width - lengths_B).unsqueeze(-1)
    return (positions_BC >= 0).long(), positions_BC.clamp(min=0)


def _read_prompts(
    model: PreTrainedModel,
    prompts: list[list[int]],
    pad_id: int,
    steps: int,
    in_place: bool,
    value_head: nn.Module | None,
) -> tuple[Tensor, Tensor | None, DynamicCache]:
    """Logits `[B, V]` and values `[B]` behind the prompts, and a cache with room for `steps` tokens."""
    lengths = [len(prompt) for prompt in prompts]
    # caches that cannot be joined are filled in one go, with all the padding
    max_tokens = (
        _PROMPT_TOKENS[model.device.type == "cpu"] if in_place else len(prompts) * max(lengths)
    )
    logits: list[Tensor] = []
    values: list[Tensor] = []
    caches: list[DynamicCache] = []
    for part in micro_batches(lengths, len(prompts), max_tokens):
        ids = [prompts[row] for row in part]
        mask_BP, positions_BP = _padding(ids, 0, model.device)
        caches.append(DynamicCache(config=model.config))
        logits_BV, values_B = _read(
            model,
            value_head,
            input_ids=pad_left(ids, pad_id, model.device),
            attention_mask=mask_BP,
            position_ids=positions_BP,
            past_key_values=caches[-1],
        )
        logits.append(logits_BV)
        values += [] if values_B is None else [values_B]
    cache = join(caches, max(lengths) + steps) if in_place else caches[0]
    return torch.cat(logits), torch.cat(values) if values else None, cache


def _read(
    model: PreTrainedModel, value_head: nn.Module | None, **inputs: Any
) -> tuple[Tensor, Tensor | None]:
    """Logits `[B, V]` of the next token, and the value `[B]` of the state before it."""
    if value_head is None:
        return model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1], None
    states: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: states.append(args[0][:, -1])
    )
    try:
        logits_BV = model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
    finally:
        hook.remove()
    return logits_BV, value_head(states[0]).float().flatten()


def choose(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """A token for each row by inverting the cumulative distribution, and its logprob."""
    logits_BV = logits_BV.float()
    if temperature == 0:
        logprobs_BV = logits_BV.log_softmax(-1)
        chosen_B = logits_BV.argmax(-1)
        return chosen_B, logprobs_BV.gather(-1, chosen_B.unsqueeze(-1)).squeeze(-1)
    logprobs_BV = (logits_BV / temperature).log_softmax(-1)
    probs_BV = logprobs_BV.exp()
    if top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
        before_BV = sorted_BV.cumsum(-1, dtype=torch.float64) - sorted_BV
        sorted_BV = sorted_BV.masked_fill(before_BV >= top_p, 0.0)
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV)
    chosen_B1 = _inverted(probs_BV, uniform_B)
    return chosen_B1.squeeze(-1), logprobs_BV.gather(-1, chosen_B1).squeeze(-1)


def _inverted(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Where the cumulative distribution of these weights first exceeds a number in [0, 1), `[B, 1]`.

    First among chunks, then inside one: a running sum over the whole vocabulary takes as long as a step
    of a small model (measured at 64 x 32768: 49 ms, in chunks 7). Never an entry of weight 0.
    """
    B, V = weights_BV.shape
    weights_BCN = nn.functional.pad(weights_BV, (0, -V % _CHUNK)).view(B, -1, _CHUNK)
    # float64: in float32 a sum over 50,000 tokens is off by more than the rarest token
    chunks_BC = weights_BCN.sum(-1).double().cumsum(-1)
    target_B1 = uniform_B.unsqueeze(-1) * chunks_BC[:, -1:]
    chunk_B1 = _first_above(chunks_BC, target_B1)
    before_BC = nn.functional.pad(chunks_BC, (1, 0))
    here_B1N = weights_BCN.gather(1, chunk_B1.unsqueeze(-1).expand(-1, -1, _CHUNK))
    inside_BN = here_B1N.squeeze(1).double().cumsum(-1)
    spot_B1 = _first_above(inside_BN, target_B1 - before_BC.gather(-1, chunk_B1))
    return (chunk_B1 * _CHUNK + spot_B1).clamp(max=V - 1)


def _first_above(cumulative_BN: Tensor, target_B1: Tensor) -> Tensor:
    """First entry above the target; the last one that adds anything where rounding left none."""
    target_B1 = torch.minimum(target_B1, cumulative_BN[:, -1:] * (1 - 2**-50))
    found_B1 = torch.searchsorted(cumulative_BN, target_B1, right=True)
    return found_B1.clamp(max=cumulative_BN.shape[-1] - 1)
