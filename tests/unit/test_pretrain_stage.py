"""Packed rows: a document does not see the one before it, on RoPE and on learned positions; and
what pretraining refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline.errors import ConfigError, DataError
from pipeline.job import Input, Job, Out
from pipeline.settings import Settings
from pipeline.settings.pretrain import PretrainSettings
from stages import pretrain
from stages import tokenizer as tokenizer_stage
from stages.models import save_model
from stages.objectives import document_positions
from stages.packing import pack_sources

END = 2


def test_positions_begin_anew_after_every_end_token() -> None:
    tokens = torch.tensor([[5, 6, END, 7, END, END, 8, 9]])
    assert document_positions(tokens, END).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_get_the_logits_that_they_get_alone(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.3,
        )
        model = LlamaForCausalLM(config)
    else:
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
        drop = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=40, bos_token_id=1, eos_token_id=2, **shape, **drop)
        )
    model.train(training)
    first, second = torch.randint(5, 40, (3, 9)), torch.randint(5, 40, (3, 7))
    first[:, -1] = END
    packed = torch.cat([first, second], dim=1)
    with torch.no_grad():
        together = model(
            input_ids=packed, position_ids=document_positions(packed, END), use_cache=False
        ).logits
        alone = model(input_ids=second, use_cache=False).logits
        blind = model(input_ids=packed, use_cache=False).logits
    torch.testing.assert_close(together[:, 9:], alone, atol=1e-4, rtol=1e-4)
    assert (blind[:, 9:] - alone).abs().max() > 0.1, "the models must be sharp enough to tell"


def start(work: Path, bad_rows: int, architecture: str = "llama", **own: int) -> None:
    """Pretraining on 40 documents and some rows without a text, as far as it gets."""
    rows = [json.dumps({"text": f"document {i} " * 20}) for i in range(40)] + ["{}"] * bad_rows
    data = work / "text.jsonl"
    data.write_text("\n".join(rows))
    save_model(None, tokenizer_stage.train((f"document {i}" for i in range(40)), 300, 2), work)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_length": 64}
    settings = Settings.model_validate(
        {
            "model": {**shape, "architecture": architecture, "precision": "fp32"},
            "pretrain": {"data": str(data), "heldout_fraction": 0.3, "steps": 1, **own},
        }
    )
    inputs = {
        "tokenizer": Input("tokenizer", "sha256:1", path=work),
        "data": Input("data", "sha256:2", sources=(str(data),)),
    }
    job = Job("pretrain", "pretrain", "stages.pretrain", 1, "f", work, work, {}, inputs, {})
    (work / "checkpoints").mkdir(exist_ok=True)
    pretrain.run(settings, inputs, Out(job))


def test_data_with_too_many_bad_rows_is_refused_a_second_time_as_well(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="40 of 80 rows cannot be used"):
            start(tmp_path, bad_rows=40, sequence_length=32)


def test_rows_longer_than_the_model_can_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sequence_length 65 is more than the 64 tokens"):
        start(tmp_path, bad_rows=0, sequence_length=65)


@pytest.mark.parametrize("architecture", ["opt", "mamba"])
def test_a_model_that_cannot_keep_documents_apart_is_refused(
    tmp_path: Path, architecture: str
) -> None:
    with pytest.raises(ConfigError, match=f"a {architecture} model cannot keep the documents"):
        start(tmp_path, bad_rows=0, architecture=architecture, sequence_length=32)
    start(tmp_path, 0, architecture, sequence_length=32, isolate_documents=False)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_that_can_is_not(tmp_path: Path, architecture: str) -> None:
    start(tmp_path, bad_rows=0, architecture=architecture, sequence_length=32)


def test_a_resumed_step_still_knows_what_was_left_out_of_its_text(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one two"}\n{"other": "three"}\n{"text": "four"}\n')
    tokenizer = tokenizer_stage.train(iter(["one two three four"] * 9), 300, 2)
    out = Out(Job("p", "p", "stages.pretrain", 1, "f" * 64, tmp_path, tmp_path, {}, {}, {}))
    item = Input("data", "sha256:0", sources=(str(path),))
    own = PretrainSettings(max_bad_fraction=0.5)
    first = pack_sources(item, own, tokenizer, tmp_path / "tokens", "pretrain.data", out)
    assert sum(first.values()) == 1
    path.unlink()  # the files are there already: the text is not read again
    assert pack_sources(item, own, tokenizer, tmp_path / "tokens", "pretrain.data", out) == first
