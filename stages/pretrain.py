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
from collections.abc import Iterator
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import worker
from pipeline.errors import ConfigError, DataError
from pipeline.job import Inputs, Metrics, Out
from pipeline.records import canonical_json
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
    check_finite,
    clip_gradients,
    epoch_order,
    exact_div,
    generator,
    own_share,
    seed_for,
    set_lr,
    start,
    stop_if_asked,
    sum_over_ranks,
    warmup_cosine,
)
from stages.data import read_texts
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
from stages.packing import PackedRows, pack_documents

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
    model = model.to(accelerator.device)
    _check_length(model, own)
    _check_isolation(model, own, tokenizer.eos_token_id)
    train, heldout = _packed(own, inputs, tokenizer, accelerator, out)

    rows_per_rank = exact_div(
        own.minibatch_rows, own.accumulation_steps * out.world_size, "pretrain.minibatch_rows"
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    step_tokens = own.minibatch_rows * own.sequence_length
    out.derived.update(
        rows_per_rank=rows_per_rank,
        tokens_per_step=step_tokens,
        train_rows=len(train),
        heldout_rows=len(heldout),
        parameters=num_parameters,
        epochs=own.steps * own.minibatch_rows / len(train),
    )
    out.say(
        f"{num_parameters:,} parameters, {own.steps} steps x {step_tokens} tokens"
        f" = {out.derived['epochs']:.1f} passes over {len(train)} rows"
    )
    last = _train(settings, model, train, heldout, rows_per_rank, tokenizer, accelerator, out)

    if out.rank == 0:
        save_model(model, tokenizer, out.artifact)
    out.contract.update(contract_of(tokenizer, model))
    tokens = own.steps * step_tokens
    out.cost["tokens"] += tokens
    out.cost["flops"] += 6.0 * num_parameters * tokens
    return {**last, "parameters": num_parameters, "steps": own.steps}


def _check_length(model: PreTrainedModel, own: PretrainSettings) -> None:
    limit = positions(model)
    if limit is not None and own.sequence_length > limit:
        raise ConfigError(
            f"pretrain.sequence_length {own.sequence_length} is more than the {limit} tokens that"
            " the model can read",
            "Lower pretrain.sequence_length, or raise model.max_length of a new model.",
        )


@torch.no_grad()
def _check_isolation(model: PreTrainedModel, own: PretrainSettings, end_id: int) -> None:
    """Some architectures (OPT, BLOOM, Mamba) do not look at where the positions begin anew."""
    if own.objective == "masked" or not own.isolate_documents:
        return
    words = [token for token in range(8) if token != end_id][:6]
    row_BT = torch.tensor([[*words[:3], end_id, *words[3:]]], device=model.device)
    packed = model(
        input_ids=row_BT, position_ids=document_positions(row_BT, end_id), use_cache=False
    ).logits[:, 4:]
    alone = model(input_ids=row_BT[:, 4:], use_cache=False).logits
    # measured: 1e-6 of the logits where documents are kept apart, as much as the logits where not
    if (packed - alone).abs().max() > 1e-3 * alone.abs().max():
        raise ConfigError(
            f"pretrain.isolate_documents: a {model.config.model_type} model cannot keep the documents"
            " of a row apart",
            "Set pretrain.isolate_documents: false, or take another model.architecture.",
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
        texts, tally = read_texts(inputs["data"].sources, own.text_field, own.max_documents)

        def checked() -> Iterator[str]:
            yield from texts
            # before the files count as whole: a second start does not read the texts again
            tally.check("pretrain.data", own.max_bad_fraction)

        done = pack_documents(checked(), tokenizer, folder, own.heldout_fraction, out.progress)
        if done is not None:
            out.say(f"text: {tally.summary()}")
            out.derived["documents_dropped"] = dict(tally.reasons)
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


def _train(
    settings: Settings,
    model: PreTrainedModel,
    train: PackedRows,
    heldout: PackedRows,
    rows_per_rank: int,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    out: Out,
) -> Metrics:
    """The loop; the metrics of the last evaluation."""
    own = settings.pretrain
    optimizer = adamw(model, own.lr, own.weight_decay, own.beta2)
    checkpoints = Checkpointer(out, settings.launch.keep_checkpoints, accelerator)
    evaluated: Metrics = {}
    begin = 0
    found = checkpoints.load_latest()
    if found:
        load_trainable(model, found.tensors["model"])
        load_optimizer(optimizer, found.tensors["optimizer"])
        begin, evaluated = found.step, found.state["evaluated"]
    wrapped = accelerator.prepare_model(model)

    def save(step: int) -> None:
        groups = {"model": trainable_tensors(model), "optimizer": optimizer_tensors(optimizer)}
        checkpoints.save(step, groups, {"evaluated": evaluated})

    model.train()
    clock = time.perf_counter()
    for step in range(begin, own.steps):
        stop_if_asked(accelerator, out, partial(save, step))
        lr = own.lr * warmup_cosine(step, own.steps, own.warmup_fraction, own.min_lr_ratio)
        set_lr(optimizer, lr)
        row = _step(
            settings, wrapped, model, optimizer, train, step, rows_per_rank, tokenizer, accelerator
        )
        check_finite(step + 1, "pretrain", **row)
        row["lr"] = lr
        now = time.perf_counter()
        row["tokens_per_second"] = own.minibatch_rows * own.sequence_length / (now - clock)
        clock = now
        if (step + 1) % own.eval_every_steps == 0 or step + 1 == own.steps:
            evaluated = _evaluate(settings, model, heldout, tokenizer, accelerator)
            row |= evaluated
            if out.rank == 0 and own.objective == "causal":
                _show(settings, model, tokenizer, step + 1, out)
            clock = time.perf_counter()
        out.log(step + 1, row)
        out.progress(step + 1, own.steps)
        if (step + 1) % own.checkpoint_every_steps == 0 and step + 1 < own.steps:
            save(step + 1)
    return evaluated


def _step(
    settings: Settings,
    wrapped: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: PackedRows,
    step: int,
    rows_per_rank: int,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> Metrics:
    """One optimiser step over the rows of all ranks; every token weighs the same."""
    own = settings.pretrain
    picked = epoch_order(
        len(train),
        step * own.minibatch_rows,
        own.minibatch_rows,
        settings.run.seed,
        "pretrain",
        "rows",
    )
    end_id = tokenizer.eos_token_id if own.isolate_documents else None
    mine = picked[accelerator.process_index :: accelerator.num_processes]
    total = torch.zeros((), device=accelerator.device)
    for at in range(0, len(mine), rows_per_rank):
        tokens_BT = train.rows(mine[at : at + rows_per_rank]).to(accelerator.device)
        last = at + rows_per_rank >= len(mine)
        purpose = (step, accelerator.process_index, at)
        inputs_BT, labels_BT = _objective(settings, tokens_BT, tokenizer, *purpose)
        if last:
            loss = _backward(wrapped, inputs_BT, labels_BT, end_id, own, accelerator)
        else:
            with accelerator.no_sync(wrapped):
                loss = _backward(wrapped, inputs_BT, labels_BT, end_id, own, accelerator)
        total += loss
    grad_norm = clip_gradients(model, own.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss = sum_over_ranks(accelerator)(total) / accelerator.num_processes
    return {"loss": loss.item(), "grad_norm": grad_norm}


def _backward(
    wrapped: nn.Module,
    inputs_BT: Tensor,
    labels_BT: Tensor,
    end_id: int | None,
    own: PretrainSettings,
    accelerator: Accelerator,
) -> Tensor:
    """Add the gradients of one micro-batch; its share of the step's loss.

    Every row predicts equally many tokens, so the mean of micro-batch means is the token mean.
    """
    with accelerator.autocast():
        loss = _loss(wrapped, inputs_BT, labels_BT, end_id, own)
    loss = loss / own.accumulation_steps
    accelerator.backward(loss)
    return loss.detach()


def _loss(
    model: nn.Module,
    inputs_BT: Tensor,
    labels_BT: Tensor,
    end_id: int | None,
    own: PretrainSettings,
) -> Tensor:
    """Mean cross-entropy of the labels; with `end_id`, documents do not see one another."""
    if end_id is None or own.objective == "masked":
        return model(input_ids=inputs_BT, labels=labels_BT).loss
    # transformers masks between documents where positions begin anew, but only without a cache and
    # without a mask of ours (measured: a leak of 3 in the logits otherwise)
    return model(
        input_ids=inputs_BT,
        labels=labels_BT,
        position_ids=document_positions(inputs_BT, end_id),
        use_cache=False,
    ).loss


def document_positions(tokens_BT: Tensor, end_id: int) -> Tensor:
    """Position of each token within its document, `[B, T]`; a document ends with `end_id`."""
    spots_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    begins_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    begins_BT[:, 1:] = tokens_BT[:, :-1] == end_id
    return spots_BT - torch.where(begins_BT, spots_BT, 0).cummax(-1).values


def _objective(
    settings: Settings, tokens_BT: Tensor, tokenizer: PreTrainedTokenizerBase, *purpose: int
) -> tuple[Tensor, Tensor]:
    """(inputs, labels) of a micro-batch. causal: the same tokens; the model shifts them itself.

    masked (BERT, arXiv 1810.04805): in every row the same number of tokens is to be predicted; of
    these 80 % are hidden, 10 % replaced by a random token and 10 % left.
    """
    own = settings.pretrain
    if own.objective == "causal":
        return tokens_BT, tokens_BT
    rng = generator(settings.run.seed, "pretrain", "mask", *purpose)
    B, T = tokens_BT.shape
    count = max(1, round(own.mask_fraction * T))
    spots_BM = torch.rand(B, T, generator=rng).argsort(-1)[:, :count].to(tokens_BT.device)
    fate_BM = torch.rand(B, count, generator=rng).to(tokens_BT.device)
    random_BM = torch.randint(len(tokenizer), (B, count), generator=rng).to(tokens_BT.device)
    original_BM = tokens_BT.gather(-1, spots_BM)
    hidden_BM = torch.where(fate_BM < 0.8, tokenizer.mask_token_id, original_BM)
    hidden_BM = torch.where(fate_BM >= 0.9, random_BM, hidden_BM)
    labels_BT = torch.full_like(tokens_BT, -100).scatter(-1, spots_BM, original_BM)
    return tokens_BT.scatter(-1, spots_BM, hidden_BM), labels_BT


@torch.no_grad()
def _evaluate(
    settings: Settings,
    model: PreTrainedModel,
    heldout: PackedRows,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> Metrics:
    """Loss on the first held-out rows, always the same ones; every rank scores its share."""
    own = settings.pretrain
    model.eval()
    end_id = tokenizer.eos_token_id if own.isolate_documents else None
    count = min(own.eval_rows, len(heldout))
    totals = torch.zeros(2, device=accelerator.device)
    for at in own_share(count, accelerator):
        tokens_BT = heldout.rows([at]).to(accelerator.device)
        inputs_BT, labels_BT = _objective(settings, tokens_BT, tokenizer, -1, at)
        with accelerator.autocast():
            totals[0] += _loss(model, inputs_BT, labels_BT, end_id, own)
        totals[1] += 1
    model.train()
    total, rows = sum_over_ranks(accelerator)(totals).tolist()
    loss = total / rows
    bits = loss / math.log(2) / heldout.bytes_per_token
    return {"heldout_loss": loss, "heldout_bits_per_byte": bits}


def _show(
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    out: Out,
) -> None:
    """What the model writes by itself now, after nothing but the start of a document."""
    start_of_text = [tokenizer.bos_token_id or tokenizer.eos_token_id]
    seeds = [seed_for(settings.run.seed, "pretrain", "show", i) for i in range(_SAMPLES)]
    limit = min(_SAMPLE_TOKENS, settings.pretrain.sequence_length)
    found = generate(
        model,
        [start_of_text] * _SAMPLES,
        seeds,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        max_response_tokens=limit,
        temperature=0.8,
    )
    with (out.work / "samples.jsonl").open("a", encoding="utf-8") as file:
        for generated in found:
            text = decode_response(tokenizer, generated.tokens)
            file.write(canonical_json({"step": step, "prompt": "", "text": text}) + "\n")
    out.say(f"it writes: {text[:200]!r}")


if __name__ == "__main__":
    worker.main()
