"""What the schedule keeps in an optimizer's parameter groups, where users, loggers and every checkpoint format find it.

| key | what |
|---|---|
| `weight_decay` | the effective decay of the last step (before the first: the user's) |
| `initial_weight_decay` | the user's lambda |
| `scheduled_weight_decay` | what the schedule wrote into `weight_decay` last: anything else there has been assigned by the user |
| `reference_steps` | K of the calibration |
| `unclipped_norm` | whether the schedule follows the gradients before clipping |
| `schedule_step`, `second_moment_mean`, `num_elements`, `reference_rms` | state of the schedule, the same in all groups and on all ranks |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


__all__ = [
    "OPTIONS",
    "SHARED_KEYS",
    "adopt_assignment",
    "complete_state_dict",
    "prepare",
    "publish",
    "read",
    "remove",
    "write_decay",
]

OPTIONS = ("reference_steps", "unclipped_norm")
SHARED_KEYS = ("schedule_step", "second_moment_mean", "num_elements", "reference_rms")

Group = dict[str, Any]


def prepare(group: Group, options: dict[str, Any]) -> None:
    """Complete a new group; `options` has the keys `OPTIONS`."""
    group.setdefault("initial_weight_decay", group["weight_decay"])
    group.setdefault("scheduled_weight_decay", group["weight_decay"])
    for key in OPTIONS:
        group.setdefault(key, options[key])


def remove(group: Group) -> None:
    """Undo [`prepare`]: the group gets the user's decay back."""
    group["weight_decay"] = group.pop("initial_weight_decay")
    for key in ("scheduled_weight_decay", *OPTIONS, *SHARED_KEYS):
        group.pop(key, None)


def read(groups: Iterable[Group], key: str) -> Any:
    """Value that all groups share; 0 where none has it."""
    return next((group[key] for group in groups if key in group), 0)


def adopt_assignment(group: Group) -> None:
    """A value that someone has assigned to `weight_decay` since the last step is the user's new lambda.

    Raises:
        ValueError: it is negative, infinite or NaN.
    """
    value, scheduled = group["weight_decay"], group["scheduled_weight_decay"]
    if value is scheduled or (not isinstance(value, Tensor) and value == scheduled):
        return
    value = float(value)
    if value != value and scheduled != scheduled:  # the schedule's own NaN, copied
        return
    if not 0 <= value < math.inf:
        raise ValueError(f"weight_decay={value} was assigned to a parameter group: expected a number of at least 0")
    group["initial_weight_decay"] = group["weight_decay"] = group["scheduled_weight_decay"] = value


def write_decay(group: Group, decay: float | Tensor) -> None:
    """Show the effective decay of a step: a number, or a 0-d tensor on an accelerator."""
    group["weight_decay"] = group["scheduled_weight_decay"] = decay


def publish(groups: Iterable[Group], values: Sequence[float]) -> None:
    """Write the shared state, and turn what lies on an accelerator into plain numbers (the host waits for it)."""
    for group in groups:
        group.update(zip(SHARED_KEYS, values, strict=True))
        if isinstance(group["weight_decay"], Tensor):
            write_decay(group, float(group["weight_decay"]))


def complete_state_dict(own: Sequence[Group], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Give the groups of another optimizer's checkpoint what they lack: its decay does not mean what ours does."""
    saved = state_dict["param_groups"]
    if len(own) != len(saved) or all("initial_weight_decay" in group for group in saved):
        return state_dict
    groups = []
    for mine, group in zip(own, saved, strict=True):
        decay = mine["initial_weight_decay"]
        ours = {"initial_weight_decay": decay, "weight_decay": decay, "scheduled_weight_decay": decay}
        groups.append({**group, **ours, **{key: mine[key] for key in OPTIONS}})
    return {**state_dict, "param_groups": groups}
