"""AdamS keeps and allocates nothing of the size of a parameter beyond what AdamW does."""

from __future__ import annotations

import gc

import pytest
import torch
from lockstep import PATHS
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_swd import AdamS


NUMEL = 1 << 23  # much larger than any slice that a reduction may reasonably work in
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


class Allocations(TorchDispatchMode):
    """Sizes in bytes of the storages that operators make inside the block."""

    def __enter__(self):
        self.sizes: list[int] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.sizes.append(t.untyped_storage().nbytes())
        return result


def stepped(
    cls: type, dtype: torch.dtype, clip: str = "", refresh: bool = False, **kwargs
) -> tuple[torch.optim.Optimizer, list[int]]:
    """An optimizer with state, and what its second step allocates."""
    if clip == "option":
        kwargs["max_grad_norm"] = 1.0
    params = [Parameter(torch.ones(NUMEL, dtype=dtype)), Parameter(torch.ones(3, dtype=dtype))]
    optimizer = cls(params, **kwargs)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    if refresh:
        optimizer.schedule.refresh()
    with Allocations() as allocations:
        if clip == "method":
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    return optimizer, allocations.sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("refresh", [False, True], ids=["", "that-reads-the-moments"])
@every_path
def test_step_makes_no_more_large_tensors_than_adamw(path, refresh, dtype):
    large = NUMEL * dtype.itemsize
    _, mine = stepped(AdamS, dtype, refresh=refresh, **path)
    _, adamws = stepped(torch.optim.AdamW, dtype, **(path or {"fused": True}))

    assert sum(size >= large for size in mine) == sum(size >= large for size in adamws)
    assert max(size for size in mine if size < large) <= large / 4


@pytest.mark.parametrize("clip", ["method", "option"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_clipping_and_fused_step_make_no_large_tensor(dtype, clip):
    _, sizes = stepped(AdamS, dtype, clip=clip)

    assert max(sizes) <= NUMEL * dtype.itemsize / 4


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@every_path
def test_state_is_adamws(path, amsgrad):
    adams, _ = stepped(AdamS, torch.float32, amsgrad=amsgrad, **path)
    adamw, _ = stepped(torch.optim.AdamW, torch.float32, amsgrad=amsgrad, **path)

    for mine, its in zip(adams.state.values(), adamw.state.values(), strict=True):
        assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in its.items()}


@pytest.mark.parametrize("clip", ["", "method", "option"])
def test_schedule_holds_a_few_numbers_per_parameter(clip):
    """Counts every tensor in the process that is neither a parameter, nor a gradient, nor Adam's state."""
    gc.collect()
    before = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    params = [Parameter(torch.ones(1000)) for _ in range(50)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = AdamS(params, max_grad_norm=1.0 if clip == "option" else 0.0)
    for _ in range(3):
        if clip == "method":
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    gc.collect()

    accounted = {id(t) for p in params for t in (p, p.grad, *optimizer.state[p].values())}
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    extra = [t for t in tensors if id(t) not in accounted | before]
    assert sum(t.numel() for t in extra) <= 20 * len(params)
