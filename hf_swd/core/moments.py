"""Reading the mean second moment from the moments that Adam keeps in its state: where the recurrence has no past, or
does not hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .grad_norm import HALF, local_part, real_view, sums


# Their second moment is the moving average of g^2, elementwise. That of others may be scaled (Prodigy), debiased
# (optimi), or there for some parameters only (Adafactor).
_ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)
_MOMENT = "exp_avg_sq"
# Relative difference that rounding of the moments can make; what differs more has another past.
_TOLERANCE = {torch.float32: 1e-5, torch.complex64: 1e-5, torch.float64: 1e-11, torch.complex128: 1e-11}


def keeps_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's `exp_avg_sq` is known to be Adam's second moment."""
    return isinstance(optimizer, _ADAMS)


def moment_ids(states: Sequence[Mapping[str, Any]]) -> list[int]:
    """By which replaced moments are noticed, without holding them."""
    return [id(state.get(_MOMENT)) for state in states]


class AdamParameter(NamedTuple):
    """A parameter with a gradient in the coming step, and what Adam keeps of it."""

    grad: Tensor
    state: Mapping[str, Any]
    beta2: float | Tensor
    amsgrad: bool


class MomentReader:
    """
    What the moments say of the mean, for parameters that step together. It holds none of them.

    Args:
        params (`Sequence[AdamParameter]`): all that have a gradient.
    """

    def __init__(self, params: Sequence[AdamParameter]) -> None:
        held = [param.state.get(_MOMENT) for param in params if param.state]
        moments = [m for m in held if isinstance(m, Tensor) and (m.is_floating_point() or m.is_complex())]
        self.can_read = len(moments) == len(held)
        """Whether every state has a moment."""
        steps = _vector([param.state.get("step", 0.0) for param in params]).tolist()
        betas = {id(param.beta2) if isinstance(param.beta2, Tensor) else param.beta2 for param in params}
        dtypes = {local_part(m).dtype for m in moments}
        # The recurrence needs one step count and one beta2 for all; small changes of moments in half precision are
        # rounded away, and a maximum obeys no recurrence.
        holds = len(set(steps)) <= 1 and len(betas) <= 1 and not dtypes & set(HALF)
        holds = holds and not any(param.amsgrad for param in params)
        self.tolerance = max((_TOLERANCE.get(dtype, 0.0) for dtype in dtypes), default=1e-11) if holds else 0.0
        """Relative difference from the recurrence that rounding explains; 0 where the recurrence does not hold."""

    def read(self, params: Sequence[AdamParameter], squares: Tensor, grad_scale: Tensor | None) -> Tensor:
        """
        Addends of the mean.

        Args:
            params: as in the constructor.
            squares (`Tensor`, shape `(params,)`): squared norms of the gradients, unscaled.
            grad_scale (0-d `Tensor`, *optional*): what the gradients are to be divided by (a GradScaler's).

        Returns:
            `Tensor`: shape `(params, 3)`: what is left of the moments, corrected for their bias; what the gradients
            add to it (for AMSGrad, what the maxima will be beyond it); the step count, this step included.
        """
        steps = _vector([param.state.get("step", 0.0) for param in params]).to(squares) + 1
        betas = _vector([param.beta2 for param in params]).to(squares)
        correction = 1 - betas**steps
        present = [i for i, param in enumerate(params) if param.state]
        before = torch.zeros_like(squares)
        before[present] = sums([params[i].state[_MOMENT] for i in present]).to(squares)
        old, new = betas * before / correction, (1 - betas) * squares / correction
        for i, param in enumerate(params):
            if param.amsgrad:
                # At least what the moments add up to: in float16 the maxima underflow to 0.
                maximum = _maximum_sum(param, grad_scale).to(squares) / correction[i]
                new[i] = torch.where(old[i] == math.inf, 0.0, torch.maximum(new[i], maximum - old[i]))
        return torch.stack([old, new, steps], dim=1)


def adam_step(state: Mapping[str, Any], like: Tensor) -> float | Tensor:
    """Adam's step count before the coming step: a number where the host has it, else a 0-d tensor beside `like`."""
    step = state.get("step", 0.0)
    on_host = not isinstance(step, Tensor) or step.device.type == "cpu"
    return float(step) if on_host else step.to(like)


def _vector(values: Sequence[float | Tensor]) -> Tensor:
    """Numbers and 0-d tensors as a vector, on an accelerator if any of them is there."""
    on_device = next((value for value in values if isinstance(value, Tensor) and value.device.type != "cpu"), None)
    if on_device is None:
        return torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")
    return torch.stack([torch.as_tensor(value, device=on_device.device).reshape(()) for value in values])


def _maximum_sum(param: AdamParameter, grad_scale: Tensor | None) -> Tensor:
    """Sum of the maximum that AMSGrad will divide by in the coming step (of a DTensor, over the part that is here)."""
    grad = real_view(local_part(param.grad if grad_scale is None else param.grad / grad_scale))
    # Squares of small half-precision numbers underflow.
    second = (1 - param.beta2) * grad.to(torch.promote_types(grad.dtype, torch.float32)).square()
    if param.state:
        moment, maximum = (real_view(local_part(param.state[key])) for key in (_MOMENT, "max_exp_avg_sq"))
        second = torch.maximum(maximum, param.beta2 * moment + second)
    return sums([second])[0]
