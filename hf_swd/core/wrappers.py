"""From what a user holds to the optimizer inside, and to its schedule: accelerate's and DeepSpeed's wrappers keep the
optimizer that they wrap in `.optimizer`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .schedule import WeightDecaySchedule


def unwrapped(optimizer: Any) -> Iterator[Any]:
    """`optimizer`, what it wraps, and so on inwards: each object once, since some optimizers call themselves
    `self.optimizer`, and no lists, names and classes, which others keep there."""
    seen: set[int] = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield optimizer
        inner = getattr(optimizer, "__dict__", {}).get("optimizer")
        is_wrapper = "optimizer" in getattr(inner, "__dict__", {})
        if isinstance(inner, type) or not (is_wrapper or hasattr(inner, "param_groups")):
            return
        optimizer = inner


def schedule_of(optimizer: Any) -> WeightDecaySchedule | None:
    """The schedule that drives `optimizer`, or one that it wraps; `None` if there is none."""
    schedules = (getattr(each, "__dict__", {}).get("_decay_schedule") for each in unwrapped(optimizer))
    return next(filter(None, schedules), None)
