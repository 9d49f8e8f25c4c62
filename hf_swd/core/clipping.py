"""Clipping gradients to a total norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .grad_norm import by_kind, local_parts


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
