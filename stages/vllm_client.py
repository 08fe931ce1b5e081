"""A vLLM server over HTTP: token ids in, token ids and logprobs out, new weights from a folder.

It speaks to the server of `vllm serve`: `/v1/completions` for responses and, for the weights, the
development endpoints `/server_info`, `/collective_rpc` and `/reset_prefix_cache`, which the server
opens with VLLM_SERVER_DEV_MODE=1. Weights travel as a safetensors folder that both sides see
(`reload_weights`): no NCCL group, so trainer and server need no common GPU library. vLLM itself is
not imported: its releases pin other transformers than ours.
"""

from __future__ import annotations

import http.client
import json
import math
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import StageError
from stages.generation import Generated

START = (
    "Start the server in vLLM's own environment: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL_FOLDER"
    " --logprobs-mode processed_logprobs (see docs/engines.md)."
)
_ATTEMPTS = 3
_BACKOFF_SECONDS = 1.0
_BUSY = (502, 503, 504)


class VllmClient:
    """The calls that PPO makes to one server; every failure is a StageError that names the URL.

    url: http(s)://HOST:PORT. timeout_seconds: for each call. model, max_length: what the server
    says of its model; read by `connect`.
    """

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self.url = url
        self.timeout_seconds = timeout_seconds
        self.model = ""
        self.max_length = 0

    def connect(self) -> None:
        """Check that the server is there, can take weights and reports the logprobs that we need."""
        answer = self._call("GET", "/v1/models")
        try:
            card = answer["data"][0]
            self.model, self.max_length = str(card["id"]), int(card["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._wrong("/v1/models", "names no model", answer) from None
        answer = self._call("GET", "/server_info?config_format=json")
        try:
            mode = answer["vllm_config"]["model_config"]["logprobs_mode"]
        except (KeyError, TypeError):
            raise self._wrong("/server_info", "has no logprobs_mode", answer) from None
        if mode != "processed_logprobs":
            raise StageError(
                f"{self.url}: the server reports {mode}, which ignore the temperature", START
            )

    def complete(
        self,
        prompt: list[int],
        seed: int,
        *,
        eos_id: int,
        vocab_size: int,
        max_response_tokens: int,
        temperature: float,
    ) -> Generated:
        """One response to `prompt`, checked: nothing of a wrong answer reaches the training.

        One request for each prompt, because a seed belongs to a request: several prompts in one
        would share their random numbers. All else that shapes the distribution is switched off
        here: the server takes defaults from the model's generation_config.json.
        """
        if len(prompt) + max_response_tokens > self.max_length:
            raise StageError(
                f"{self.url}: prompt ({len(prompt)} tokens) and response ({max_response_tokens})"
                f" exceed the server's {self.max_length} tokens",
                "Start the server with a larger --max-model-len.",
            )
        body = {
            "model": self.model,
            "prompt": prompt,
            "add_special_tokens": False,
            "n": 1,
            "seed": seed,
            "max_tokens": max_response_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # our end token and no other: generation_config.json may name more
            "ignore_eos": True,
            "stop_token_ids": [eos_id],
            "logprobs": 0,
            "return_token_ids": True,
        }
        path = "/v1/completions"
        answer = self._call("POST", path, body)
        try:
            (choice,) = answer["choices"]
            tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            problem = _problem(tokens, logprobs, eos_id, vocab_size, max_response_tokens)
        except (KeyError, TypeError, ValueError):
            raise self._wrong(
                path, "is not one choice with token ids and logprobs", answer
            ) from None
        if problem:
            raise self._wrong(path, problem, answer)
        # a server may say 1e-9 for a sure token
        return Generated(tokens, [min(float(x), 0.0) for x in logprobs], tokens[-1] == eos_id)

    def load_weights(self, folder: Path) -> None:
        """Make the server read its weights from `folder` and forget what it cached under others.

        The caller waits for all its responses before.
        """
        kwargs = {"weights_path": str(folder)}
        # the server gives up first, so that its own message is seen
        timeout = self.timeout_seconds * 0.9
        body = {"method": "reload_weights", "kwargs": kwargs, "timeout": timeout}
        self._call("POST", "/collective_rpc", body)
        for attempt in range(_ATTEMPTS):
            answer = self._call("POST", "/reset_prefix_cache", {})
            # before vLLM 0.26 the answer was empty
            if answer in ({}, {"success": True}):
                return
            time.sleep(_BACKOFF_SECONDS * 2**attempt)
        raise StageError(
            f"{self.url}: the server keeps its prefix cache, computed with the last weights",
            "Does another program use this server? Give PPO one of its own.",
        )

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The server's answer as plain values; {} where it says nothing.

        Tried again only where the server was not reached or said that it is busy. A call that ran
        out of time is not: it would take as long again.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                status, text = self._once(method, path, body)
            except TimeoutError:
                raise StageError(
                    f"{self.url}{path}: no answer within {self.timeout_seconds:g} s",
                    "Is the server overloaded or hanging? Look at its log, or raise"
                    " ppo.rollout.vllm_timeout_seconds.",
                ) from None
            except (OSError, http.client.HTTPException) as error:
                problem = StageError(f"{self.url}{path}: {error or type(error).__name__}", START)
            else:
                if status == 200:
                    return self._parsed(path, text)
                problem = self._refused(path, status, text)
                if status not in _BUSY:
                    raise problem
            if attempt < _ATTEMPTS:
                time.sleep(_BACKOFF_SECONDS * 2 ** (attempt - 1))
        raise problem

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        parts = urlsplit(self.url)
        # not urllib: it would ask the machine's proxy for a loopback address
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        connection = kind(str(parts.hostname), parts.port, timeout=self.timeout_seconds)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def _parsed(self, path: str, text: str) -> Any:
        try:
            return json.loads(text) if text.strip() else {}
        except json.JSONDecodeError:
            raise self._wrong(path, "is not JSON", text) from None

    def _refused(self, path: str, status: int, text: str) -> StageError:
        hint = "Look at the server's log."
        if status == 404:
            hint = f"This path is missing on the server. {START}"
        elif path == "/collective_rpc":
            hint = (
                "The server must see the folder under the same path (ppo.rollout.vllm_weights_dir)"
                " and serve the model that is trained."
            )
        return StageError(f"{self.url}{path}: status {status}: {_short(text)}", hint)

    def _wrong(self, path: str, what: str, answer: Any) -> StageError:
        return StageError(
            f"{self.url}{path}: the answer {what}: {_short(answer)}",
            "Is this a vLLM server of the model that is trained? Tested against vLLM 0.32.",
        )


def _problem(
    tokens: list[int],
    logprobs: list[float],
    eos_id: int,
    vocab_size: int,
    max_response_tokens: int,
) -> str | None:
    """What is wrong with a response, or None."""
    if not all(type(token) is int for token in tokens):
        return "has token ids that are no integers"
    if not 1 <= len(tokens) <= max_response_tokens:
        return f"has {len(tokens)} tokens, not 1 to {max_response_tokens}"
    if outside := [token for token in tokens if not 0 <= token < vocab_size]:
        return f"has token ids outside the vocabulary of {vocab_size}: {outside[:3]}"
    if eos_id in tokens[:-1]:
        return f"goes on after the end token {eos_id}"
    if tokens[-1] != eos_id and len(tokens) < max_response_tokens:
        return f"ends after {len(tokens)} tokens without the end token {eos_id}"
    if len(logprobs) != len(tokens):
        return f"has {len(logprobs)} logprobs for {len(tokens)} tokens"
    if not all(isinstance(x, int | float) and math.isfinite(x) and x < 1e-3 for x in logprobs):
        return "has logprobs that are no logprobs"
    return None


def _short(answer: Any) -> str:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return text if len(text) <= 300 else text[:300] + " ..."
