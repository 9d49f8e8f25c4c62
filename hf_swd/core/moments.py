"""Sums over the second moments that an Adam keeps in its state: where the recurrence has no past, or does not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .grad_norm import local_part, real_view, sums


if TYPE_CHECKING:
    from torch.optim import Optimizer


__all__ = ["maximum_sums", "moment_sums", "second_moment"]


def second_moment(state: Mapping[str, Any]) -> Tensor | None:
    """The second moment in an optimizer's state of a parameter; `None` if there is none in floating point (Lion, bitsandbytes)."""
    moment = state.get("exp_avg_sq")
    is_moment = isinstance(moment, Tensor) and (moment.is_floating_point() or moment.is_complex()) and "step" in state
    return moment if is_moment else None


def moment_sums(moments: Sequence[Tensor]) -> Tensor:
    """Sum of the elements of each (of a DTensor the part that this rank holds), of shape `(len(moments),)`."""
    return sums([_dequantized(local_part(moment)) for moment in moments])


def maximum_sums(
    optimizer: Optimizer, beta2s: Sequence[float | Tensor], grad_scale: Tensor | None
) -> dict[int, Tensor]:
    """
    Sum of the maximum that AMSGrad will divide by in the coming step, for each parameter (by position) that has a gradient.

    Args:
        optimizer: its groups with `amsgrad` are looked at.
        beta2s: decay rate of the moment in each group.
        grad_scale: what the gradients are to be divided by, if anything.
    """
    found: dict[int, Tensor] = {}
    position = 0
    for group, beta2 in zip(optimizer.param_groups, beta2s, strict=True):
        for p in group["params"]:
            if group.get("amsgrad") and p.grad is not None:
                grad = real_view(local_part(p.grad if grad_scale is None else p.grad / grad_scale))
                second = (1 - beta2) * grad.to(torch.promote_types(grad.dtype, torch.float32)).square()
                state = optimizer.state.get(p, {})
                if "exp_avg_sq" in state:
                    moment, maximum = (real_view(local_part(state[key])) for key in ("exp_avg_sq", "max_exp_avg_sq"))
                    if torch.is_grad_enabled():  # the step will change it in place
                        maximum = maximum.clone()
                    second = torch.maximum(maximum, beta2 * moment + second)
                found[position] = sums([second])[0]
            position += 1
    return found


def _dequantized(moment: Tensor) -> Tensor:
    """The 8-bit, 4-bit and fp8 states of torchao have no operators, but can be widened."""
    return moment if type(moment).dequantize is Tensor.dequantize else moment.dequantize()
