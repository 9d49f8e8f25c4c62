"""What weight decay loses where weights have few digits.

Decay takes some millionths of a weight per step; neighbouring numbers of bfloat16 are 0.4 to 0.8 % apart. A weight
moves if Adam's update and the decay together reach half of that, and where the update alone stays below it, all of the
decay is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


_SAMPLE = 2**16  # elements of each parameter
_TOLERATED = 0.1  # of the decay


def decay_lost_to_rounding(optimizer: torch.optim.Optimizer) -> float | None:
    """
    The share of weight decay that rounding swallows in a step from the present weights and moments, where update and
    decay are rounded once, together, as in torch's fused kernel (its other implementations round the decay by itself,
    and lose more). The mean over decayed elements, weighted by their squares as the decay itself is.

    Args:
        optimizer (`torch.optim.Optimizer`): has made a step.

    Returns:
        `float`, *optional*: `None` if no decayed parameter has fewer digits than float32, and for others than torch's
        AdamW and AdamS, which may round otherwise. It may be a little below 0, since it is measured on a sample.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return None
    kept = whole = 0.0
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["weight_decay"] and group["lr"] else ():
            state = optimizer.state.get(parameter, {})
            if parameter.is_floating_point() and parameter.element_size() < 4 and "exp_avg_sq" in state:
                rounded, exact = _decay(parameter, state, group)
                kept, whole = kept + rounded, whole + exact
    return 1 - kept / whole if whole else None


def rounding_warning(optimizer: torch.optim.Optimizer) -> str | None:
    """What to warn of, with its remedy; `None` if rounding takes less than a tenth of the decay."""
    lost = decay_lost_to_rounding(optimizer)
    if lost is None or not lost >= _TOLERATED:  # NaN, as the weights
        return None
    return (
        f"rounding swallows {100 * min(lost, 1.0):.0f} % of the weight decay: the weights have few digits, and a step "
        "changes them by less than the distance of two numbers. Load the model in float32 "
        '(dtype="float32") and train with bf16=True, or round at random (optim_args="base=adamw_torch_8bit,'
        'bf16_stochastic_round=true,..."; torchao)'
    )


def _decay(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[float, float]:
    """By how much decay shrinks the squares of a sample, twice over: with rounding, and exactly."""
    weights, mean, square = (_sample(tensor) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]))
    step, (beta1, beta2) = float(state["step"]), group["betas"]
    update = group["lr"] * mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
    decay = float(group["lr"]) * float(group["weight_decay"]) * weights
    without, with_decay = (
        values.to(parameter.dtype).double() for values in (weights - update, weights - update - decay)
    )
    scale = parameter.numel() / max(1, weights.numel())
    return scale * float(weights @ (without - with_decay)), scale * float(weights @ decay)


def _sample(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "_local_tensor", tensor).detach().reshape(-1)
    return local[:: max(1, local.numel() // _SAMPLE)].double()
