"""The schedule's numbers where a torch optimizer keeps its state: 0-d tensors that change with the schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


__all__ = ["STEP", "SUM", "as_numbers"]

SUM = "second_moment_sum"
"""Key of the sum of Adam's second moment over a whole parameter."""
STEP = "second_moment_step"
"""Key of the number of steps that the sum is of."""


def as_numbers(values: Sequence[Tensor | float]) -> list[float]:
    """Each value (a number or a 0-d tensor) as a number; the host waits for an accelerator once."""
    tensors = {i: value.detach() for i, value in enumerate(values) if isinstance(value, Tensor)}
    if not tensors:
        return list(map(float, values))
    device = next(iter(tensors.values())).device
    numbers = torch.stack([tensor.to(device, torch.float64) for tensor in tensors.values()]).tolist()
    known = dict(zip(tensors, numbers, strict=True))
    return [known[i] if i in known else float(value) for i, value in enumerate(values)]
