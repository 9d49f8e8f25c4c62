"""Sums over the second moments that an Adam keeps in its state: where the recurrence must be rebuilt, or does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .grad_norm import local_part, real_view, sums


if TYPE_CHECKING:
    from torch.optim import Optimizer


__all__ = ["maximum_sums", "moment_sums"]


def moment_sums(optimizer: Optimizer, params: Sequence[Tensor]) -> tuple[list[int], Tensor, list[float]]:
    """
    Which of `params` the optimizer has stepped, the sum of the second moment of each of these (of the local part of a DTensor), and their
    step counts. With AMSGrad the moment is the maximum. An optimizer without `exp_avg_sq` in floating point has none.
    """
    amsgrad = {p for group in optimizer.param_groups if group.get("amsgrad") for p in group["params"]}
    indices, moments, steps = [], [], []
    for index, p in enumerate(params):
        state = optimizer.state.get(p, {})
        moment = state.get("max_exp_avg_sq" if p in amsgrad else "exp_avg_sq")
        if isinstance(moment, Tensor) and (moment.is_floating_point() or moment.is_complex()) and "step" in state:
            indices.append(index)
            moments.append(moment)
            steps.append(float(state["step"]))
    return indices, sums(moments), steps


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
                second = (1 - beta2) * grad.square()
                state: dict[str, Any] = optimizer.state.get(p, {})
                if "exp_avg_sq" in state:
                    moment, maximum = (real_view(local_part(state[key])) for key in ("exp_avg_sq", "max_exp_avg_sq"))
                    if torch.is_grad_enabled():  # the step will change it in place
                        maximum = maximum.clone()
                    second = torch.maximum(maximum, beta2 * moment + second)
                found[position] = sums([second])[0]
            position += 1
    return found
