"""The effective weight decay of parameter groups: the user's, times the schedule's factor."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from . import group_state
from .recurrence import Numbers, decay_factor


# Largest lr * decay: one rounding below 1, so that 1 - lr * decay is never negative.
_LARGEST_DECAY = 1.0 - 2.0**-52


class DecayWriter:
    """Writes the effective decay into parameter groups."""

    def __init__(self) -> None:
        self.on_host: bool | None = None
        """Whether the optimizer takes the decay as a number, for which the host must wait for an accelerator; `None`:
        if the weights are on the CPU."""
        self._warned = False

    def write(self, groups: list[dict[str, Any]], numbers: Numbers, *, calibrated: bool) -> list[float | Tensor]:
        """The effective decay of each group, at most 1/lr: a number, or a 0-d tensor on an accelerator."""
        scalar = decay_factor(numbers, calibrated=calibrated)
        on_host = scalar.device.type == "cpu" if self.on_host is None else self.on_host
        factor: float | Tensor = scalar.item() if on_host else scalar
        decays = [self._effective(group, factor, numbers) for group in groups]
        for group, decay in zip(groups, decays, strict=True):
            group_state.write_decay(group, decay)
        return decays

    def _effective(self, group: dict[str, Any], factor: float | Tensor, numbers: Numbers) -> float | Tensor:
        user_decay: float = group["initial_weight_decay"]
        lr: float | Tensor = group["lr"]
        if user_decay == 0:
            return 0.0
        decay = user_decay * factor
        if isinstance(decay, Tensor):
            if isinstance(lr, Tensor):
                return torch.minimum(decay, (_LARGEST_DECAY / lr).to(decay))
            return decay.clamp(max=_LARGEST_DECAY / lr) if lr > 0 else decay
        lr = float(lr)
        if lr * decay <= _LARGEST_DECAY or decay != decay:
            return decay
        if not self._warned:
            self._warned = True
            rms = float(numbers.second_moment_mean.sqrt())
            warnings.warn(
                f"the effective weight decay {decay:.3g} (weight_decay={user_decay:g}, gradient rms {rms:.3g}) times "
                f"lr={lr:g} exceeds 1: it is held at 1/lr, which sets the weights to zero at every such step. Choose "
                f"a smaller weight_decay (an effective 0.01 is {0.01 * rms:.2g} here), or reference_steps=100, which "
                "gives AdamW's value its usual meaning.",
                RuntimeWarning,
                stacklevel=5,
            )
        return _LARGEST_DECAY / lr
