"""The mean second moment of a whole model by recurrence, and the factor that it gives the weight decay.

Plain arithmetic on vectors, one element per *block*: a parameter, or the whole model where only one norm is known.
Nothing here knows of optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class RunningSums:
    """
    What is known of the blocks, each tensor of shape `(blocks,)`, float64 (float32 on MPS).

    Args:
        sums: S_p, the sum of the second moment over the elements of each block.
        steps: t_p, the number of steps in it.
        counts: n_p, the number of elements.
    """

    def __init__(self, sums: Tensor, steps: Tensor, counts: Tensor) -> None:
        self.sums, self.steps, self.counts = sums, steps, counts


@dataclass(frozen=True)
class Measured:
    """
    What a step brings for each block.

    Args:
        squares (`Tensor`, shape `(blocks,)`): squared norm of the gradient; 0 where there is none.
        with_grad (`Tensor`, bool, shape `(blocks,)`, *optional*): the blocks that have a gradient; by default all.
        at_least (`Tensor`, shape `(blocks,)`, *optional*): what the sums are at least in the mean (AMSGrad's maximum).
        skipped (`Tensor`, bool, 0-d, *optional*): if true, the step will not be made (an overflow).
    """

    squares: Tensor
    with_grad: Tensor | None = None
    at_least: Tensor | None = None
    skipped: Tensor | None = None


class SecondMomentMean:
    r"""
        S_p   <- beta2 * S_p + (1 - beta2) * ||g_p||^2         for every block p with a gradient; t_p <- t_p + 1
        mean   = sum_p S_p / (1 - beta2^t_p) / sum_p n_p       over the blocks with a gradient at this step
        factor = r / sqrt(mean)                                r = 1, or sqrt(mean) of step `reference_steps`

    S_p is the sum of Adam's second moment over the n_p elements of the block: the moment is an elementwise moving
    average of g^2, so its sum is the same moving average of ||g_p||^2.

    Args:
        step (`float`): steps seen so far, not counting those before the first gradient that was not zero.
        mean (`float`): bias-corrected mean second moment at the last of them.
        num_elements (`float`): number of elements (of all ranks) that it was the mean of.
        reference (`float`): r, 0.0 while it is not known.

    As attributes they are 0-d tensors, float64 (float32 on MPS).
    """

    def __init__(self, step: float = 0, mean: float = 0, num_elements: float = 0, reference: float = 0) -> None:
        scalars = (torch.tensor(float(value), dtype=torch.float64) for value in (step, mean, num_elements, reference))
        self.step, self.mean, self.num_elements, self.reference = scalars

    def advance(
        self,
        blocks: RunningSums,
        beta2: Tensor,
        measured: Measured,
        *,
        total: Callable[[Tensor], Tensor],
        reference_steps: int = 0,
    ) -> None:
        """
        Take in one step.

        Args:
            blocks (`RunningSums`): changed in place, unless gradients are to flow through the step: then its tensors
                are replaced.
            beta2 (`Tensor`, shape `(blocks,)`): decay rate of each block's moment.
            measured (`Measured`): the gradients.
            total (`Callable`): from the `(blocks, 2)` addends of the two sums of the mean to the sums over the model.
            reference_steps (`int`): the step whose gradient rms becomes r; 0 for r = 1.
        """
        self._move_to(blocks.sums)
        sums = beta2 * blocks.sums + (1 - beta2) * measured.squares
        steps = blocks.steps + 1
        if measured.with_grad is not None:
            sums = torch.where(measured.with_grad, sums, blocks.sums)
            steps = torch.where(measured.with_grad, steps, blocks.steps)
        averaged = sums if measured.at_least is None else torch.maximum(sums, measured.at_least)
        mean, num_elements = _mean_of(averaged, steps, blocks.counts, beta2, measured.with_grad, total)
        step = self.step + (mean != 0)
        reference = self.reference
        if reference_steps:
            is_due = (reference == 0) & (step >= reference_steps) & (mean > 0) & (mean < math.inf)
            reference = torch.where(is_due, mean.sqrt(), reference)

        keep = num_elements == 0
        if measured.skipped is not None:
            keep = keep | measured.skipped
        may_keep = keep.device.type != "cpu" or bool(keep)  # asking would make the host wait for an accelerator
        for owner, name, after in (
            (blocks, "sums", sums),
            (blocks, "steps", steps),
            (self, "mean", mean),
            (self, "num_elements", num_elements),
            (self, "step", step),
            (self, "reference", reference),
        ):
            before = getattr(owner, name)
            if may_keep:
                after = torch.where(keep, before, after)
            if torch.is_grad_enabled():
                setattr(owner, name, after)
            else:
                before.copy_(after)  # a captured CUDA graph must find its state where it left it

    def factor(self, calibrated: bool) -> Tensor:
        """What the user's decay is multiplied by, 0-d: 1 while r is to come; 0 if every gradient so far was zero."""
        rms = self.mean.sqrt()
        factor = torch.where(self.reference == 0, 1.0, self.reference / rms) if calibrated else 1 / rms
        return torch.where(self.mean == 0, 0.0, factor)

    def _move_to(self, like: Tensor) -> None:
        if self.mean.device != like.device or self.mean.dtype != like.dtype:
            for name in ("step", "mean", "num_elements", "reference"):
                setattr(self, name, getattr(self, name).to(like))


def _mean_of(
    sums: Tensor,
    steps: Tensor,
    counts: Tensor,
    beta2: Tensor,
    with_grad: Tensor | None,
    total: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Mean of the bias-corrected second moments over the blocks `with_grad`, and its number of elements; both 0-d."""
    # Where t_p = 0 there is nothing to correct, and nothing to divide by.
    addends = torch.stack([sums / (1 - beta2.pow(steps.clamp(min=1))), counts], dim=1)
    if with_grad is not None:
        addends = torch.where(with_grad.unsqueeze(1), addends, 0.0)
    sum_of_moments, num_elements = total(addends).unbind()
    return sum_of_moments / num_elements.clamp(min=1), num_elements
