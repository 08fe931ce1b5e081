"""What a language model learns to predict: the next token, or hidden words.

Shapes: B rows, T tokens of a row, M tokens to be predicted in each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.settings.pretrain import PretrainSettings
from stages.common import generator


@dataclass(frozen=True)
class Objective:
    """The loss of packed rows. end_id: documents end with it and do not see one another; None: they do."""

    kind: str
    end_id: int | None
    mask_id: int | None
    mask_fraction: float
    vocab_size: int
    seed: int

    def loss(self, model: nn.Module, tokens_BT: Tensor, rows: list[int], step: int) -> Tensor:
        """Mean cross-entropy over the predicted tokens, equally many in every row.

        rows, step: which rows these are and when; hidden words are drawn anew for each.
        """
        if self.kind == "masked":
            inputs_BT, labels_BT = self._hide(tokens_BT, rows, step)
            return model(input_ids=inputs_BT, labels=labels_BT).loss
        if self.end_id is None:
            return model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        # transformers masks between documents where positions begin anew, but only without a cache
        # and without a mask of ours (measured: a leak of 3 in the logits otherwise)
        return model(
            input_ids=tokens_BT,
            labels=tokens_BT,
            position_ids=document_positions(tokens_BT, self.end_id),
            use_cache=False,
        ).loss

    def _hide(self, tokens_BT: Tensor, rows: list[int], step: int) -> tuple[Tensor, Tensor]:
        """BERT (arXiv 1810.04805): 80 % of the words are hidden, 10 % replaced, 10 % left."""
        T = tokens_BT.shape[1]
        count = max(1, round(self.mask_fraction * T))
        draws = []
        for row in rows:
            rng = generator(self.seed, "pretrain", "mask", step, row)
            spots_M = torch.randperm(T, generator=rng)[:count]
            fate_M = torch.rand(count, generator=rng)
            draws.append((spots_M, fate_M, torch.randint(self.vocab_size, (count,), generator=rng)))
        spots_BM, fate_BM, random_BM = (
            torch.stack(parts).to(tokens_BT.device) for parts in zip(*draws, strict=True)
        )
        original_BM = tokens_BT.gather(-1, spots_BM)
        assert self.mask_id is not None
        hidden_BM = torch.where(fate_BM < 0.8, self.mask_id, original_BM)
        hidden_BM = torch.where(fate_BM >= 0.9, random_BM, hidden_BM)
        labels_BT = torch.full_like(tokens_BT, -100).scatter(-1, spots_BM, original_BM)
        return tokens_BT.scatter(-1, spots_BM, hidden_BM), labels_BT


def objective(
    own: PretrainSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Objective:
    """The objective that the settings ask for.

    Raises:
        ConfigError: the model cannot keep the documents of a row apart.
    """
    causal = own.objective == "causal"
    end_id = tokenizer.eos_token_id if causal and own.isolate_documents else None
    if end_id is not None:
        _check_isolation(model, end_id)
    mask_id = None if causal else tokenizer.mask_token_id
    return Objective(own.objective, end_id, mask_id, own.mask_fraction, len(tokenizer), seed)


def document_positions(tokens_BT: Tensor, end_id: int) -> Tensor:
    """Position of each token within its document, `[B, T]`; a document ends with `end_id`."""
    spots_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    begins_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    begins_BT[:, 1:] = tokens_BT[:, :-1] == end_id
    return spots_BT - torch.where(begins_BT, spots_BT, 0).cummax(-1).values


@torch.no_grad()
def _check_isolation(model: PreTrainedModel, end_id: int) -> None:
    """Some architectures (OPT, BLOOM, Mamba) do not look at where the positions begin anew."""
    words = [token for token in range(8) if token != end_id][:6]
    row_BT = torch.tensor([[*words[:3], end_id, *words[3:]]], device=model.device)
    packed = model(
        input_ids=row_BT, position_ids=document_positions(row_BT, end_id), use_cache=False
    ).logits[:, 4:]
    alone = model(input_ids=row_BT[:, 4:], use_cache=False).logits
    # measured: 1e-6 of the logits where documents are kept apart, as much as the logits where not
    if (packed - alone).abs().max() > 1e-3 * alone.abs().max():
        raise ConfigError(
            f"pretrain.isolate_documents: a {model.config.model_type} model cannot keep the documents"
            " of a row apart",
            "Set pretrain.isolate_documents: false, or take another model.architecture.",
        )
