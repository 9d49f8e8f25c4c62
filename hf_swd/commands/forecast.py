"""What a schedule would have done in a run, from what the run logged. Plain arithmetic, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence


def effective_decays(
    steps: Sequence[int],
    norms: Sequence[float],
    *,
    weight_decay: float,
    reference_steps: int,
    beta2: float = 0.999,
    max_norm: float = 0.0,
    num_parameters: float = 1.0,
) -> list[float]:
    """
    Effective weight decay of AdamS at logged steps, by its recurrence over all steps. Squared gradient norms between
    two logs are taken to be on the straight line between them (before the first log: its own), which is right in the
    mean; where norms differ much from step to step, a log of few of them tells the moment only roughly.

    Args:
        steps (`Sequence[int]`): optimizer steps that were logged, increasing, the first at least 1.
        norms (`Sequence[float]`): norm of the gradient at each, before clipping; positive and finite.
        weight_decay (`float`): lambda.
        reference_steps (`int`): K of the calibration; 0 for the paper's schedule, which needs `num_parameters`.
        beta2 (`float`, defaults to 0.999): decay rate of the second moment.
        max_norm (`float`, defaults to 0): norm that the schedule sees at most; 0 for the one before clipping.
        num_parameters (`float`, defaults to 1): number of trained scalars.

    Returns:
        `list[float]`: one for each of `steps`.
    """
    limit = max_norm or math.inf
    squares = [min(norm, limit) ** 2 for norm in norms]
    moment, correction, reference = 0.0, 1.0, math.nan
    result = []
    before, last = squares[0], 0
    for step, square in zip(steps, squares, strict=True):
        for t in range(last + 1, step + 1):
            seen = before + (square - before) * (t - last) / (step - last)
            moment = beta2 * moment + (1 - beta2) * seen
            correction *= beta2
            if t == reference_steps:
                reference = math.sqrt(moment / (1 - correction))
        rms = math.sqrt(moment / (1 - correction))
        if reference_steps:
            result.append(weight_decay if step <= reference_steps else weight_decay * reference / rms)
        else:
            result.append(weight_decay * math.sqrt(num_parameters) / rms)
        before, last = square, step
    return result


def rescaled_decays(
    steps: Sequence[int], rms: Sequence[float], *, weight_decay: float, reference_steps: int
) -> list[float]:
    """
    Effective weight decay of AdamS at logged steps, from the gradient rms of another AdamS there: exact but for the
    rms of step `reference_steps`, whose square is taken from the straight line between the logs around it.

    Args:
        steps (`Sequence[int]`): optimizer steps that were logged, increasing.
        rms (`Sequence[float]`): `swd/grad_rms` at each, positive.
        weight_decay, reference_steps: see [`effective_decays`].
    """
    if not reference_steps:
        return [weight_decay / value for value in rms]
    reference = rms[0]
    for i in range(1, len(steps)):
        if steps[i - 1] < reference_steps:
            part = min(1.0, (reference_steps - steps[i - 1]) / (steps[i] - steps[i - 1]))
            reference = math.sqrt(rms[i - 1] ** 2 + part * (rms[i] ** 2 - rms[i - 1] ** 2))
    return [
        weight_decay if step <= reference_steps else weight_decay * reference / value
        for step, value in zip(steps, rms, strict=True)
    ]


def total_decay(steps: Sequence[int], rates: Sequence[float], decays: Sequence[float]) -> float:
    """
    Sum of learning rate times weight decay over all steps, by the trapezoidal rule between logs: the weights would
    shrink by the factor `exp(-total_decay)` if nothing else moved them.
    """
    products = [rate * decay for rate, decay in zip(rates, decays, strict=True)]
    total = steps[0] * products[0]
    for i in range(1, len(steps)):
        total += (steps[i] - steps[i - 1]) * (products[i] + products[i - 1]) / 2
    return total
