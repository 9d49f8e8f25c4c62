"""What a schedule carries from step to step, read from the parameter groups, where all of it stands."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .grad_norm import accumulation_dtype
from .recurrence import Numbers


if TYPE_CHECKING:
    from torch.optim import Optimizer


class GroupValues:
    """
    Values of the schedule in the parameter groups of an optimizer.

    Args:
        optimizer (`torch.optim.Optimizer`): held weakly.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)

    @property
    def optimizer(self) -> Optimizer:
        """
        Whose weight decay this is.

        Raises:
            RuntimeError: it no longer exists.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer of this weight decay schedule no longer exists")
        return optimizer

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups as they are now: engines replace them."""
        return self.optimizer.param_groups

    def value(self, key: str) -> Any:
        """What all groups share under a key of `group_state.OPTIONS` or `group_state.NUMBERS`; 0 if none has it."""
        value = next((group[key] for group in self.groups if key in group), 0)
        return value.detach() if isinstance(value, Tensor) else value

    def numbers(self) -> Numbers:
        """The schedule's numbers, as tensors beside the parameters."""
        device = next((p.device for group in self.groups for p in group["params"]), torch.device("cpu"))
        dtype = accumulation_dtype(device)
        return Numbers(*(torch.as_tensor(self.value(key), dtype=dtype, device=device) for key in Numbers._fields))

    @property
    def grad_rms(self) -> float:
        """sqrt of the mean second moment over the whole model at the last step; 0.0 before the first. Reading it makes
        the host wait for an accelerator."""
        return math.sqrt(self.value("second_moment_mean"))

    @property
    def step_count(self) -> int:
        """Optimizer steps that the schedule has seen; skipped steps (overflow) do not count, nor do those before the
        first gradient that was not zero."""
        return int(self.value("schedule_step"))

    @property
    def reference_rms(self) -> float:
        """The gradient rms of step `reference_steps`, 0.0 until then."""
        return float(self.value("reference_rms"))

    @property
    def reference_steps(self) -> int:
        """K of the calibration; 0 for the paper's schedule."""
        return int(self.value("reference_steps"))

    @property
    def unclipped_norm(self) -> bool:
        """Whether the schedule follows the norm that gradients had before clipping."""
        return bool(self.value("unclipped_norm"))

    @property
    def max_grad_norm(self) -> float:
        """What each step clips the whole gradient to; 0.0: it does not."""
        return float(self.value("max_grad_norm"))
