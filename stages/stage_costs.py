"""What the stages up to the rankings take: their own work, measured on a sample, times how often it is
done. `stages.reward_costs` and `stages.policy_costs` have the others.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator

from pipeline import scaling
from pipeline.scaling import Memory
from pipeline.settings.model import LoraSettings
from stages.bench import Bench, StageCost
from stages.common import adamw, clip_gradients
from stages.models import add_lora
from stages.objectives import objective
from stages.probes import DecodeCost, Seconds, decode_cost, measure, now

NO_LORA = LoraSettings()
# measured on one core: 48 rankings in 0.7 s and 950 in 4.3 s, the label store included
_SIMULATED_START, _SIMULATED_RANKING = Seconds(0.5, 0.5, 0.5), Seconds(0.004, 0.004, 0.004)
_SHOWN_ROWS = {"pretrain": (2, 80), "sft": (3, 64)}


def evaluations(steps: int, every: int) -> int:
    """How often a stage looks at held-out data: every so many steps, and at the end."""
    return steps // every + (steps % every > 0)


def mean(values: list[int]) -> float:
    return sum(values) / max(1, len(values))


def storage(bench: Bench, loads: int, saves: int = 1) -> list[tuple[str, float, Seconds]]:
    """Models that a stage reads and writes, each with its tokenizer."""
    load, save = bench.storage()
    return [("model read", loads, load), ("model written", saves, save)]


def tokenizer(bench: Bench) -> StageCost:
    work = bench.work
    return StageCost([("read the text and merge", 1, work.train_tokenizer)])


def pretrain(bench: Bench, decode: DecodeCost | None) -> StageCost:
    own, work, settings = bench.settings.pretrain, bench.work, bench.settings
    model: Any = bench.policy()
    rows_each = own.minibatch_rows // (own.accumulation_steps * bench.processes) or 1
    rows = bench.affordable_rows(rows_each, own.sequence_length)
    learn = objective(own, model, work.tokenizer, 0)
    optimizer = adamw(model, own.lr, own.weight_decay, own.beta2)
    end = work.tokenizer.eos_token_id
    ids = torch.randint(5, len(work.tokenizer), (rows, own.sequence_length))
    # documents end where those of the data do
    ids[:, :: max(2, round(mean(work.document_lengths)))] = end
    ids = ids.to(bench.device)
    model.train()

    def pass_() -> None:
        with bench.accelerator.autocast():
            loss = learn.loss(model, ids, list(range(rows)), 0)
        bench.accelerator.backward(loss)
        loss.item()

    def finish() -> None:
        clip_gradients(model, own.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        pass_()
        finish()

    once = measure(step, bench.device, 1.0)
    model.eval()
    with torch.no_grad():
        heldout = measure(lambda: learn.loss(model, ids[:1], [0], -1).item(), bench.device, 0.3)
    scale = bench.scale
    looked = evaluations(own.steps, own.eval_every_steps)
    tokens_heldout = work.heldout_documents * mean(work.document_lengths)
    heldout_rows = min(own.eval_rows, max(1, int(tokens_heldout // own.sequence_length)))
    passes = own.minibatch_rows / rows / bench.processes
    parts = [
        ("read, tokenise and pack the text", 1.0, work.read_texts + work.pack_texts),
        *storage(bench, loads=0),
        ("optimiser step", own.steps, once * (passes * scale)),
        ("held-out row", looked * heldout_rows / bench.processes, heldout * scale),
    ]
    if decode is not None and own.objective == "causal":
        parts.append(("text sample", looked, _shown(decode, "pretrain")))
    tokens = float(own.steps * own.minibatch_rows * own.sequence_length)
    context = min(own.sequence_length, mean(work.document_lengths) or own.sequence_length) / 2
    size = bench.size

    def memory() -> Memory:
        kept = bench.kept(
            rows_each, own.sequence_length, NO_LORA, attention_mask=own.isolate_documents
        )
        return scaling.together(bench.trained(NO_LORA), kept)

    notes = []
    if settings.pretrain.data and work.documents:
        seen = work.documents * mean(work.document_lengths)
        notes.append(f"{tokens / seen:.1f} passes over {seen:,.0f} tokens of text")
    flops = scaling.train_flops(size, tokens, context)
    return StageCost(parts, tokens, flops, memory, notes, size.trainable)


def _shown(decode: DecodeCost, stage: str) -> Seconds:
    rows, tokens = _SHOWN_ROWS[stage]
    return decode.batch([tokens] * rows)


def sft(bench: Bench, decode: DecodeCost | None) -> StageCost:
    own, work = bench.settings.sft, bench.work
    steps = own.max_steps or -(-round(own.epochs * work.demonstrations) // own.minibatch_rows)
    lengths = [len(ids) for ids, _ in work.rows]
    micro_rows = own.minibatch_rows // (own.accumulation_steps * bench.processes) or 1
    rows = bench.affordable_rows(micro_rows, mean(lengths))
    setup, once, heldout = _sft_steps(bench, rows)
    scale = bench.scale
    heldout_rows = min(512, work.demonstrations * own.heldout_fraction / (1 - own.heldout_fraction))
    looked = evaluations(steps, own.eval_every_steps)
    parts = [
        ("read and tokenise demonstrations", 1.0, work.read_demonstrations),
        *storage(bench, loads=1),
        ("start the trainer", 1.0, setup),
        ("optimiser step", steps, once * (own.minibatch_rows / rows / bench.processes * scale)),
        ("held-out row", looked * heldout_rows / bench.processes, heldout * scale),
    ]
    if decode is not None:
        parts.append(("text sample", looked, _shown(decode, "sft")))
    tokens = steps * own.minibatch_rows * mean(lengths)
    size = bench.sized(own.lora)

    def memory() -> Memory:
        return scaling.together(
            bench.trained(own.lora), bench.kept(micro_rows, max(lengths), own.lora)
        )

    flops = scaling.train_flops(size, tokens, mean(lengths) / 2)
    return StageCost(parts, tokens, flops, memory, trainable=size.trainable)


def _sft_steps(bench: Bench, rows: int, count: int = 4) -> tuple[Seconds, Seconds, Seconds]:
    """TRL's own trainer, as the stage starts it: its start, one step of `rows` rows, a held-out row."""
    # this import takes seconds and memory, in the stage too: not before it is needed
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from stages.chat import TrainingRow
    from stages.sft import heldout_loss
    from stages.trl_runs import make_config, make_trainer

    ends: list[Seconds] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(Seconds(*now(bench.device)))

    own = bench.settings.sft.model_copy(update={"accumulation_steps": 1})
    lengths = sorted(range(len(bench.work.rows)), key=lambda i: len(bench.work.rows[i][0]))
    # rows of every length in every step, as a shuffled file has
    order = [lengths[(i * 7919) % len(lengths)] for i in range((count + 1) * rows)]
    data = Dataset.from_dict(
        {
            "input_ids": [bench.work.rows[i][0] for i in order],
            "labels": [
                [t if on else -100 for t, on in zip(*bench.work.rows[i], strict=True)]
                for i in order
            ],
        }
    )
    out = bench.out("sft")
    begun = Seconds(*now(bench.device))
    model = add_lora(bench.policy(), own.lora, "causal")
    config = make_config(
        SFTConfig, bench.settings, own, out, bench.accelerator, steps=count + 1, rows=rows,
        rows_key="sft.minibatch_rows", schedule="cosine", train_sampling_strategy="sequential",
        max_length=None,
    )  # fmt: skip
    trainer = make_trainer(SFTTrainer, model, config, data, bench.work.tokenizer, Watch(), out)
    trainer.train()
    each = [after - before for before, after in pairwise(ends)]
    once = sorted(each, key=lambda s: s.main)[len(each) // 2]
    setup = (ends[0] - begun - once).at_least_zero()
    some = [TrainingRow(*bench.work.rows[i]) for i in order[: min(16, rows * count)]]
    accelerator: Accelerator = trainer.accelerator
    pad_id = bench.work.tokenizer.pad_token_id
    heldout = measure(
        lambda: heldout_loss(trainer.model, some, pad_id, accelerator), bench.device, 0.3
    )
    return setup, once, heldout * (1 / len(some))


def sample(bench: Bench, decode: DecodeCost, round: int) -> StageCost:
    own, work = bench.settings.sample, bench.work
    prompts = min(own.max_prompts or work.prompts["train"], work.prompts["train"])
    chooses = bench.settings.select.by != "random" and round > 1
    if chooses:
        prompts = min(prompts * bench.settings.select.candidates, work.prompts["train"])
    K = own.responses_per_prompt
    lengths = work.expected(own.max_response_tokens)
    rows = min(own.rows_per_rank, 64 * K)
    spent = decode.all(lengths, prompts * K, rows) * bench.scale
    tokens = prompts * K * mean(lengths)
    read = mean([len(ids) for ids in work.prompt_ids])
    return StageCost(
        [
            *storage(bench, loads=1, saves=0),
            ("read prompts", 1.0, work.read_prompts if round == 1 else Seconds()),
            (f"{prompts * K:,} responses", 1.0 / bench.processes, spent),
        ],
        tokens,
        prompts * K * scaling.generation_flops(bench.size, read, mean(lengths)),
        lambda: scaling.together(
            bench.frozen(), bench.decoding(rows, round_up(read) + max(lengths))
        ),
    )


def round_up(value: float) -> int:
    return int(-(-value // 1))


def rank(bench: Bench) -> StageCost:
    rankings = bench.work.rankings
    if bench.settings.rank.by == "simulated":
        return StageCost(
            [
                ("open the label store", 1.0, _SIMULATED_START),
                ("simulated ranking", rankings, _SIMULATED_RANKING),
            ]
        )
    return StageCost([], notes=[f"{rankings:,} rankings by people: the clock is theirs"])


def decoding(bench: Bench) -> DecodeCost:
    """Of the configuration's own model; without prompts, of one token."""
    settings, work = bench.settings, bench.work
    own = getattr(settings, settings.run.policy)
    most = getattr(own, "max_response_tokens", settings.sample.max_response_tokens)
    rows = getattr(own, "rows_per_rank", settings.sample.rows_per_rank)
    rows = bench.affordable_rows(min(rows, 64), 3.0)
    prompts = work.prompt_ids or [[work.tokenizer.eos_token_id]]
    return decode_cost(
        bench.policy(), prompts, work.expected(most), rows, work.tokenizer.pad_token_id
    )
