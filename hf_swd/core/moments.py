"""Sums over the second moments that an Adam keeps in its state: where the recurrence has no past, or does not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .grad_norm import local_part, real_view, sums


def second_moment(state: Mapping[str, Any]) -> Tensor | None:
    """The second moment in an optimizer's state of a parameter, if there is one in floating point (not in Lion's)."""
    moment = state.get("exp_avg_sq")
    is_moment = isinstance(moment, Tensor) and (moment.is_floating_point() or moment.is_complex()) and "step" in state
    return moment if is_moment else None


def moment_sums(moments: Sequence[Tensor]) -> Tensor:
    """Sum of the elements of each (of a DTensor the part that this rank holds), of shape `(len(moments),)`."""
    return sums([_dequantized(local_part(moment)) for moment in moments])


def maximum_sum(
    grad: Tensor, state: Mapping[str, Any], beta2: float | Tensor, grad_scale: Tensor | None = None
) -> Tensor:
    """
    Sum of the maximum that AMSGrad will divide by in the coming step of a parameter (of a DTensor, over the part that
    is here).

    Args:
        grad: the parameter's gradient.
        state: the optimizer's state of the parameter.
        beta2: decay rate of the moment.
        grad_scale: what the gradients are to be divided by, if anything.
    """
    grad = real_view(local_part(grad if grad_scale is None else grad / grad_scale))
    # Squares of small half-precision numbers underflow.
    second = (1 - beta2) * grad.to(torch.promote_types(grad.dtype, torch.float32)).square()
    if "exp_avg_sq" in state:
        moment, maximum = (real_view(local_part(state[key])) for key in ("exp_avg_sq", "max_exp_avg_sq"))
        if torch.is_grad_enabled():  # the step will change it in place
            maximum = maximum.clone()
        second = torch.maximum(maximum, beta2 * moment + second)
    return sums([second])[0]


def _dequantized(moment: Tensor) -> Tensor:
    """The 8-bit, 4-bit and fp8 states of torchao have no operators, but can be widened."""
    return moment if type(moment).dequantize is Tensor.dequantize else moment.dequantize()
