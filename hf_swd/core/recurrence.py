"""The mean second moment of a whole model by recurrence, and the factor that it gives the weight decay.

    mean_t = old_t * mean_(t-1) + new_t * ||g_t||^2 / N
    old_t  = beta2 * (1 - beta2^(t-1)) / (1 - beta2^t)         new_t = (1 - beta2) / (1 - beta2^t)
    factor = r / sqrt(mean_t)                                  r = 1, or sqrt(mean) of step `reference_steps`

It is the moving average of Adam's second moment, summed over all N elements and corrected for its bias. Plain
arithmetic on 0-d tensors: nothing here knows of optimizers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Numbers(NamedTuple):
    """What the schedule carries from step to step, 0-d tensors of float64 (float32 on MPS): the keys of the parameter
    groups that hold them."""

    schedule_step: Tensor
    """Steps so far, not counting those before the first gradient that was not zero."""
    second_moment_mean: Tensor
    """Mean of the bias-corrected second moment at the last step, over every element that had a gradient."""
    reference_rms: Tensor
    """r of the calibration; 0 while it is not known."""


class Reading(NamedTuple):
    """What Adam's own moments say in a step that reads them, 0-d tensors."""

    old_mean: Tensor
    """In the place of `old_t * mean_(t-1)`."""
    new_mean: Tensor
    """In the place of `new_t * ||g_t||^2 / N`."""
    step: Tensor
    """Adam's step count, this step included: a mean over the elements, if parameters differ."""
    is_complete: Tensor | bool
    """Whether every rank has read; otherwise the reading says nothing."""
    tolerance: float
    """Relative difference up to which the recurrence is right; 0 where it does not hold."""


class StepTotals(NamedTuple):
    """What one step brings, of all gradients of the model together: numbers or 0-d tensors."""

    squared_norm: Tensor
    """Before clipping."""
    num_elements: Tensor
    old_weight: float | Tensor
    """`old_t` of the module's formula."""
    new_weight: float | Tensor
    """`new_t`."""
    reading: Reading | None = None


def recurrence_weights(beta2: float | Tensor, step: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """`old_t` and `new_t` of the module's formula at step t, counted from 1."""
    correction = 1 - beta2**step
    return beta2 * (1 - beta2 ** (step - 1)) / correction, (1 - beta2) / correction


def advance(
    before: Numbers, totals: StepTotals, *, clip: Tensor | None, reference_steps: int, found_inf: Tensor | None = None
) -> Numbers:
    """
    The numbers after a step.

    Args:
        before: the numbers before it.
        totals: its gradients.
        clip (0-d `Tensor`, *optional*): what the gradients are multiplied by before Adam sees them, if the mean is to
            be of clipped gradients.
        reference_steps: the step whose gradient rms becomes r; 0 for r = 1.
        found_inf (0-d `Tensor`, *optional*): not 0 if the optimizer will leave this step out (a GradScaler's).
    """
    step, mean, reference = before
    old_mean = totals.old_weight * mean
    new_mean = totals.new_weight * totals.squared_norm / totals.num_elements.clamp(min=1)
    keep = totals.num_elements == 0
    if totals.reading is not None:
        read = totals.reading
        difference = (old_mean - read.old_mean).abs()
        keeps_recurrence = keep | ~torch.as_tensor(read.is_complete, device=mean.device)
        if read.tolerance:
            keeps_recurrence = keeps_recurrence | (difference < read.tolerance * read.old_mean)  # finite
            # The mean before this step is set right, too: it stays if the step is skipped, and the next need not read.
            mean = torch.where(keeps_recurrence | (old_mean == read.old_mean), mean, read.old_mean / totals.old_weight)
        # Where another optimizer has made these moments, its steps count.
        step = torch.where((step == 0) & (read.old_mean > 0), (read.step - 1).round(), step)
        old_mean = torch.where(keeps_recurrence, old_mean, read.old_mean)
        new_mean = torch.where(keeps_recurrence, new_mean, read.new_mean)
    if clip is not None:
        # Where the norm is infinite, what clipping leaves of the gradients is 0.
        new_mean = torch.where(totals.squared_norm == math.inf, 0.0, new_mean * clip.square())
    after = old_mean + new_mean
    next_step = step + (after != 0)
    if reference_steps:
        is_due = (reference == 0) & (next_step >= reference_steps) & (after > 0) & (after < math.inf)
        next_reference = torch.where(is_due, after.sqrt(), reference)
    else:
        next_reference = reference
    if found_inf is not None:
        keep = keep | (found_inf.to(mean.device) > 0)
    return Numbers(
        torch.where(keep, step, next_step),
        torch.where(keep, mean, after),
        torch.where(keep, reference, next_reference),
    )


def decay_factor(numbers: Numbers, *, calibrated: bool) -> Tensor:
    """What the user's decay is multiplied by, 0-d: 1 while r is to come; 0 if every gradient so far was zero."""
    reference, rms = numbers.reference_rms, numbers.second_moment_mean.sqrt()
    factor = torch.where(reference == 0, 1.0, reference / rms) if calibrated else 1 / rms
    return torch.where(rms == 0, 0.0, factor)
