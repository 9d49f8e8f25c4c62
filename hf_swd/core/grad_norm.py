"""Norms of gradients, and clipping to them: right for tensors of any size and sharding, without large temporaries.

Why not `torch.nn.utils.get_total_norm`: on CPU one long float32 accumulation loses precision with the size of the
tensor (2.6e-3 of the squared norm for 23 million elements), and a sharded run would then differ from an unsharded one.
"""

from __future__ import annotations

import math
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
# Tensors of at most so many elements are copied beside others of their shape, so that an operator is called for many.
_SHORT = 1 << 14
# Low-precision gradients are widened a slice at a time, and short tensors copied: 2^12 rows are 4 MiB of float32.
_SLICE_ROWS = 1 << 12

_KIND = attrgetter("device", "dtype")
_SHAPE = attrgetter("shape")
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


def placed_as(grad: Tensor, param: Tensor) -> Tensor:
    """A DTensor divided among ranks as its parameter is; any other tensor as it is. Autograd may leave it whole on
    each rank, or as addends (a "partial" placement): what a rank then holds is no gradient of what it holds of the
    parameter."""
    if not (is_dtensor(grad) and is_dtensor(param)) or grad.placements == param.placements:
        return grad
    return grad.redistribute(placements=param.placements)


def squared_norms(tensors: list[Tensor]) -> Tensor:
    """
    Squared 2-norm of each tensor.

    Args:
        tensors (`list[Tensor]`): dense tensors of any shape, stride, floating or complex dtype and device; of a
            DTensor the part that this rank holds.

    Returns:
        `Tensor`: shape `(len(tensors),)`, float64 (float32 on MPS), on the device of the first tensor. The relative
        error is below 1e-6 for any size. No host synchronisation.
    """
    return _power_sums(tensors, 2)


def sums(tensors: list[Tensor]) -> Tensor:
    """Sum of the elements of each tensor (of both parts of complex ones), none of which is negative; arguments, result
    and error as [`squared_norms`]."""
    return _power_sums(tensors, 1)


def _power_sums(tensors: list[Tensor], power: int) -> Tensor:
    """Sum of `|x|^power` over the elements of each tensor."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    device = tensors[0].device
    dtype = accumulation_dtype(device)
    tensors = local_parts(tensors)
    kinds = by_kind(tensors)
    if any(kind_dtype.is_complex for _, kind_dtype in kinds):
        tensors = [real_view(t) for t in tensors]
        kinds = by_kind(tensors)

    results: list[Tensor] = []
    for (kind_device, kind_dtype), indices in kinds.items():
        kind = tensors if len(kinds) == 1 else [tensors[i] for i in indices]
        if kind_device.type == "cpu":
            of_kind = _power_sums_on_cpu(kind, power)
        else:
            norms = torch._foreach_norm(kind, power, torch.float32 if kind_dtype in HALF else None)  # pyright: ignore[reportPrivateImportUsage]
            of_kind = torch.stack(norms).to(accumulation_dtype(kind_device)) ** power
        results.append(of_kind.to(device, dtype, non_blocking=device.type != "cpu"))
    return _in_order(results, list(kinds.values()))


def real_view(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one of its real and imaginary parts; any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _in_order(values: list[Tensor], indices: list[list[int]]) -> Tensor:
    """The vector that has the elements of each of the vectors `values` at the places `indices`."""
    if len(values) == 1:
        return values[0]
    places = torch.tensor([i for part in indices for i in part], device="cpu").to(values[0].device, non_blocking=True)
    joined = torch.cat(values)
    return torch.empty_like(joined).index_copy_(0, places, joined)


def _power_sums_on_cpu(tensors: list[Tensor], power: int) -> Tensor:
    """Of real tensors of one dtype."""
    half = tensors[0].dtype in HALF
    shapes: dict[torch.Size, list[int]] = defaultdict(list)
    for i, shape in enumerate(map(_SHAPE, tensors)):
        shapes[shape].append(i)
    results: list[Tensor] = []
    for shape, indices in shapes.items():
        numel = shape.numel()
        if numel > _SHORT:
            results.append(torch.stack([_power_sum_of_long(tensors[i], power) for i in indices]))
            continue
        # Beside others of its shape, so that an operator is called for many.
        size = _ROW * _SLICE_ROWS // max(numel, 1)
        for chunk in (indices[start : start + size] for start in range(0, len(indices), size)):
            table = torch.stack([tensors[i] for i in chunk]).reshape(len(chunk), numel)
            results.append(_power_sums_of_rows(table.float() if half else table, power))
    return _in_order(results, [*shapes.values()])


def _power_sum_of_long(tensor: Tensor, power: int) -> Tensor:
    if not is_dense(tensor):  # overlapping or gapped memory: copy pieces no larger than a slice
        size = max(1, tensor.shape[0] * _ROW * _SLICE_ROWS // tensor.numel())
        pieces = torch.split(tensor, size)
        return torch.stack([_power_sum_of_long(piece.contiguous(), power) for piece in pieces]).sum()
    flat = _in_memory_order(tensor).view(-1)
    rows, tail = divmod(flat.numel(), _ROW)
    table = flat.as_strided((rows, _ROW), (_ROW, 1))
    half = tensor.dtype in HALF
    norms = [
        _norm(part.float() if half else part, power, dim=1)
        for part in (torch.split(table, _SLICE_ROWS) if half else [table])
    ]
    if tail:
        norms.append(flat[rows * _ROW :].abs().to(norms[0].dtype))
    return _norm((torch.cat(norms) if len(norms) > 1 else norms[0]).double(), power, dim=0) ** power


def _power_sums_of_rows(table: Tensor, power: int) -> Tensor:
    """For each row of a matrix, in float64."""
    rows, tail = divmod(table.shape[1], _ROW)
    pieces = table[:, : rows * _ROW].view(len(table), rows, _ROW)
    results = _norm(pieces, power, dim=2).double().pow_(power).sum(1)
    if tail:
        results += _norm(table[:, rows * _ROW :], power, dim=1).double().pow_(power)
    return results


def _norm(tensor: Tensor, power: int, dim: int) -> Tensor:
    """The norm of order `power`, 1 or 2; for 1, of which torch's takes five times as long, no element is negative."""
    norm: Tensor = tensor.sum(dim) if power == 1 else torch.linalg.vector_norm(tensor, power, dim=dim)
    return norm


def _in_memory_order(tensor: Tensor) -> Tensor:
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory exactly, each once."""
    return tensor.is_contiguous() or _in_memory_order(tensor).is_contiguous()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor | None:
    """What gradients of total norm `norm` (0-d) are multiplied by, as `torch.nn.utils.clip_grad_norm_` does it: 0-d,
    or `None` where the host knows that there is nothing to clip. (It does not wait for an accelerator to ask.)"""
    if max_norm == math.inf or (norm.device.type == "cpu" and norm + 1e-6 <= max_norm):
        return None
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors (of a DTensor the part that this rank holds) in place by a number (0-d)."""
    parts = local_parts(tensors)
    for (device, dtype), indices in by_kind(parts).items():
        torch._foreach_mul_([parts[i] for i in indices], factor.to(device, dtype, non_blocking=True))  # pyright: ignore[reportPrivateImportUsage]
