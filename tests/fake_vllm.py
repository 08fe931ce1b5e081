"""A server that speaks the part of vLLM's HTTP protocol that we use, with a real tiny model behind it.

Written after the answers of vLLM 0.32. `fault` makes it misbehave; `log` keeps what it was asked.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedModel

from stages.generation import generate

SLOW_SECONDS = 3.0


class FakeVllm(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    # connections that wait to be accepted: with the usual 5 a busy machine resets some
    request_queue_size = 128

    def __init__(self, model: PreTrainedModel, eos_id: int, pad_id: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.eos_id, self.pad_id = copy.deepcopy(model), eos_id, pad_id
        self.lock = threading.Lock()
        self.fault = ""
        self.failures_left = 0  # of the fault "busy"
        self.caches_computed_with: set[int] = set()
        self.weights = 0  # how often they were loaded
        self.log: list[tuple[str, dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, path: str) -> list[dict[str, Any]]:
        return [body for found, body in self.log if found == path]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and body of the answer."""
        route, _, query = path.partition("?")
        self.log.append((route, body))
        if self.fault == f"slow {route}":
            time.sleep(SLOW_SECONDS)
        if self.fault == f"missing {route}":
            return 404, {"detail": "Not Found"}
        if self.fault == f"not json {route}":
            return 200, "<html>a proxy's greeting</html>"
        if self.fault == f"busy {route}" and self.failures_left:
            self.failures_left -= 1
            return 503, {"error": "starting"}
        if route == "/v1/models":
            length = self.model.config.max_position_embeddings
            return 200, {"object": "list", "data": [{"id": "tiny", "max_model_len": length}]}
        if route == "/server_info" and query == "config_format=json":
            mode = "raw_logprobs" if self.fault == "raw" else "processed_logprobs"
            return 200, {"vllm_config": {"model_config": {"logprobs_mode": mode}}}
        if route == "/collective_rpc":
            return self.reload(body)
        if route == "/reset_prefix_cache":
            if self.fault != "cache kept":
                self.caches_computed_with = set()
            return 200, {"success": self.fault != "cache kept"}
        if route == "/v1/completions":
            return self.complete(body)
        return 404, {"detail": "Not Found"}

    def reload(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["method"] != "reload_weights":
            return 500, {"error": f"no method {body['method']}"}
        try:
            state = load_file(f"{body['kwargs']['weights_path']}/model.safetensors")
        except OSError as error:
            return 500, {"error": {"message": f"cannot find model weights: {error}"}}
        if self.fault != "weights ignored":
            self.model.load_state_dict(state, strict=False)
            self.model.tie_weights()
        self.weights += 1
        return 200, {"results": [None]}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.caches_computed_with.add(self.weights)
            assert self.caches_computed_with == {self.weights}, "a cache of other weights"
            (got,) = generate(
                self.model,
                [body["prompt"]],
                [body["seed"]],
                eos_id=body["stop_token_ids"][0],
                pad_id=self.pad_id,
                max_response_tokens=body["max_tokens"],
                temperature=body["temperature"],
            )
        tokens, logprobs = list(got.tokens), list(got.logprobs)
        reason = "stop" if got.ended else "length"
        choice = {
            "index": 0,
            "text": "never read",
            "token_ids": tokens,
            "prompt_token_ids": body["prompt"],
            "logprobs": {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": logprobs},
            "finish_reason": reason,
        }
        choices = [choice]
        match self.fault:
            case "no choices":
                choices = []
            case "outside":
                tokens[0] = 10**6
            case "text only":
                del choice["token_ids"]
            case "no end":
                del tokens[1:], logprobs[1:]
                tokens[0] = 5
            case "past the end":
                tokens[:] = [self.eos_id, *tokens][: body["max_tokens"]]
                logprobs[:] = [-1.0] * len(tokens)
            case "too long":
                tokens[:] = [5] * (body["max_tokens"] + 1)
                logprobs[:] = [-1.0] * len(tokens)
            case "too few logprobs":
                del logprobs[-1]
            case "no numbers":
                logprobs[0] = None  # type: ignore[call-overload]
            case "positive":
                logprobs[0] = 0.5
        return 200, {"id": "cmpl-1", "object": "text_completion", "choices": choices}


class Handler(BaseHTTPRequestHandler):
    server: FakeVllm

    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: dict[str, Any]) -> None:
        status, answer = self.server.answer(self.path, body)
        payload = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(model: PreTrainedModel, eos_id: int, pad_id: int) -> Iterator[FakeVllm]:
    """A running server; it ends with the block."""
    server = FakeVllm(model, eos_id, pad_id)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients may hang up
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
