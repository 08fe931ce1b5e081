"""One rank of two that tries what stages/sharding.py promises: `sharding_worker.py FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from pipeline.job import Job, Out
from pipeline.settings import Settings
from stages import sharding
from stages.checkpoints import load_optimizer, load_trainable, optimizer_tensors, trainable_tensors
from stages.common import adamw, clip_gradients, start
from tests.dist import shard_on_cpu
from tests.tiny_models import in_float64
from tests.tiny_models import tiny_model as tiny_model_in_fp32

RANK = int(os.environ["RANK"])
IDS = torch.arange(12).view(2, 6)


def tiny_model(kind: str, seed: int = 0) -> nn.Module:
    """In float64: AdamW makes steps of equal size of noise in a gradient that ought to be 0."""
    return tiny_model_in_fp32(kind, seed=seed).double()


def loss_of(model: nn.Module, rank: int) -> torch.Tensor:
    """Each rank has a row of its own."""
    return model(input_ids=IDS[rank : rank + 1], labels=IDS[rank : rank + 1]).loss


def train_alone(model: nn.Module, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process with both rows: the norms of its gradients, and its weights in the end."""
    optimizer, norms = adamw(model, 1e-2, 0.0), []
    for _ in range(steps):
        sum(loss_of(model, rank) for rank in (0, 1)).div(2).backward()
        norms.append(clip_gradients(model, 0.5))
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def try_model(kind: str, accelerator, folder: Path) -> None:
    norms, expected = train_alone(tiny_model(kind), 3)
    plain = tiny_model(kind)
    model = sharding.place(tiny_model(kind), accelerator)
    sizes = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    total = sum(p.numel() for p in plain.parameters())
    assert len(sizes) == len(list(model.parameters())), "all of it is in shards"
    assert 0.4 * total < sum(sizes) < 0.6 * total, "each rank has about half"
    assert sharding.exchange(model, accelerator) is model

    # rank 1 makes two passes inside `whole` and rank 0 none: nobody waits
    before = plain(input_ids=IDS).logits
    with torch.no_grad(), sharding.whole(model):
        for _ in range(2 * RANK):
            torch.testing.assert_close(model(input_ids=IDS).logits, before, atol=0, rtol=0)
        state = sharding.state_of(model)
        assert state.keys() == plain.state_dict().keys()
        for name, tensor in plain.state_dict().items():
            assert torch.equal(state[name], tensor), name
    assert all(isinstance(p, DTensor) for p in model.parameters()), "in shards again"

    with torch.no_grad():
        model(input_ids=IDS)  # leaves nothing gathered behind, which an optimiser would take for its own
    optimizer, found = adamw(model, 1e-2, 0.0), []
    for step in range(3):
        if step == 2:  # go on from a checkpoint, in another model
            groups = {"model": trainable_tensors(model), "optimizer": optimizer_tensors(optimizer)}
            for group, tensors in groups.items():
                kept = sharding.gathered(tensors, keep=RANK == 0)
                assert bool(kept) == (RANK == 0)
                if kept:
                    save_file(kept, folder / f"{kind}-{group}.safetensors")
            accelerator.wait_for_everyone()
            model = sharding.place(tiny_model(kind, seed=5), accelerator)
            optimizer = adamw(model, 1e-2, 0.0)
            load_trainable(model, load_file(folder / f"{kind}-model.safetensors"))
            load_optimizer(optimizer, load_file(folder / f"{kind}-optimizer.safetensors"))
        loss_of(model, RANK).backward()
        found.append(clip_gradients(model, 0.5))
        optimizer.step()
        optimizer.zero_grad()
    assert found == pytest.approx(norms, rel=1e-10)
    sharding.make_whole(model)
    for name, tensor in sharding.state_of(model).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-10, rtol=1e-9)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_default_dtype(torch.float64)
    shard_on_cpu.install()
    settings = Settings.model_validate({"model": {"base": "given", "precision": "fp32"}})
    job = Job("ppo", "ppo", "stages.ppo", 1, "0" * 12, folder, folder, {}, {}, {})
    out = Out(job, RANK, 2)
    # a child runs several stages: the second start must find shards asked for as well
    start(settings, out)
    accelerator = start(settings, out)
    assert sharding.is_sharded(accelerator)
    assert out.derived["sharded_over"] == 2
    assert sharding.most(3 + RANK, accelerator) == 4
    for kind in ("llama", "gpt2"):  # gpt2 ties its embeddings
        with in_float64():
            try_model(kind, accelerator, folder)
