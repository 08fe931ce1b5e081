"""tokenizer: byte-level BPE, trained on the text that the model will read.

Reads: `data` (text: see stages/data.py). Writes a `tokenizer`: an HF fast tokenizer with a chat
template. All 256 bytes are in the vocabulary, so any Unicode text comes back as it was; digits stand
alone. Control tokens: bos, eos, pad, mask, one for each kind of turn and one for its end.

    prefline tokenizer RUN tokenizer.vocab_size=1024

Metrics (healthy range): bytes_per_token (3 to 5 for English with thousands of entries, above 1.5 with
hundreds), unknowns (0: documents that do not come back as they were), vocab_size, documents.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline import worker
from pipeline.job import Inputs, Metrics, Out
from pipeline.settings import Settings
from stages.chat import BOS, CHAT_TEMPLATE, EOS, MASK, PAD, TURN_TOKENS
from stages.data import read_texts
from stages.models import contract_of, save_model

_MEASURE_ON = 1000
_BEAT_EVERY = 500


def run(settings: Settings, inputs: Inputs, out: Out) -> Metrics:
    own = settings.tokenizer
    texts, tally = read_texts(inputs["data"].sources, own.text_field, own.max_documents)
    measured: list[str] = []

    def watched() -> Iterator[str]:
        for number, text in enumerate(texts, 1):
            if len(measured) < _MEASURE_ON:
                measured.append(text)
            if number % _BEAT_EVERY == 0:
                out.progress(number, own.max_documents or number, "document")
            yield text

    tokenizer = train(watched(), own.vocab_size, own.min_frequency)
    # how much may be bad is pretrain's setting; here it only matters that there is something
    tally.check("tokenizer.data", 1.0)
    out.say(f"text: {tally.summary()}")
    out.derived["documents_dropped"] = dict(tally.reasons)
    if len(tokenizer) < own.vocab_size:
        out.say(
            f"the text has no more pairs that occur {own.min_frequency} times:"
            f" {len(tokenizer)} entries instead of {own.vocab_size}"
        )

    num_bytes = num_tokens = unknowns = 0
    for text in measured:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        num_bytes += len(text.encode())
        num_tokens += len(ids)
        unknowns += tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text
    if out.rank == 0:
        save_model(None, tokenizer, out.artifact)
    out.contract.update(contract_of(tokenizer))
    return {
        "bytes_per_token": num_bytes / num_tokens,
        "unknowns": unknowns,
        "vocab_size": len(tokenizer),
        "documents": tally.used,
    }


def train(texts: Iterator[str], vocab_size: int, min_frequency: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with our control tokens and chat template."""
    control = [BOS, EOS, PAD, MASK, *TURN_TOKENS]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # a number is its digits: "17" and "170" share what they have in common
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=control,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # a document begins with bos; what ends it is written by whoever joins documents
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        mask_token=MASK,
        extra_special_tokens=list(TURN_TOKENS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


if __name__ == "__main__":
    worker.main()
