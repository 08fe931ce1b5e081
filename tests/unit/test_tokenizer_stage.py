"""The tokenizer stage: any Unicode comes back, the bytes are the same every time."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline.errors import DataError
from pipeline.job import Input, Job, Out
from pipeline.settings import Settings
from stages import tokenizer as stage
from stages.models import contract_of

ROOT = Path(__file__).parents[2]
TEXTS = [f"A story of {i} bears and {i * 3} honey pots.\n" for i in range(200)]
TOKENIZER = stage.train(iter(TEXTS), 300, 2)


def run(tmp_path: Path, **settings) -> tuple[dict, Out]:
    tree = Settings.model_validate({"pretrain": {"data": "demo:stories"}, "tokenizer": settings})
    job = Job(
        "tokenizer", "tokenizer", "stages.tokenizer", 1, "0" * 12, tmp_path, tmp_path, {}, {}, {}
    )
    out = Out(job)
    inputs = {"data": Input("data", "sha256:0", sources=tree.tokenizer.data or tree.pretrain.data)}
    return stage.run(tree, inputs, out), out


@given(st.text(max_size=60))
def test_any_unicode_text_comes_back(text):
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_bos_eos_pad_mask_and_turn_tokens_are_distinct():
    names = ["bos", "eos", "pad", "mask"]
    ids = [getattr(TOKENIZER, f"{name}_token_id") for name in names]
    ids += TOKENIZER.convert_tokens_to_ids(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    assert len(set(ids)) == 8
    assert None not in ids


def test_every_byte_is_in_the_vocabulary_however_small():
    assert len(TOKENIZER) <= 300
    rare = bytes(range(256)).decode("latin-1")
    assert TOKENIZER.decode(TOKENIZER(rare, add_special_tokens=False)["input_ids"]) == rare


def test_digits_stand_alone():
    assert TOKENIZER.tokenize("1999") == ["1", "9", "9", "9"]


def test_the_stage_writes_a_plain_hf_tokenizer_and_says_what_it_is(tmp_path):
    metrics, out = run(tmp_path, vocab_size=400, max_documents=300)
    loaded = AutoTokenizer.from_pretrained(out.artifact)
    assert metrics["vocab_size"] == len(loaded) == 400
    assert metrics["unknowns"] == 0
    assert metrics["documents"] == 300
    assert 1.5 < metrics["bytes_per_token"] < 5
    assert out.contract == contract_of(loaded)
    assert "{% generation %}" in loaded.chat_template


def test_a_text_too_small_for_the_vocabulary_gives_a_smaller_one_and_says_so(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("ab ab ab")
    metrics, _ = run(tmp_path, vocab_size=5000, data=str(tmp_path / "t.txt"))
    assert metrics["vocab_size"] < 300
    assert "instead of 5000" in capsys.readouterr().err


def test_a_text_without_any_document_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text(" \n")
    with pytest.raises(DataError, match="no usable row"):
        run(tmp_path, data=str(tmp_path / "t.txt"))


def test_another_process_makes_the_same_bytes():
    code = (
        "import hashlib\nfrom stages import tokenizer as s\n"
        "texts = [f'A story of {i} bears and {i * 3} honey pots.\\n' for i in range(200)]\n"
        "t = s.train(iter(texts), 300, 2)\n"
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "17", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    mine = hashlib.sha256(stage.train(iter(TEXTS), 300, 2).backend_tokenizer.to_str().encode())
    assert done.stdout.strip() == mine.hexdigest()
