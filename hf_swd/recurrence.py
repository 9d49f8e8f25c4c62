"""The mean second moment of a whole model by recurrence, and the factor that it gives the weight decay.

Plain arithmetic on vectors, one entry per *block*: a parameter (or the part of it that this rank holds), or the whole model where
only one norm is known. Nothing here knows of optimizers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


__all__ = ["SecondMomentMean"]


class SecondMomentMean:
    r"""
        S_p   <- beta2 * S_p + (1 - beta2) * ||g_p||^2         for every block p with a gradient; t_p <- t_p + 1
        mean   = sum_p S_p / (1 - beta2^t_p) / sum_p n_p       over the blocks with a gradient at this step
        factor = r / sqrt(mean)                                r = 1, or sqrt(mean) of step `reference_steps`

    S_p is the sum of Adam's second moment over the n_p elements of the block: the moment is an elementwise moving average of
    g^2, so its sum is the same moving average of ||g_p||^2.

    Args:
        step (`float`): steps seen so far.
        mean (`float`): bias-corrected mean second moment at the last of them.
        num_elements (`float`): number of elements (of all ranks) that it was the mean of.
        reference (`float`): r, 0.0 while it is not known.

    Tensors are float64 (float32 on MPS): `sums`, `steps`, `counts` of shape `(blocks,)`, the others 0-d.
    """

    def __init__(
        self, step: float = 0.0, mean: float = 0.0, num_elements: float = 0.0, reference: float = 0.0
    ) -> None:
        scalars = (torch.tensor(float(value), dtype=torch.float64) for value in (step, mean, num_elements, reference))
        self.step, self.mean, self.num_elements, self.reference = scalars
        self.sums = self.steps = self.counts = torch.zeros(0, dtype=torch.float64)

    def set_blocks(self, sums: Tensor, steps: Tensor, counts: Tensor) -> None:
        """Track these blocks: running sums, steps that entered them, numbers of elements."""
        self.sums, self.steps, self.counts = sums, steps, counts
        scalars = (self.step, self.mean, self.num_elements, self.reference)
        self.step, self.mean, self.num_elements, self.reference = (scalar.to(sums) for scalar in scalars)

    def advance(
        self,
        squares: Tensor,
        beta2: Tensor,
        *,
        reduce: Callable[[Tensor], Tensor],
        with_grad: Tensor | None = None,
        known_sums: dict[int, Tensor] | None = None,
        skip_if_nothing: bool | Tensor = False,
        skipped: Tensor | None = None,
        reference_steps: int = 0,
    ) -> None:
        """
        Take in one step.

        Args:
            squares (`Tensor`, shape `(blocks,)`): squared gradient norm of each block; anything where it has no gradient.
            beta2 (`Tensor`, shape `(blocks,)`): decay rate of each block's moment.
            reduce (`Callable`): from the `(blocks, 2)` addends of the two sums of the mean to the sums over the model.
            with_grad (`Tensor`, bool, shape `(blocks,)`, *optional*): the blocks that have a gradient; by default all.
            known_sums (`dict[int, Tensor]`, *optional*): sums that are known and not to be computed by the recurrence.
            skip_if_nothing (`bool` or 0-d bool `Tensor`): leave everything as it is if no gradient has ever been non-zero.
            skipped (`Tensor`, bool, 0-d, *optional*): leave everything as it is if true (an overflow), without asking the host.
            reference_steps (`int`): the step whose gradient rms becomes r; 0 for r = 1.
        """
        sums = beta2 * self.sums + (1 - beta2) * squares
        steps = self.steps + 1
        if with_grad is not None:
            sums, steps = torch.where(with_grad, sums, self.sums), torch.where(with_grad, steps, self.steps)
        if known_sums:
            values = list(sums.unbind())
            for index, value in known_sums.items():
                values[index] = value.to(sums)
            sums = torch.stack(values)
        mean, num_elements = self._mean_of(sums, steps, beta2, with_grad, reduce)
        new = [sums, steps, mean, num_elements, self.step + 1]
        old = [self.sums, self.steps, self.mean, self.num_elements, self.step]

        keep = num_elements == 0
        if skip_if_nothing is not False:
            keep = keep | ((mean == 0) & skip_if_nothing)
        if skipped is not None:
            keep = keep | skipped
        new = [torch.where(keep, before, after) for before, after in zip(old, new, strict=True)]
        reference = self.reference
        if reference_steps:
            reference = torch.where((reference == 0) & (new[4] >= reference_steps), new[2].sqrt(), reference)

        if torch.is_grad_enabled():
            self.sums, self.steps, self.mean, self.num_elements, self.step, self.reference = *new, reference
        else:
            # In place: a captured CUDA graph must find its state where it left it.
            for before, after in zip([*old, self.reference], [*new, reference], strict=True):
                before.copy_(after)

    def factor(self, calibrated: bool) -> Tensor:
        """What the user's decay is multiplied by, 0-d: 1 before the first step and while r is to come; 0 if no gradient has ever been
        non-zero."""
        rms = self.mean.sqrt()
        factor = torch.where(self.reference == 0, 1.0, self.reference / rms) if calibrated else 1 / rms
        return torch.where(self.mean == 0, (self.step == 0).to(factor), factor)

    def reconcile(self, beta2: Tensor, reduce: Callable[..., Tensor], *, always: bool = False) -> None:
        """After the blocks were rebuilt from an optimizer's moments: the known mean prevails over what they add up to.

        Args:
            beta2 (`Tensor`, shape `(blocks,)`): decay rates.
            reduce (`Callable`): as in [`advance`]; with `largest=True` the largest instead of the sum.
            always (`bool`): scale the sums even to a mean that was not over all blocks, as the moments are of other gradients.
        """
        if self.step == 0:
            # A run that goes on from another optimizer's moments goes on from its step.
            self.step.copy_(reduce(self.steps.unsqueeze(1), largest=True).squeeze(0))
        # The step by which torch.distributed.checkpoint allocates state has counted in the optimizer, not here.
        self.steps.clamp_(max=self.step)
        mean, num_elements = self._mean_of(self.sums, self.steps, beta2, self.steps > 0, reduce)
        if num_elements == 0 and self.mean > 0:
            # The optimizer keeps no second moment (Lion): every block gets its share of the mean.
            self.steps.copy_(self.step.expand_as(self.steps))
            self.sums.copy_(self.mean * self.counts * (1 - beta2.pow(self.steps)))
            return
        factor = self.mean / mean
        # Moments of low precision add up to less than the truth. By how much is known if the mean was over all of them.
        if self.mean > 0 and (always or num_elements == self.num_elements) and torch.isfinite(factor):
            self.sums.mul_(factor)

    def _mean_of(
        self, sums: Tensor, steps: Tensor, beta2: Tensor, with_grad: Tensor | None, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        addends = torch.stack([sums / (1 - beta2.pow(steps.clamp(min=1))), self.counts], dim=1)
        if with_grad is not None:
            addends = torch.where(with_grad.unsqueeze(1), addends, 0.0)
        total, num_elements = reduce(addends).unbind()
        return total / num_elements.clamp(min=1), num_elements
