"""Reading the mean second moment from the moments that Adam keeps in its state: where the recurrence has no past, or
does not hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .grad_norm import HALF, local_part, real_view, sums
from .gradients import GroupGradients


# Their second moment is the moving average of g^2, elementwise. That of others may be scaled (Prodigy), debiased
# (optimi), or there for some parameters only (Adafactor).
_ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)
_MOMENT = "exp_avg_sq"
# Relative difference that rounding of the moments can make; what differs more has another past.
_TOLERANCE = {torch.float32: 1e-5, torch.complex64: 1e-5, torch.float64: 1e-11, torch.complex128: 1e-11}


def keeps_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's `exp_avg_sq` is known to be Adam's second moment."""
    return isinstance(optimizer, _ADAMS)


def moments_in(states: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Whatever stands where Adam keeps the second moment; `None` if nothing does."""
    return [state.get(_MOMENT) for state in states]


def reading_tolerance(groups: Sequence[GroupGradients]) -> float | None:
    """How far, relatively, the mean that the recurrence gives may be from what the moments say, before it is taken for
    wrong; 0 if these parameters obey no common recurrence, and `None` if their moments cannot be read."""
    states = [state for group in groups for state in group.states]
    held = moments_in([state for state in states if state])
    moments = [m for m in held if isinstance(m, Tensor) and (m.is_floating_point() or m.is_complex())]
    if len(moments) < len(held):
        return None
    steps = set(_vector([state.get("step", 0.0) for state in states]).tolist())
    stepping = [group for group in groups if group.params]
    rates = {id(group.beta2) if isinstance(group.beta2, Tensor) else group.beta2 for group in stepping}
    dtypes = {local_part(m).dtype for m in moments}
    # Small changes of moments in half precision are rounded away, and a maximum is no moving average.
    if len(steps) > 1 or len(rates) > 1 or dtypes & set(HALF) or any(group.amsgrad for group in stepping):
        return 0.0
    return max((_TOLERANCE.get(dtype, 0.0) for dtype in dtypes), default=1e-11)


def read_moments(groups: Sequence[GroupGradients], squares: Tensor, grad_scale: Tensor | None) -> Tensor:
    """
    Addends of the mean.

    Args:
        groups: what steps together.
        squares (`Tensor`, shape `(params,)`): squared norms of the gradients, unscaled.
        grad_scale (0-d `Tensor`, *optional*): what the gradients are to be divided by (a GradScaler's).

    Returns:
        `Tensor`: shape `(params, 3)`: what is left of the moments, corrected for their bias; what the gradients add to
        it; the step count, this step included. For AMSGrad, the first two add up to the maxima after the step.
    """
    states = [state for group in groups for state in group.states]
    steps = _vector([state.get("step", 0.0) for state in states]).to(squares) + 1
    rates = _vector([group.beta2 for group in groups for _ in group.params]).to(squares)
    correction = 1 - rates**steps
    present = [i for i, state in enumerate(states) if state]
    before = torch.zeros_like(squares)
    before[present] = sums([states[i][_MOMENT] for i in present]).to(squares)
    old, new = rates * before / correction, (1 - rates) * squares / correction
    each = ((group, *pair) for group in groups for pair in zip(group.grads, group.states, strict=True))
    for i, (group, grad, state) in enumerate(each):
        if group.amsgrad:
            # At least what the moments add up to: in float16 the maxima underflow to 0.
            maximum = _maximum_sum(grad, state, group.beta2, grad_scale).to(squares) / correction[i]
            new[i] = torch.where(old[i] == math.inf, 0.0, torch.maximum(new[i], maximum - old[i]))
    return torch.stack([old, new, steps], dim=1)


def without_sync(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number where the host has it, else a 0-d tensor as `like`."""
    return value.to(like) if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def _vector(values: Sequence[float | Tensor]) -> Tensor:
    """Numbers and 0-d tensors as a vector, on an accelerator if any of them is there."""
    on_device = next((value for value in values if isinstance(value, Tensor) and value.device.type != "cpu"), None)
    if on_device is None:
        return torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")
    return torch.stack([torch.as_tensor(value, device=on_device.device).reshape(()) for value in values])


def _maximum_sum(grad: Tensor, state: Mapping[str, Any], beta2: float | Tensor, grad_scale: Tensor | None) -> Tensor:
    """Sum of the maximum that AMSGrad will divide by in the coming step (of a DTensor, over the part that is here)."""
    grad = real_view(local_part(grad if grad_scale is None else grad / grad_scale))
    # Squares of small half-precision numbers underflow.
    second = (1 - beta2) * grad.to(torch.promote_types(grad.dtype, torch.float32)).square()
    if state:
        moment, maximum = (real_view(local_part(state[key])) for key in (_MOMENT, "max_exp_avg_sq"))
        second = torch.maximum(maximum, beta2 * moment + second)
    return sums([second])[0]
