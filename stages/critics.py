"""The policy with its critic, in three kinds, and the forward passes that train them.

separate: the critic is a model of its own, initialised from the reward model (InstructGPT, arXiv
    2203.02155, section 3.5): nothing that it learns can harm the policy. The default.
shared:   the critic is a linear head, begun at zero, on the policy's last hidden state (Ziegler et al.,
    arXiv 1909.08593): one forward and one backward pass instead of two, and the values of a rollout
    come with its decoding. The fast one.
lora:     policy and critic are adapters on one frozen base. The default with `ppo.lora`.

A pass is a module that maps `Sequences` to `TokenOutputs`; a kind has one or two of them. What a
pass leaves None, the other one gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.rollout import Sequences, all_logprobs, in_full, over_responses, response_logprobs
from stages.sharding import whole

# parameters of the critic's adapter inside a PeftModel
_OF_VALUE = re.compile(r"\.lora_\w+\.value\.")


class TokenOutputs(NamedTuple):
    """What a pass says of the response tokens: `[B, R]` each, 0 where not valid, or None.

    ptx_logprobs_BR: of the pretraining rows that were given with the batch.
    """

    logprobs_BR: Tensor | None = None
    entropy_BR: Tensor | None = None
    values_BR: Tensor | None = None
    ptx_logprobs_BR: Tensor | None = None


class PolicyPass(nn.Module):
    """Logprobs and entropy under the policy."""

    def __init__(
        self, policy: nn.Module, temperature: float, entropy_gradient: bool = False
    ) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.entropy_gradient = entropy_gradient

    def logprobs(self, batch: Sequences) -> tuple[Tensor, Tensor | None]:
        return response_logprobs(self.policy, batch, self.temperature, True, self.entropy_gradient)

    def forward(self, batch: Sequences, ptx: Sequences | None = None) -> TokenOutputs:
        logprobs_BR, entropy_BR = self.logprobs(batch)
        return TokenOutputs(logprobs_BR, entropy_BR, None, self.ptx_logprobs(ptx))

    def ptx_logprobs(self, ptx: Sequences | None) -> Tensor | None:
        # the language-modelling loss of pretraining knows no temperature
        return None if ptx is None else response_logprobs(self.policy, ptx, 1.0)[0]


class ValuePass(nn.Module):
    """Values from a model of its own: a reward model read at every response token.

    mean, std: normalisation of the reward model, so that values start on the scale of the scores.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, mean: float = 0.0, std: float = 1.0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.mean = mean
        self.std = std

    def forward(self, batch: Sequences, ptx: Sequences | None = None) -> TokenOutputs:
        return TokenOutputs(values_BR=self.values(batch))

    def values(self, batch: Sequences) -> Tensor:
        """The value of the state before each response token, `[B, R]`, float32."""
        hidden_BTH = self.backbone(input_ids=batch.tokens_BT, use_cache=False).last_hidden_state
        values_N = in_full(self.head, hidden_BTH[batch.predicts_BT])
        return batch.spread((values_N - self.mean) / self.std)


class SharedPass(PolicyPass):
    """Logprobs, entropy and values from one forward pass of the policy."""

    def __init__(
        self,
        policy: nn.Module,
        head: nn.Linear,
        temperature: float,
        entropy_gradient: bool = False,
    ) -> None:
        super().__init__(policy, temperature, entropy_gradient)
        self.head = head

    def forward(self, batch: Sequences, ptx: Sequences | None = None) -> TokenOutputs:
        with _input_of_head(self.policy) as seen:
            logprobs_BR, entropy_BR = self.logprobs(batch)
        values_BR = batch.spread(in_full(self.head, seen[0]))
        return TokenOutputs(logprobs_BR, entropy_BR, values_BR, self.ptx_logprobs(ptx))


class LoraPass(PolicyPass):
    """Logprobs and values from two adapters, one after the other on the same base."""

    def __init__(
        self,
        policy: PeftModel,
        critic: ValuePass,
        temperature: float,
        entropy_gradient: bool = False,
    ) -> None:
        super().__init__(policy, temperature, entropy_gradient)
        self.critic = critic

    def forward(self, batch: Sequences, ptx: Sequences | None = None) -> TokenOutputs:
        outputs = super().forward(batch, ptx)
        return outputs._replace(values_BR=self.critic.values(batch))


class AdapterBackbone(nn.Module):
    """The base transformer under one adapter of a PeftModel; another one is active before and after."""

    def __init__(self, model: PeftModel, adapter: str) -> None:
        super().__init__()
        # not a submodule: the PeftModel is one already, and parameters must have one name
        self._model = (model,)
        self.adapter = adapter

    def forward(self, **inputs: Tensor | bool) -> object:
        model = self._model[0]
        with active(model, self.adapter):
            return model.get_base_model().base_model(**inputs)


@contextmanager
def active(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """Another adapter for a moment, or none at all: the bare base.

    What is trainable stays as it is: peft would make it the active adapter only.
    """
    before = model.active_adapter
    trainable = [p for p in model.parameters() if p.requires_grad]
    if adapter is None:
        model.base_model.disable_adapter_layers()
    else:
        model.set_adapter(adapter)
    try:
        yield
    finally:
        if adapter is None:
            model.base_model.enable_adapter_layers()
        model.set_adapter(before)
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _input_of_head(policy: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the output head of a language model reads, `[N, H]`."""
    seen: list[Tensor] = []
    handle = policy.get_output_embeddings().register_forward_pre_hook(  # type: ignore[operator]
        lambda _, args: seen.append(args[0])
    )
    try:
        yield seen
    finally:
        handle.remove()


@dataclass
class Agent:
    """Policy and critic, ready to be trained.

    passes: forward passes, each with its own backward pass. value_head: for the decode loop, where
    the critic reads what the policy's output head reads.
    """

    kind: str
    policy: PreTrainedModel | PeftModel
    passes: list[nn.Module]
    critic: ValuePass | None
    value_head: nn.Linear | None
    temperature: float
    from_zero: bool
    """The critic says 0 until it is trained."""

    def policy_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters of the policy by name; a tied one appears once."""
        return {
            name: p
            for name, p in self.policy.named_parameters()
            if p.requires_grad and not _OF_VALUE.search(name)
        }

    def value_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters of the critic alone."""
        if self.value_head is not None:
            return dict(self.value_head.named_parameters(prefix="head"))
        assert self.critic is not None
        found = {name: p for name, p in self.critic.named_parameters() if p.requires_grad}
        if self.kind == "lora":
            found |= {
                name: p
                for name, p in self.policy.named_parameters()
                if p.requires_grad and _OF_VALUE.search(name)
            }
        return found

    def logprobs(self, batch: Sequences, rows_at_once: int) -> Tensor:
        """Logprobs of the responses under the policy, `[B, R]`, without a gradient."""
        with whole(self.policy):
            return all_logprobs(self.policy, batch, self.temperature, rows_at_once)

    def values(self, batch: Sequences, rows_at_once: int) -> Tensor:
        """Values of the states before the response tokens, `[B, R]`, without a gradient."""

        def values(b: Sequences) -> Tensor:
            if self.critic is not None:
                return self.critic.values(b)
            assert self.value_head is not None
            with _input_of_head(self.policy) as seen:
                response_logprobs(self.policy, b, self.temperature)
            return b.spread(in_full(self.value_head, seen[0]))

        with whole(*self.read_by_critic()):
            return over_responses(values, batch, rows_at_once)

    def read_by_critic(self) -> list[nn.Module]:
        """The modules that `values` calls."""
        if self.critic is not None:
            return [self.critic.backbone, self.critic.head]
        assert self.value_head is not None
        return [self.policy, self.value_head]


def separate(
    policy: PreTrainedModel | PeftModel,
    critic: ValuePass,
    temperature: float,
    entropy_gradient: bool = False,
    from_zero: bool = False,
) -> Agent:
    passes = [critic, PolicyPass(policy, temperature, entropy_gradient)]
    return Agent("separate", policy, passes, critic, None, temperature, from_zero)


def shared(
    policy: PreTrainedModel | PeftModel, temperature: float, entropy_gradient: bool = False
) -> Agent:
    head = zero_head(policy)
    passes: list[nn.Module] = [SharedPass(policy, head, temperature, entropy_gradient)]
    return Agent("shared", policy, passes, None, head, temperature, from_zero=True)


def lora(
    policy: PeftModel,
    head: nn.Linear,
    temperature: float,
    mean: float = 0.0,
    std: float = 1.0,
    entropy_gradient: bool = False,
) -> Agent:
    """policy has an adapter `value` beside its own one; head reads the hidden state under it."""
    critic = ValuePass(AdapterBackbone(policy, "value"), head, mean, std)
    passes: list[nn.Module] = [LoraPass(policy, critic, temperature, entropy_gradient)]
    from_zero = not bool(head.weight.any())
    return Agent("lora", policy, passes, critic, None, temperature, from_zero)


def zero_head(policy: nn.Module) -> nn.Linear:
    """A linear head that says 0 until it is trained (Ziegler et al. 2019; N+ details, arXiv 2403.17031)."""
    embeddings = policy.get_output_embeddings()  # type: ignore[operator]
    head = nn.Linear(embeddings.weight.shape[1], 1, device=embeddings.weight.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
