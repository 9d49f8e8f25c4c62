"""Squared norms of gradients, right for any number, size and sharding of tensors, without parameter-sized temporaries.

Why not `torch.nn.utils.get_total_norm`: on CPU one long float32 accumulation loses precision with the size of the
tensor (2.6e-3 of the squared norm for 23 million elements), and a sharded run would then differ from an unsharded one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor


if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


HALF = (torch.float16, torch.bfloat16)

# On CPU. Rounding errors of a float32 accumulation all have one sign where values are few-bit numbers (what autocast
# leaves in float32 gradients) or equal: over a row of 2^8 elements they add up to 6e-7 at most. Rows are summed in
# float64.
_ROW = 1 << 8
# Up to here one operator for many tensors, accumulating in float64, takes less time than one for the rows of each.
_SHORT = 1 << 12
# Low-precision gradients are widened a slice at a time: 2^12 rows are 4 MiB of float32.
_SLICE_ROWS = 1 << 12

_KIND = attrgetter("device", "dtype")
_PLAIN = {Tensor, torch.nn.Parameter}


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The dtype that sums over the whole model are kept in: float64, or float32 on a device without it (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def by_kind(tensors: Sequence[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Indices of the tensors of each device and dtype, which multi-tensor kernels take together."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, kind in enumerate(map(_KIND, tensors)):
        kinds[kind].append(index)
    return kinds


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, whose class not every build of torch has."""
    return hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_parts(tensors: list[Tensor]) -> list[Tensor]:
    """[`local_part`] of each."""
    # A missing attribute costs a microsecond, and there may be thousands of tensors.
    return tensors if _PLAIN.issuperset(map(type, tensors)) else [local_part(tensor) for tensor in tensors]


def without_pending_sums(tensor: Tensor) -> Tensor:
    """A DTensor whose ranks still hold addends (a "partial" placement), summed; any other tensor as it is."""
    if not is_dtensor(tensor) or not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])


def squared_norms(tensors: list[Tensor]) -> Tensor:
    """
    Squared 2-norm of each tensor.

    Args:
        tensors (`list[Tensor]`): dense tensors of any shape, stride, floating or complex dtype and device; of a
            DTensor the part that this rank holds.

    Returns:
        `Tensor`: shape `(len(tensors),)`, float64 (float32 on MPS), on the device of the first tensor. The relative
        error is below 1e-6 for any size. No host synchronisation. Differentiable where gradients are enabled.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    device = tensors[0].device
    dtype = accumulation_dtype(device)
    tensors = local_parts(tensors)
    if any(map(torch.is_complex, tensors)):
        tensors = [real_view(t) for t in tensors]
    if torch.is_grad_enabled():
        return torch.stack([t.to(device, dtype).square().sum() for t in tensors])

    result: dict[int, Tensor] = {}
    for (kind_device, kind_dtype), indices in by_kind(tensors).items():
        kind = [tensors[i] for i in indices]
        if kind_device.type == "cpu":
            squares = _squared_norms_on_cpu(kind)
        else:
            squares = torch.stack(torch._foreach_norm(kind, 2, torch.float32 if kind_dtype in HALF else None))  # pyright: ignore[reportPrivateImportUsage]
            squares = squares.to(accumulation_dtype(kind_device)).square()
        squares = squares.to(device, dtype, non_blocking=device.type != "cpu")
        if len(indices) == len(tensors):
            return squares
        result.update(zip(indices, squares.unbind(), strict=True))
    return torch.stack([result[i] for i in range(len(tensors))])


def sums(tensors: list[Tensor]) -> Tensor:
    """Sum of the elements of each tensor (of both parts of complex ones) in float64; arguments and result as
    [`squared_norms`]."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    device = tensors[0].device
    dtype = accumulation_dtype(device)
    locals_ = [real_view(t) for t in local_parts(tensors)]
    return torch.stack([t.sum(dtype=accumulation_dtype(t.device)).to(device, dtype) for t in locals_])


def real_view(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one of its real and imaginary parts; any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _squared_norms_on_cpu(tensors: list[Tensor]) -> Tensor:
    """Of real tensors of one dtype."""
    result = torch.zeros(len(tensors), dtype=torch.float64)
    half = tensors[0].dtype in HALF
    # What is left to be squared and summed in float64, and the index of the tensor that it is of.
    parts: list[Tensor] = []
    owners: list[int] = []
    for i, tensor in enumerate(tensors):
        if tensor.numel() <= _SHORT:
            parts.append(tensor)
            owners.append(i)
            continue
        if not _is_dense(tensor):  # overlapping or gapped memory: copy pieces no larger than a slice
            size = max(1, tensor.shape[0] * _ROW * _SLICE_ROWS // tensor.numel())
            result[i] += sum(_squared_norms_on_cpu([piece.contiguous()])[0] for piece in torch.split(tensor, size))
            continue
        flat = _in_memory_order(tensor).view(-1)
        rows, tail = divmod(flat.numel(), _ROW)
        table = flat.as_strided((rows, _ROW), (_ROW, 1))
        new = [
            torch.linalg.vector_norm(part.float() if half else part, dim=1)
            for part in (torch.split(table, _SLICE_ROWS) if half else [table])
        ]
        if tail:
            new.append(flat[rows * _ROW :])
        parts += new
        owners += [i] * len(new)
    if parts:
        squares = torch.stack(torch._foreach_norm(parts, 2, torch.float64)).square()  # pyright: ignore[reportPrivateImportUsage]
        result.index_add_(0, torch.tensor(owners), squares)
    return result


def _in_memory_order(tensor: Tensor) -> Tensor:
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory exactly, each once."""
    return tensor.is_contiguous() or _in_memory_order(tensor).is_contiguous()
