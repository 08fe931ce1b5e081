"""Attention in fp32 under bf16 autocast: which arithmetic runs, and that it is the same attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from stages.attention import use_attention_in_fp32
from tests.tiny_models import KINDS, tiny_model


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    use_attention_in_fp32(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [True, False])
def test_attention_runs_in_fp32_where_wanted_and_everything_else_in_bf16(
    kind: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = []
    attend, linear = functional.scaled_dot_product_attention, functional.linear

    def spy(query: torch.Tensor, *args, **options):  # type: ignore[no-untyped-def]
        types.append(attend(query, *args, **options).dtype)
        return attend(query, *args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    model = tiny_model(kind, sharpness=1.0)
    tokens_BT = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    # one row is padded: the mask has to survive
    mask_BT = torch.ones_like(tokens_BT)
    mask_BT[0, :4] = 0
    exact = model(input_ids=tokens_BT, attention_mask=mask_BT).logits
    types.clear()
    use_attention_in_fp32(wanted)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens_BT, attention_mask=mask_BT).logits
        assert linear(torch.ones(1, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert set(types) == {torch.float32 if wanted else torch.bfloat16}
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - exact)[mask_BT.bool()].abs().max()
    assert 0 < error < 0.02 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_without_autocast_nothing_changes(kind: str) -> None:
    model = tiny_model(kind)
    tokens_BT = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=tokens_BT).logits
    use_attention_in_fp32(True)
    assert torch.equal(model(input_ids=tokens_BT).logits, before)
