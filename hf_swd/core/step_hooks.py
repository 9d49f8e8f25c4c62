"""A schedule on an optimizer that knows nothing of it, by the hooks of its `step()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .grad_norm import scale_
from .schedule import WeightDecaySchedule


if TYPE_CHECKING:
    from torch.optim import Optimizer


def drive(schedule: WeightDecaySchedule) -> None:
    """Have every `step()` of the schedule's optimizer begin and end one of the schedule's."""
    schedule.decay_writer.on_host = not _compiles_its_step(schedule.optimizer)
    begun: list[tuple[Tensor, int]] | None = None
    """Of a step that has begun and not ended: the gradients that it has clipped, and their versions."""

    def begin() -> None:
        # torch calls the hooks twice if the `step` of a subclass calls that of its base, and a step that raised may be
        # made again. To measure twice does no harm, but for gradients that have been clipped since.
        nonlocal begun
        if begun:
            grads = [p.grad for group in schedule.groups for p in group["params"] if p.grad is not None]
            now = [(id(grad), _version(grad)) for grad in grads]
            if now == [(id(grad), version) for grad, version in begun]:
                return
        step = schedule.begin_step()
        begun = []
        if step.clip is not None:
            grads = [grad for group in step.groups for grad in group.grads]
            scale_(grads, step.clip)
            begun = [(grad, _version(grad)) for grad in grads]

    def pre_hook(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            begin()
            return None
        return (optimizer,), {**kwargs, "closure": _followed_once(closure, begin)}

    def post_hook(*_: Any) -> None:
        nonlocal begun
        if begun is not None:
            begun = None
            schedule.end_step()

    optimizer = schedule.optimizer
    first = optimizer.register_step_post_hook(post_hook)
    # Whoever saves the state in a hook of his own saves what belongs to the moments that are there.
    optimizer._optimizer_step_post_hooks.move_to_end(first.id, last=False)  # type: ignore[attr-defined]
    schedule.hooks += [optimizer.register_step_pre_hook(pre_hook), first]
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        _load_with_hooks(schedule)


def begin_last(optimizer: Optimizer) -> None:
    """Before any of its hooks: have the schedule's come after those that change gradients."""
    hooks = optimizer._optimizer_step_pre_hooks
    for number in [number for number, hook in hooks.items() if hook.__module__ == __name__]:
        hooks.move_to_end(number)  # type: ignore[attr-defined]


def _load_with_hooks(schedule: WeightDecaySchedule) -> None:
    """An optimizer's own `load_state_dict` may call no hooks (that of bitsandbytes does not). Twice does no harm."""
    optimizer = schedule.optimizer
    load: Any = type(optimizer).load_state_dict

    def load_state_dict(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        load(schedule.optimizer, schedule.adapted(state_dict), *args, **kwargs)
        schedule.loaded()

    optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]


def _compiles_its_step(optimizer: Optimizer) -> bool:
    """torchao's do, anew for every other number: they get the decay as a tensor. Others take it as a number."""
    return any(cls.__module__.startswith("torchao.") for cls in type(optimizer).__mro__)


def _version(tensor: Tensor) -> int:
    """Grows with each change in place; tensors of the inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version


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
