"""One reading of the gradients for a Trainer's clipping and its optimizer's schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_pre_hooks
from transformers.trainer_callback import TrainerCallback
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from ..core.wrappers import schedule_of


if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

    from ..core.schedule import WeightDecaySchedule


# Where a Trainer may do something between clipping and the step; not every version has all of them.
_BETWEEN_CLIPPING_AND_STEP = ("_inner_training_loop", "_run_epoch", "_clip_grad_norm", "_get_grad_norm")


@contextlib.contextmanager
def shared_norm(trainer: Trainer) -> Iterator[None]:
    """
    While it lasts, `trainer.accelerator.clip_grad_norm_`, by which every version of transformers clips and measures,
    takes the norm from the schedule of the trainer's optimizer, which then need not read the gradients again. So does
    `trainer._mixed_mesh_grad_norm`, by which newer ones do so with tensor and expert parallelism, where gradients are
    on several meshes (or some are no DTensors), and neither accelerate nor torch takes them together.

    It does so in one process and under DDP and FSDP, for the gradients of all parameters that the optimizer holds, in
    the Trainer's own loop. All other calls (inside `training_step`, without a schedule) go to accelerate as they are,
    and an accelerator or a trainer with a clipping of its own is left alone.
    """
    accelerator = trainer.accelerator
    clip, training_step = accelerator.clip_grad_norm_, trainer.training_step
    clip_mixed: Any = getattr(trainer, "_mixed_mesh_grad_norm", None)
    in_training_step = False

    def own_training_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal in_training_step
        _forget_clipping(trainer)  # the step before was skipped
        in_training_step = True
        try:
            return training_step(*args, **kwargs)
        finally:
            in_training_step = False

    def shared(parameters: Iterable[Tensor], max_norm: float) -> Tensor | None:
        schedule = schedule_of(trainer.optimizer)
        if schedule is None or in_training_step:
            return None
        return _clip_with_schedule(trainer, schedule, parameters, max_norm)

    def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: int = 2) -> Any:
        if schedule_of(trainer.optimizer) is None or norm_type != 2:
            return clip(parameters, max_norm, norm_type)
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        norm = shared(parameters, max_norm)
        return clip(parameters, max_norm, norm_type) if norm is None else norm

    def mixed_mesh_grad_norm(model: nn.Module, max_norm: float) -> Any:
        norm = shared(model.parameters(), max_norm)
        return clip_mixed(model, max_norm) if norm is None else norm

    with contextlib.ExitStack() as replaced:
        if getattr(clip, "__func__", None) is Accelerator.clip_grad_norm_:
            replaced.enter_context(_replaced(accelerator, "clip_grad_norm_", clip_grad_norm_))
            replaced.enter_context(_replaced(trainer, "training_step", own_training_step))
        if getattr(clip_mixed, "__module__", None) == "transformers.trainer":
            replaced.enter_context(_replaced(trainer, "_mixed_mesh_grad_norm", mixed_mesh_grad_norm))
        try:
            yield
        finally:
            _forget_clipping(trainer)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    held = vars(owner).get(name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)
        if held is not None:
            setattr(owner, name, held)


def _forget_clipping(trainer: Trainer) -> None:
    schedule = schedule_of(trainer.optimizer)
    if schedule is not None:
        schedule.forget_clipping()


def _clip_with_schedule(
    trainer: Trainer, schedule: WeightDecaySchedule, parameters: Iterable[Tensor], max_norm: float
) -> Tensor | None:
    """The norm of all gradients, now clipped (or clipped by the step that comes); `None` where the schedule does not
    see it."""
    kind = trainer.accelerator.distributed_type
    if not (kind in ("NO", "FSDP") or kind.startswith("MULTI_")) or is_sagemaker_mp_enabled():
        return None
    optimizer = schedule.optimizer
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if held != {id(p) for p in parameters if p.requires_grad}:
        return None
    trainer.accelerator.unscale_gradients(trainer.optimizer)
    if _gradients_are_looked_at(trainer, schedule):
        return schedule.clip_grad_norm_(max_norm)
    return schedule.clip_in_step(max_norm)


def _gradients_are_looked_at(trainer: Trainer, schedule: WeightDecaySchedule) -> bool:
    """Whether anyone may read or change gradients between clipping and the step."""
    methods = [getattr(trainer, name, None) for name in _BETWEEN_CLIPPING_AND_STEP]
    modules = {method.__module__ for method in methods if method is not None}
    callbacks = [getattr(callback, "on_pre_optimizer_step", None) for callback in trainer.callback_handler.callbacks]
    optimizer = schedule.optimizer
    hooks = {**_global_optimizer_pre_hooks, **optimizer._optimizer_step_pre_hooks}.values()
    return (
        not modules <= {"transformers.trainer", "hf_swd.trainer.trainer"}
        or any(
            getattr(callback, "__func__", None) is not TrainerCallback.on_pre_optimizer_step for callback in callbacks
        )
        or not all(getattr(hook, "__module__", "").startswith("hf_swd.") for hook in hooks)
        or any(map(_has_own_step, (trainer.optimizer, optimizer)))
    )


def _has_own_step(optimizer: Any) -> bool:
    """Whether someone has put a function in the place of the optimizer's `step`. torch's learning rate schedulers do
    so, and accelerate puts the method itself there; these look at no gradient."""
    step = vars(optimizer).get("step")
    while getattr(step, "_wrapped_by_lr_sched", False):
        step = getattr(step, "__wrapped__", None)
    return getattr(step, "__func__", step) not in (None, type(optimizer).step)
