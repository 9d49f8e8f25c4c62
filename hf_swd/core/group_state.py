"""What the schedule keeps in an optimizer's parameter groups, where users, loggers and every checkpoint find it.

| key | what |
|---|---|
| `weight_decay` | the effective decay of the last step (before the first, and in a checkpoint: the user's) |
| `initial_weight_decay` | the user's lambda |
| `scheduled_weight_decay` | what the schedule wrote last: anything else in `weight_decay` is the user's new lambda |
| `reference_steps`, `unclipped_norm`, `max_grad_norm` | options of [`AdamS`] |
| `schedule_step` | steps of the schedule; this and the next two are of the whole model, the same in all groups |
| `second_moment_mean` | the mean of the bias-corrected second moment at the last step |
| `reference_rms` | gradient rms of step `reference_steps` |

The numbers are 0-d tensors while training, and plain numbers in a checkpoint.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .grad_norm import accumulation_dtype
from .recurrence import Numbers


if TYPE_CHECKING:
    from torch.optim import Optimizer


OPTIONS = ("reference_steps", "unclipped_norm", "max_grad_norm")
NUMBERS: dict[str, Any] = {**dict.fromkeys(Numbers._fields, 0.0), "schedule_step": 0}
_DECAYS = ("weight_decay", "initial_weight_decay", "scheduled_weight_decay")
_MARK = "schedule_step"
_KEYS = {*_DECAYS, *OPTIONS, *NUMBERS}
# What hf_swd 0.1.0 wrote beside `schedule_step`, into groups and states.
_OF_0_1_0 = ("num_elements", "second_moment_sum", "second_moment_step")

Group = dict[str, Any]


def complete(groups: Sequence[Group], defaults: Mapping[str, Any]) -> None:
    """Give groups that were added, or loaded, what they lack: what other groups hold, else what a new run has."""
    lacking = [group for group in groups if not group.keys() >= _KEYS]
    if not lacking:
        return
    holder = next((group for group in groups if group.keys() >= _KEYS), None)
    for group in lacking:
        if holder is not None:
            group.update({key: holder[key] for key in (*OPTIONS, *NUMBERS)})
        own = {**{key: defaults[key] for key in OPTIONS}, **NUMBERS, **dict.fromkeys(_DECAYS, group["weight_decay"])}
        for key, value in own.items():
            group.setdefault(key, value)


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
        """What all groups share under a key of `OPTIONS` or `NUMBERS`; 0 if none has it."""
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


def write_numbers(groups: Sequence[Group], numbers: Numbers) -> None:
    """Show what is known after a step. In place where that is possible: a captured CUDA graph must find its state
    where it left it."""
    for key, value in numbers._asdict().items():
        held = groups[0][key]
        can_hold = isinstance(held, Tensor) and held.device == value.device and held.dtype == value.dtype
        if can_hold and held.is_inference() == torch.is_inference_mode_enabled():
            value = held.copy_(value)
        for group in groups:
            group[key] = value


def user_decay(group: Group) -> Any:
    """Lambda, be it what someone has assigned to `weight_decay` since the last step."""
    value = group["weight_decay"]
    return group.get("initial_weight_decay", value) if _is_scheduled(group) else value


def adopt_assignment(group: Group) -> None:
    """A value that someone has assigned to `weight_decay` since the last step is the user's new lambda.

    Raises:
        ValueError: it is negative, infinite or NaN.
    """
    if _is_scheduled(group):
        return
    value = float(group["weight_decay"])
    if not 0 <= value < math.inf:
        raise ValueError(f"weight_decay={value} was assigned to a parameter group: expected a number of at least 0")
    group.update(dict.fromkeys(_DECAYS, value))


def write_decay(group: Group, decay: float | Tensor) -> None:
    """Show the effective decay of a step: a number, or a 0-d tensor on an accelerator."""
    group["weight_decay"] = group["scheduled_weight_decay"] = decay


def remove(group: Group) -> None:
    """Give the group the user's decay back, and take out what the schedule has put there."""
    decay = user_decay(group)
    for key in (*_DECAYS, *OPTIONS, *NUMBERS):
        group.pop(key, None)
    group["weight_decay"] = decay


def as_saved(groups: Sequence[Group], defaults: Mapping[str, Any]) -> list[Group]:
    """Groups as they stand in a checkpoint: plain numbers, and the user's lambda, with which any AdamW can go on."""
    saved = [dict(group) for group in groups]
    complete(saved, defaults)
    for group in saved:
        group.update(dict.fromkeys(_DECAYS, user_decay(group)))
        group.update((key, type(first)(group[key])) for key, first in NUMBERS.items())
    return saved


def adapted_for_loading(own: Sequence[Group], saved: Sequence[Group], defaults: Mapping[str, Any]) -> list[Group]:
    """
    Groups of a checkpoint as the schedule loads them.

    Another optimizer's decay does not mean what ours does: from its checkpoint, lambda and options stay as they are.
    Where the effective decay was saved (by an engine that saves groups as they are in memory), lambda stands beside
    it.
    """
    if len(own) != len(saved):
        return list(saved)  # torch says what is wrong
    own = [dict(group) for group in own]
    complete(own, defaults)
    is_foreign = not any(_MARK in group for group in saved)
    groups = []
    for mine, group in zip(own, saved, strict=True):
        # torch.distributed.checkpoint fills in what AdamW's groups lack from ours, before their first step.
        is_completed = not group.get(_MARK) and not _is_scheduled(group)
        decay = user_decay(mine if is_foreign or is_completed else group)
        lacking = {**{key: mine[key] for key in OPTIONS}, **(NUMBERS if is_foreign else {})}
        known = {key: value for key, value in group.items() if key not in _OF_0_1_0}
        groups.append({**lacking, **known, **dict.fromkeys(_DECAYS, decay)})
    return groups


def adapted_state(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The states of a checkpoint without what hf_swd 0.1.0 kept there, and with a step count of its own for each
    parameter: FSDP1 gives one tensor to all that were flattened together, which Adam would then increment for each."""
    return {
        param: {
            key: value.clone() if key == "step" and isinstance(value, Tensor) else value
            for key, value in values.items()
            if key not in _OF_0_1_0
        }
        if isinstance(values, Mapping)
        else values
        for param, values in state.items()
    }


def _is_scheduled(group: Group) -> bool:
    value, scheduled = group["weight_decay"], group.get("scheduled_weight_decay")
    if value is scheduled:
        return True
    if scheduled is None or isinstance(value, Tensor):
        return False
    return bool(value == scheduled or (value != value and scheduled != scheduled))  # the schedule's own NaN, copied
