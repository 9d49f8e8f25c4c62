"""One collective per step and sharded mesh dimension, clipping included; as one of four ranks of a fake group."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn


pytest.importorskip("torch.testing._internal.distributed.fake_pg")

from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor.debug import CommDebugMode  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

import hf_swd  # noqa: E402


WORLD = 4


@pytest.fixture(autouse=True)
def four_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    yield
    dist.destroy_process_group()


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.LayerNorm(8))


def fsdp2(shape: tuple[int, ...] = (WORLD,)) -> nn.Module:
    names = ("replicate", "shard")[-len(shape) :]
    return fully_shard(model(), mesh=dist.init_device_mesh("cpu", shape, mesh_dim_names=names))


def hsdp() -> nn.Module:
    return fsdp2((2, 2))


def tensor_parallel(data: int = 1) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (data, WORLD // data), mesh_dim_names=("dp", "tp"))
    parallel = parallelize_module(model(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(parallel, mesh=mesh["dp"]) if data > 1 else parallel


def fsdp2_with_tensor_parallel() -> nn.Module:
    return tensor_parallel(2)


def ddp() -> nn.Module:
    return nn.parallel.DistributedDataParallel(model())


@pytest.mark.parametrize("clip", ["in the step", "before", "none"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["adams", "scheduled"])
@pytest.mark.parametrize(
    ("build", "expected"), [(ddp, 0), (fsdp2, 1), (hsdp, 1), (tensor_parallel, 1), (fsdp2_with_tensor_parallel, 2)]
)
def test_collectives_per_step(build: Callable[[], nn.Module], expected: int, scheduled: bool, clip: str) -> None:
    options = {"max_grad_norm": 1e-2} if clip == "in the step" else {}
    params = list(build().parameters())
    with torch.no_grad():
        for p in params:
            p.fill_(0.1)  # what the fake group has made of them is anything
    if scheduled:
        optimizer = torch.optim.AdamW(params, lr=1e-3)
        schedule = hf_swd.ScheduledWeightDecay(optimizer, **options)
    else:
        optimizer = schedule = hf_swd.AdamS(params, lr=1e-3, **options)
    if clip == "before":
        expected *= 2  # it keeps nothing for the step
    for step in range(4):
        for i, p in enumerate(params):
            # A parameter without a gradient at some steps changes nothing.
            p.grad = None if i == step else torch.full_like(p, 0.1)
        with CommDebugMode() as seen:
            if clip == "before":
                schedule.clip_grad_norm_(1e-2)
            optimizer.step()
        assert seen.get_total_counts() == expected, f"step {step}: {dict(seen.get_comm_counts())}"
    assert schedule.grad_rms > 0


@pytest.mark.parametrize("build", [fsdp2, tensor_parallel, fsdp2_with_tensor_parallel])
def test_steps_under_another_default_device(build: Callable[[], nn.Module]) -> None:
    params = list(build().parameters())
    optimizer = hf_swd.AdamS(params, lr=1e-3, max_grad_norm=1e-2)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = None if i == step else torch.full_like(p, 0.1)
        with torch.device("meta"):
            optimizer.step()
    assert optimizer.grad_rms > 0
