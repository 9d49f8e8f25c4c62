"""What the schedule keeps in an optimizer's parameter groups, where users, loggers and every checkpoint find it.

| key | what |
|---|---|
| `weight_decay` | the effective decay of the last step (before the first, and in a checkpoint: the user's) |
| `initial_weight_decay` | the user's lambda |
| `scheduled_weight_decay` | what the schedule wrote last: anything else in `weight_decay` is the user's new lambda |
| `reference_steps` | K of the calibration |
| `unclipped_norm` | whether the schedule follows the gradients before clipping |
| `schedule_step` | steps of the schedule; this and the next three are of the whole model, the same in all groups |
| `second_moment_mean` | the mean of the bias-corrected second moment at the last step |
| `num_elements` | number of scalars that it was over |
| `reference_rms` | gradient rms of step K |
| `second_moment_sum`, `second_moment_step` | only under DeepSpeed ZeRO: the running sum of the whole model |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor


OPTIONS = ("reference_steps", "unclipped_norm")
_MARK = "schedule_step"
_DECAYS = ("weight_decay", "initial_weight_decay", "scheduled_weight_decay")

Group = dict[str, Any]


def complete(groups: Sequence[Group], shown: Mapping[str, Any]) -> None:
    """Give groups that were added, or loaded, what they lack: what other groups hold, else what was `shown` last."""
    holder = next((group for group in groups if _MARK in group), shown)
    shared = {key: holder[key] for key in shown if key in holder}
    for group in groups:
        if _MARK not in group:
            group.update(shared)
        for key, value in dict.fromkeys(_DECAYS, group["weight_decay"]).items():
            group.setdefault(key, value)


def remove(group: Group, keys: Iterable[str]) -> None:
    """Undo [`complete`]: the group gets the user's decay back."""
    decay = user_decay(group)
    for key in (*_DECAYS, *keys):
        group.pop(key, None)
    group["weight_decay"] = decay


def read(groups: Iterable[Group], key: str, default: Any = 0) -> Any:
    """Value that all groups share; `default` where none has it."""
    return next((group[key] for group in groups if key in group), default)


def numbers_from_elsewhere(groups: Iterable[Group], entries: Mapping[str, Tensor]) -> Mapping[str, Any] | None:
    """The first group in which someone else than the schedule, which shows `entries`, has put these numbers; `None` if
    a group still shows them, or none has any."""
    holders = [group for group in groups if _MARK in group]
    if not holders or any(group[_MARK] is entries[_MARK] for group in holders):
        return None
    return holders[0]


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


def as_saved(group: Group, keys: Iterable[str]) -> Group:
    """A group as it stands in a checkpoint: plain numbers, and the user's lambda, with which any AdamW can go on."""
    saved = {**group, **dict.fromkeys(_DECAYS, user_decay(group))}
    saved.update((key, float(saved[key])) for key in keys if key in saved and key not in OPTIONS)
    if _MARK in saved:
        saved[_MARK] = int(saved[_MARK])
    return saved


def adapted_for_loading(own: Sequence[Group], saved: Sequence[Group], keys: Iterable[str]) -> list[Group]:
    """
    Groups of a checkpoint as the schedule loads them.

    Another optimizer's decay does not mean what ours does: from its checkpoint, lambda and options stay as they are.
    Where the effective decay was saved (before hf_swd 0.1.0, or by an engine that saves groups as they are in memory),
    lambda stands beside it.
    """
    foreign = not any(_MARK in group for group in saved)
    if len(own) != len(saved):
        return list(saved)  # torch says what is wrong
    groups = []
    for mine, group in zip(own, saved, strict=True):
        # torch.distributed.checkpoint completes another optimizer's groups by ours as they are before the first step.
        is_completed = not group.get(_MARK) and not _is_scheduled(group)
        decay = user_decay(mine if foreign or is_completed else group)
        rest = {**dict.fromkeys(keys, 0), **{key: mine[key] for key in OPTIONS}} if foreign else {}
        groups.append({**group, **rest, **dict.fromkeys(_DECAYS, decay)})
    return groups


def has_effective_decay(group: Mapping[str, Any]) -> bool:
    """Whether a saved group is as it was in memory, with the effective decay in `weight_decay`."""
    return _MARK in group and _is_scheduled(group) and group["weight_decay"] != group.get("initial_weight_decay")


def _is_scheduled(group: Mapping[str, Any]) -> bool:
    value, scheduled = group["weight_decay"], group.get("scheduled_weight_decay")
    if value is scheduled:
        return True
    if scheduled is None or isinstance(value, Tensor):
        return False
    return bool(value == scheduled or (value != value and scheduled != scheduled))  # the schedule's own NaN, copied
