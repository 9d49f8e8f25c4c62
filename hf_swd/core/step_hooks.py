"""A schedule on an optimizer that knows nothing of it, by the hooks of its `step()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .grad_norm import scale_
from .schedule import WeightDecaySchedule


if TYPE_CHECKING:
    from torch.optim import Optimizer


def drive(schedule: WeightDecaySchedule) -> None:
    """Have every `step()` of the schedule's optimizer begin and end one of the schedule's."""
    schedule.decay_writer.on_host = not _compiles_its_step(schedule.optimizer)

    def begin() -> None:
        step = schedule.begin_step()
        if step.clip is not None:
            scale_([grad for group in step.groups for grad in group.grads], step.clip)

    def pre_hook(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            begin()
            return None
        return (optimizer,), {**kwargs, "closure": _followed_once(closure, begin)}

    def post_hook(*_: Any) -> None:
        schedule.end_step()

    optimizer = schedule.optimizer
    first = optimizer.register_step_post_hook(post_hook)
    # Whoever saves the state in a hook of his own saves what belongs to the moments that are there.
    optimizer._optimizer_step_post_hooks.move_to_end(first.id, last=False)  # type: ignore[attr-defined]
    schedule.hooks += [optimizer.register_step_pre_hook(pre_hook), first]


def _compiles_its_step(optimizer: Optimizer) -> bool:
    """torchao's do, anew for every other number: they get the decay as a tensor. Others take it as a number."""
    return any(cls.__module__.startswith("torchao.") for cls in type(optimizer).__mro__)


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
