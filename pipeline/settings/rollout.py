from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from pipeline.config import Strict, unhashed


class RolloutSettings(Strict):
    """What samples the responses of an update; docs/engines.md says when to use which."""

    engine: Literal["hf", "continuous", "vllm"] = "hf"
    """hf: our decode loop; continuous: paged batches of transformers; vllm: a vLLM server of yours."""
    importance_cap: float = Field(2.0, ge=1)
    """Cap of the weight pi_trainer / pi_engine where the engine's logprobs differ (Yao et al. 2025: 2)."""
    vllm_url: str = unhashed("http://127.0.0.1:8000")
    """Where the vLLM server listens: http(s)://HOST:PORT."""
    vllm_timeout_seconds: float = unhashed(600.0, gt=0)
    """A response or a weight update of the server that takes longer stops the run (TRL waits without end)."""
    vllm_requests: int = unhashed(64, ge=1)
    """Responses that one process asks the server for at the same time (TRL: 64)."""
    vllm_max_gap: float = unhashed(0.2, gt=0)
    """Mean difference of the server's logprobs from the policy's, in nats a token, that stops the run."""
    vllm_weights_dir: str | None = unhashed(None)
    """Folder that trainer and server both see under this path; null is the step's own folder."""

    @field_validator("vllm_url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise ValueError(f"expected http://HOST:PORT, got {url!r}")
        _ = parts.port  # raises ValueError on a port that is no number
        return url.rstrip("/")
