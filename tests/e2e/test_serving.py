"""An exported policy behind `transformers serve`, asked as OpenAI's clients ask."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import export
from pipeline.workspace import open_run
from tests.unit.exported_run import make_run

openai = pytest.importorskip("openai", reason="transformers serve needs the package openai")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]
_PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        run = make_run(tmp_path_factory.mktemp("run"), patch)
    return export.export_folder(open_run(run), run.parent / "policy", export.Request())


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """`transformers serve` of the folder, in an environment that does not know us."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder.parent / "serve.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, *options],
            cwd=folder.parent,
            env=env | {"HF_HUB_OFFLINE": "1"},
            stdout=file,
            stderr=file,
        )
    try:
        base = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not _healthy(base):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield base
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()


def _healthy(base: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=5) as answer:
            return bool(json.load(answer)["status"] == "ok")
    except OSError:
        return False


def test_an_openai_client_is_answered(address: str, folder: Path) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=str(folder),
        messages=[{"role": "user", "content": "Say red 1"}],
        max_tokens=12,
        seed=1,
    )
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert isinstance(choice.message.content, str)
    assert choice.finish_reason in ("stop", "length")
    assert 0 < answer.usage.completion_tokens <= 12


def test_the_stream_and_raw_http_say_the_same_greedily(address: str, folder: Path) -> None:
    asked = {
        "model": str(folder),
        "messages": [{"role": "user", "content": "Say blue 2"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = _post(f"{address}/v1/chat/completions", {**asked, "stream": False})
    text = whole["choices"][0]["message"]["content"]
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    parts = client.chat.completions.create(**asked, stream=True)
    streamed = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert text == _greedy(folder, asked["messages"], 12)
    # a random model may end inside a character, which a stream does not show
    assert streamed.rstrip("\ufffd") == text.rstrip("\ufffd")
    assert streamed


def _post(url: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def _greedy(folder: Path, messages: Any, tokens: int) -> str:
    """What the model says when asked here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    given = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**given, max_new_tokens=tokens, do_sample=False)
    text = tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text
