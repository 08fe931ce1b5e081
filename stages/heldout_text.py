"""How well a model predicts text that no stage was trained on."""

from __future__ import annotations

import math
from itertools import islice

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.job import Inputs, Metrics, Out
from pipeline.settings import Settings
from stages.chat import encode_completion
from stages.data import is_heldout, read_demonstrations, read_texts
from stages.rollout import all_logprobs, make_sequences


def heldout_text(settings: Settings, inputs: Inputs, out: Out) -> list[str]:
    """Documents that no stage was trained on, for the perplexity; none if there is no text at all."""
    if "text" not in inputs:
        return []
    if settings.evaluate.text or settings.pretrain.data:
        texts, tally = read_texts(
            inputs["text"].sources, settings.pretrain.text_field, settings.pretrain.max_documents
        )
        everything = settings.evaluate.text is not None
        fraction = settings.pretrain.heldout_fraction
        kept = (text for text in texts if everything or is_heldout(text, fraction))
    else:
        conversations, tally = read_demonstrations(
            inputs["text"].sources, settings.sft.max_examples
        )
        fraction = settings.sft.heldout_fraction
        kept = (
            "\n\n".join(message["content"] for message in conversation)
            for conversation in conversations
            if is_heldout(conversation, fraction)
        )
    found = list(islice(kept, settings.evaluate.max_documents))
    # of text that a stage before has read, its own limit holds: only nothing at all is refused
    tally.check("evaluate.text", 1.0)
    if tally.reasons:
        out.say(f"text for the perplexity: {tally.summary()}")
        out.derived["documents_dropped"] = dict(tally.reasons)
    return found


@torch.no_grad()
def heldout_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    accelerator: Accelerator,
    max_length: int = 512,
) -> Metrics:
    """perplexity and bits_per_byte over the documents (cut at 512 tokens); None without any.

    perplexity: exp of the mean negative logprob of a token. bits_per_byte: their sum over the UTF-8
    bytes of what they say, so that models with different tokenizers can be compared.
    """
    limit = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    rows = [encode_completion(tokenizer, text, eos=False)[:limit] for text in texts]
    # the first token has nothing before it to be predicted from
    rows = [row for row in rows if len(row) >= 2]
    if not rows:
        return {"perplexity": None, "bits_per_byte": None}
    batch = make_sequences(
        [row[:1] for row in rows],
        [row[1:] for row in rows],
        tokenizer.pad_token_id,
        accelerator.device,
    )
    logprobs_BR = all_logprobs(model, batch, 1.0, rows_at_once=16)
    nats = -float(torch.where(batch.valid_BR, logprobs_BR, 0.0).double().sum())
    tokens = int(batch.valid_BR.sum())
    written = sum(_bytes(tokenizer, row) - _bytes(tokenizer, row[:1]) for row in rows)
    return {
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / written if written else None,
    }


def _bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    # a token may be a part of a character, which decodes to a sign of three bytes that is cut off
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return len(text.rstrip("\ufffd").encode("utf-8", "surrogatepass"))
