"""A schedule on an optimizer that knows nothing of it, by the hooks of its `step()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .schedule import WeightDecaySchedule


if TYPE_CHECKING:
    from torch.optim import Optimizer


def drive(schedule: WeightDecaySchedule) -> None:
    """Have every `step()` of the schedule's optimizer begin with the schedule's, and leave its sums in the state."""
    schedule._decay_on_host = True  # optimizers take the decay as a number

    def before_step() -> None:
        with torch.no_grad():
            schedule._before_step()

    def pre_hook(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            before_step()
            return None
        return (optimizer,), {**kwargs, "closure": _followed_once(closure, before_step)}

    def post_hook(*_: Any) -> None:
        schedule._blocks.write_back()

    optimizer = schedule.optimizer
    schedule._handles += [optimizer.register_step_pre_hook(pre_hook), optimizer.register_step_post_hook(post_hook)]


def _followed_once(closure: Callable[[], Any], then: Callable[[], None]) -> Callable[[], Any]:
    """The gradients come out of the closure, inside `step()`; only its first call belongs to this step."""
    called = False

    def closure_then() -> Any:
        nonlocal called
        loss = closure()
        if not called:
            called = True
            then()
        return loss

    return closure_then
