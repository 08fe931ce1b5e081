"""pretrain: next-token training on plain text, from scratch or continued from a base.

Reads: `tokenizer` or `base`, and `data`. Writes a `model`: a plain HF folder.

    prefline pretrain RUN pretrain.steps=2000

Documents are tokenised once into a memory-mapped file, an end token after each, and packed into rows
of pretrain.sequence_length without padding. With pretrain.objective: masked, an encoder learns to fill
hidden words instead; it cannot feed sft.

Metrics (healthy range): loss and heldout_loss in nats a token (fall together; heldout_loss rising
while loss falls is over-fitting), heldout_bits_per_byte (compares tokenizers; English text: below 2,
a small model), lr, grad_norm (steady, below a few units), tokens_per_second.
"""

from __future__ import annotations

import math
import time

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import worker
from pipeline.errors import ConfigError, DataError
from pipeline.job import Inputs, Metrics, Out
from pipeline.settings import Settings
from pipeline.settings.pretrain import PretrainSettings
from stages.chat import decode_response
from stages.checkpoints import (
    Checkpointer,
    load_optimizer,
    load_trainable,
    optimizer_tensors,
    trainable_tensors,
)
from stages.common import (
    adamw,
    clip_gradients,
    epoch_order,
    exact_div,
    num_parameters,
    own_share,
    seed_for,
    set_lr,
    start,
    stop_if_asked,
    sum_over_ranks,
    warmup_cosine,
)
from stages.generation import generate
from stages.models import (
    contract_of,
    load_causal_lm,
    load_tokenizer,
    new_causal_lm,
    new_masked_lm,
    positions,
    save_model,
)
from stages.objectives import objective
from stages.packing import PackedRows, pack_sources
from stages.sharding import accumulate, exchange, make_whole, place, whole
from stages.stops import check_finite

_SAMPLES = 2
_SAMPLE_TOKENS = 80


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    own = settings.pretrain
    accelerator = start(settings, out)
    source = inputs["base"] if "base" in inputs else inputs["tokenizer"]
    tokenizer = load_tokenizer(source)
    torch.manual_seed(seed_for(settings.run.seed, "pretrain", "weights"))
    if "base" in inputs:
        model = load_causal_lm(source)
    elif own.objective == "masked":
        model = new_masked_lm(settings.model, tokenizer)
    else:
        model = new_causal_lm(settings.model, tokenizer)
    model = place(model, accelerator)
    _check_length(model, own)
    train, heldout = _packed(own, inputs, tokenizer, accelerator, out)
    loop = Loop(settings, model, tokenizer, (train, heldout), accelerator, out)

    size = num_parameters(model)
    step_tokens = own.minibatch_rows * own.sequence_length
    out.derived.update(
        rows_per_rank=loop.rows_per_rank,
        tokens_per_step=step_tokens,
        train_rows=len(train),
        heldout_rows=len(heldout),
        parameters=size,
        epochs=own.steps * own.minibatch_rows / len(train),
    )
    out.say(
        f"{size:,} parameters, {own.steps} steps x {step_tokens} tokens"
        f" = {out.derived['epochs']:.1f} passes over {len(train)} rows"
    )
    last = loop.run()

    make_whole(model)
    if out.rank == 0:
        save_model(model, tokenizer, out.artifact)
    out.contract.update(contract_of(tokenizer, model))
    tokens = own.steps * step_tokens
    out.cost["tokens"] += tokens
    out.cost["flops"] += 6.0 * size * tokens
    return {**last, "parameters": size, "steps": own.steps}


def _check_length(model: PreTrainedModel, own: PretrainSettings) -> None:
    limit = positions(model)
    if limit is not None and own.sequence_length > limit:
        raise ConfigError(
            f"pretrain.sequence_length {own.sequence_length} is more than the {limit} tokens that"
            " the model can read",
            "Lower pretrain.sequence_length, or raise model.max_length of a new model.",
        )


def _packed(
    own: PretrainSettings,
    inputs: Inputs,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    out: Out,
) -> tuple[PackedRows, PackedRows]:
    """Training and held-out rows; rank 0 tokenises once, a resumed run finds the files again."""
    folder = out.checkpoints / "tokens"
    if out.rank == 0:
        out.derived["documents_dropped"] = pack_sources(
            inputs["data"], own, tokenizer, folder, "pretrain.data", out
        )
    accelerator.wait_for_everyone()
    parts = (
        PackedRows(folder, "train", own.sequence_length),
        PackedRows(folder, "heldout", own.sequence_length),
    )
    for rows, what in zip(parts, ("training", "held-out"), strict=True):
        if len(rows) == 0:
            raise DataError(
                f"pretrain.data: the {what} text has fewer tokens than one row"
                f" (pretrain.sequence_length {own.sequence_length})",
                "Give more text, a shorter sequence_length or a larger heldout_fraction.",
            )
    return parts


class Loop:
    """The training loop and what it carries from step to step."""

    def __init__(
        self,
        settings: Settings,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: tuple[PackedRows, PackedRows],
        accelerator: Accelerator,
        out: Out,
    ) -> None:
        own = settings.pretrain
        self.settings, self.own = settings, own
        self.model, self.tokenizer = model, tokenizer
        self.train, self.heldout = rows
        self.accelerator, self.out = accelerator, out
        self.rows_per_rank = exact_div(
            own.minibatch_rows, own.accumulation_steps * out.world_size, "pretrain.minibatch_rows"
        )
        self.objective = objective(own, model, tokenizer, settings.run.seed)
        self.optimizer = adamw(model, own.lr, own.weight_decay, own.beta2)
        self.checkpoints = Checkpointer(out, settings.launch.keep_checkpoints, accelerator)
        self.wrapped = exchange(model, accelerator)
        self.step = 0
        self.evaluated: Metrics = {}
        self.clock = 0.0

    def run(self) -> Metrics:
        """Train to the end; the metrics of the last evaluation."""
        self._resume()
        self.start()
        while self.step < self.own.steps:
            stop_if_asked(self.accelerator, self.out, self._save)
            self.advance()
        return self.evaluated

    def start(self) -> None:
        self.model.train()
        self.clock = time.perf_counter()

    def advance(self) -> None:
        """One optimiser step and what is due after it: evaluation, log, checkpoint."""
        own = self.own
        lr = own.lr * warmup_cosine(self.step, own.steps, own.warmup_fraction, own.min_lr_ratio)
        set_lr(self.optimizer, lr)
        row = self._step()
        check_finite(self.out, self.step + 1, **row)
        self.step += 1
        row["lr"] = lr
        now = time.perf_counter()
        row["tokens_per_second"] = own.minibatch_rows * own.sequence_length / (now - self.clock)
        self.clock = now
        last = self.step == own.steps
        if self.step % own.eval_every_steps == 0 or last:
            with whole(self.model):
                self.evaluated = self._evaluate()
                if self.out.rank == 0 and own.objective == "causal":
                    self._show()
            check_finite(self.out, self.step, **self.evaluated)
            row |= self.evaluated
            self.clock = time.perf_counter()
        self.out.log(self.step, row)
        self.out.progress(self.step, own.steps)
        if self.step % own.checkpoint_every_steps == 0 and not last:
            self._save()

    def _step(self) -> Metrics:
        """One optimiser step over the rows of all ranks; every token weighs the same."""
        own, accelerator = self.own, self.accelerator
        picked = epoch_order(
            len(self.train),
            self.step * own.minibatch_rows,
            own.minibatch_rows,
            self.settings.run.seed,
            "pretrain",
            "rows",
        )
        mine = picked[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros((), device=accelerator.device)
        for at in range(0, len(mine), self.rows_per_rank):
            rows = mine[at : at + self.rows_per_rank]
            tokens_BT = self.train.rows(rows).to(accelerator.device)
            last = at + self.rows_per_rank >= len(mine)
            with accumulate(self.wrapped, last):
                with accelerator.autocast():
                    loss = self.objective.loss(self.wrapped, tokens_BT, rows, self.step)
                # every row predicts equally many tokens: the mean of means is the token mean
                loss = loss / own.accumulation_steps
                accelerator.backward(loss)
            total += loss.detach()
        grad_norm = clip_gradients(self.model, own.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = sum_over_ranks(accelerator)(total) / accelerator.num_processes
        return {"loss": loss.item(), "grad_norm": grad_norm}

    @torch.no_grad()
    def _evaluate(self) -> Metrics:
        """Loss on the first held-out rows, always the same ones; every rank scores its share."""
        self.model.eval()
        count = min(self.own.eval_rows, len(self.heldout))
        totals = torch.zeros(2, device=self.accelerator.device)
        for at in own_share(count, self.accelerator):
            tokens_BT = self.heldout.rows([at]).to(self.accelerator.device)
            with self.accelerator.autocast():
                totals[0] += self.objective.loss(self.model, tokens_BT, [at], step=-1)
            totals[1] += 1
        self.model.train()
        total, rows = sum_over_ranks(self.accelerator)(totals).tolist()
        loss = total / rows
        bits = loss / math.log(2) / self.heldout.bytes_per_token
        return {"heldout_loss": loss, "heldout_bits_per_byte": bits}

    def _show(self) -> None:
        """What the model writes by itself now, after nothing but the start of a document."""
        start_of_text = [self.tokenizer.bos_token_id or self.tokenizer.eos_token_id]
        seed = self.settings.run.seed
        found = generate(
            self.model,
            [start_of_text] * _SAMPLES,
            [seed_for(seed, "pretrain", "show", i) for i in range(_SAMPLES)],
            eos_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            max_response_tokens=min(_SAMPLE_TOKENS, self.own.sequence_length),
            temperature=0.8,
        )
        for generated in found:
            text = decode_response(self.tokenizer, generated.tokens)
            self.out.sample(self.step, prompt="", text=text)
        self.out.say(f"it writes: {text[:200]!r}")

    def _save(self) -> None:
        groups = {
            "model": trainable_tensors(self.model),
            "optimizer": optimizer_tensors(self.optimizer),
        }
        self.checkpoints.save(self.step, groups, {"evaluated": self.evaluated})

    def _resume(self) -> None:
        found = self.checkpoints.load_latest()
        if found is None:
            return
        load_trainable(self.model, found.tensors["model"])
        load_optimizer(self.optimizer, found.tensors["optimizer"])
        self.step, self.evaluated = found.step, found.state["evaluated"]


if __name__ == "__main__":
    worker.main()
