"""Tokens, odds, losses and neighbours against slow second ways and transformers' own."""

import json
import math
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stages import probe
from stages import tokenizer as tokenizer_stage
from stages.probe import Shaping, Vocabulary
from tests.tiny_models import KINDS, tiny_model

TEXT = "The cat sat on the mat because it was soft. Größe: 3 €, naïve 猫 😀\n\ttabs  and spaces"


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    words = ["the", "cat", "mat", "because", "soft", "sat", "Größe", "naïve"]
    lines = (" ".join(rng.choices(words, k=8)) for _ in range(300))
    return tokenizer_stage.train(lines, 400, 2)


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer of the SentencePiece kind: words begin with U+2581, unknown signs are bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    signs = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", *signs])
    backend.train_from_iterator(["the cat sat on the mat"] * 30, trainer)
    made = json.loads(backend.to_str())
    # bytes are ordinary entries of such vocabularies
    made["added_tokens"] = made["added_tokens"][:2]
    backend = Tokenizer.from_str(json.dumps(made))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


# ---- tokens --------------------------------------------------------------------------------


def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer):
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(vocabulary.raw(token) for token in ids) == TEXT.encode()


def test_bytes_that_stand_for_unknown_signs_and_the_sign_of_a_space_are_read(spaced):
    vocabulary = Vocabulary(spaced)
    ids = spaced("the cat 猫", add_special_tokens=False)["input_ids"]
    assert b"".join(vocabulary.raw(token) for token in ids) == " the cat 猫".encode()
    byte = ids[-1]
    assert vocabulary.merges(byte)["why"] == "a single byte that no other token covers"


def test_a_control_token_is_itself_and_has_no_merges(tokenizer):
    vocabulary = Vocabulary(tokenizer)
    shown = vocabulary.describe(tokenizer.eos_token_id)
    assert shown["special"]
    assert shown["text"] == tokenizer.eos_token
    assert vocabulary.merges(tokenizer.eos_token_id)["steps"] == []


def test_our_merging_gives_the_tokens_of_the_tokenizer_for_whole_words(tokenizer):
    ranks = Vocabulary(tokenizer).ranks
    backend = tokenizer.backend_tokenizer
    rng = random.Random(1)
    for _ in range(200):
        word = "".join(rng.choices("thecatsmobu", k=rng.randint(1, 9)))
        # a word in the signs of the vocabulary, as merging sees it
        pieces = backend.pre_tokenizer.pre_tokenize_str(" " + word)
        expected = backend.encode(" " + word, add_special_tokens=False).tokens
        assert [
            p for piece, _ in pieces for p in probe.merge_steps(piece, ranks)[0][-1]
        ] == expected


def test_the_merges_of_a_token_alone_are_those_that_happened_inside_its_word(tokenizer):
    vocabulary = Vocabulary(tokenizer)
    for word in ("Ġbecausecatmat", "Ġsoftthesat", "catcatcat"):
        states, _ = probe.merge_steps(word, vocabulary.ranks)
        seen = [set(state) for state in states]
        for token in states[-1]:
            alone, _ = probe.merge_steps(token, vocabulary.ranks)
            assert alone[-1] == [token]
            # every part that stood in between stood in the word as well
            for state in alone:
                assert any(set(state) <= parts for parts in seen)


def test_merges_are_told_with_their_ranks(tokenizer):
    vocabulary = Vocabulary(tokenizer)
    token = tokenizer.convert_tokens_to_ids("Ġcat")
    found = vocabulary.merges(token)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found["steps"][0]["parts"] == [" ", "c", "a", "t"]
    assert found["steps"][-1]["parts"] == [" cat"]
    for before, after in zip(found["steps"], found["steps"][1:], strict=False):
        left, right = merges[after["rank"]]
        joined = (left + right).replace("Ġ", " ")
        assert len(after["parts"]) == len(before["parts"]) - 1
        assert joined in after["parts"]


# ---- odds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "shaping",
    [
        Shaping(),
        Shaping(0.7),
        Shaping(1.6, top_k=7),
        Shaping(1.0, top_p=0.8),
        Shaping(0.9, 12, 0.6, 1.3),
        Shaping(1.0, 1),
        Shaping(2.0, 0, 0.05),
    ],
)
def test_shaped_odds_are_those_of_transformers(seed, shaping):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, generator=generator) * 3
    seen = [3, 7, 7, 40]
    expected = logits.unsqueeze(0)
    for wanted, make in (
        (shaping.repetition_penalty != 1, lambda: RepetitionPenaltyLogitsProcessor(1.3)),
        (True, lambda: TemperatureLogitsWarper(shaping.temperature)),
        (shaping.top_k > 0, lambda: TopKLogitsWarper(shaping.top_k)),
        (shaping.top_p < 1, lambda: TopPLogitsWarper(shaping.top_p)),
    ):
        if wanted:
            expected = make()(torch.tensor([seen]), expected)
    expected = expected.softmax(-1)[0]
    found = probe.odds(logits, seen, shaping, count=50)
    after = {row["id"]: row["after"] for row in found["rows"]}
    assert torch.tensor([after[i] for i in range(50)]).sub(expected).abs().max() < 1e-6
    assert found["kept"] == int((expected > 0).sum())
    assert found["rest"] == pytest.approx(0, abs=1e-6)


def test_what_is_cut_is_told_by_its_reason_and_before_stays_before():
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    found = probe.odds(logits, [], Shaping(top_k=4, top_p=0.7), count=3)
    assert [row["cut"] for row in found["rows"]] == [None, None, "top-p"]
    assert [round(row["before"], 6) for row in found["rows"]] == [0.5, 0.2, 0.15]
    assert [round(row["after"], 6) for row in found["rows"]] == [0.714286, 0.285714, 0]
    assert found["cut_mass"] == pytest.approx(0.3)
    assert found["rest"] == pytest.approx(0.15)
    assert found["entropy_before"] == pytest.approx(
        -sum(p * math.log(p) for p in (0.5, 0.2, 0.15, 0.1, 0.05))
    )
    everything = probe.odds(logits, [], Shaping(top_k=2), count=5)
    assert [row["cut"] for row in everything["rows"]] == [None, None, "top-k", "top-k", "top-k"]


def test_temperature_zero_leaves_the_likeliest_only():
    found = probe.odds(torch.tensor([1.0, 3.0, 2.0]), [], Shaping(0.0), count=3)
    assert [(row["id"], row["after"]) for row in found["rows"]] == [(1, 1.0), (2, 0.0), (0, 0.0)]


# ---- losses and neighbours -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_model_and_the_perplexity_follows(kind):
    model = tiny_model(kind)
    ids = [1, 5, 9, 33, 9, 60, 2]
    found = probe.losses(probe.logits_of(model, ids), ids, [4] * len(ids))
    with torch.no_grad():
        tokens = torch.tensor([ids])
        mean = model(input_ids=tokens, labels=tokens).loss.item()
    assert found["rows"][0]["loss"] is None
    assert found["mean"] == pytest.approx(mean, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(mean * 6 / math.log(2) / 24, rel=1e-5)
    for at, row in enumerate(found["rows"][1:], 1):
        with torch.no_grad():
            probs = model(input_ids=torch.tensor([ids[:at]])).logits[0, -1].softmax(-1)
        assert row["loss"] == pytest.approx(-math.log(probs[ids[at]]), abs=1e-4)
        assert row["rank"] == 1 + sum(p > probs[ids[at]] for p in probs)
        assert row["guess"] == int(probs.argmax())


def test_a_single_token_has_no_loss():
    found = probe.losses(torch.zeros(1, 5), [3], [1])
    assert (found["mean"], found["perplexity"], found["bits_per_byte"]) == (None, None, None)


def test_neighbours_are_those_of_every_cosine_by_hand():
    embeddings = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    embeddings[11] = 5 * embeddings[4]
    embeddings[12] = 0

    def cosine(i):
        a, b = embeddings[4].tolist(), embeddings[i].tolist()
        size = math.hypot(*a) * math.hypot(*b)
        return sum(x * y for x, y in zip(a, b, strict=True)) / size if size else 0.0

    expected = sorted(((cosine(i), i) for i in range(30) if i != 4), reverse=True)[:5]
    found = probe.neighbours(embeddings, 4, 5)
    assert [i for i, _ in found] == [i for _, i in expected]
    assert [c for _, c in found] == pytest.approx([c for c, _ in expected], abs=1e-5)
    assert found[0] == (11, pytest.approx(1.0))
