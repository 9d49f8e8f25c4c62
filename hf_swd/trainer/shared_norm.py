"""One reading of the gradients for a Trainer's clipping and its optimizer's schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_callback import TrainerCallback
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from ..adams import AdamS
from ..core.schedule import schedule_of


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

    It does so in one process and under DDP and FSDP, for the gradients of all parameters that the optimizer holds. All
    other calls, those without a schedule among them, go to accelerate as they are, and an accelerator or a trainer
    with a clipping of its own is left alone.
    """
    accelerator = trainer.accelerator
    clip = accelerator.clip_grad_norm_
    clip_mixed: Any = getattr(trainer, "_mixed_mesh_grad_norm", None)

    def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: int = 2) -> Any:
        schedule = schedule_of(trainer.optimizer)
        if schedule is None or norm_type != 2:
            return clip(parameters, max_norm, norm_type)
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        norm = _clip_with_schedule(trainer, schedule, parameters, max_norm)
        return clip(parameters, max_norm, norm_type) if norm is None else norm

    def mixed_mesh_grad_norm(model: nn.Module, max_norm: float) -> Any:
        schedule = schedule_of(trainer.optimizer)
        if schedule is None:
            return clip_mixed(model, max_norm)
        norm = _clip_with_schedule(trainer, schedule, list(model.parameters()), max_norm)
        return clip_mixed(model, max_norm) if norm is None else norm

    with contextlib.ExitStack() as replaced:
        if getattr(clip, "__func__", None) is Accelerator.clip_grad_norm_:
            replaced.enter_context(_replaced(accelerator, "clip_grad_norm_", clip_grad_norm_))
        if getattr(clip_mixed, "__module__", None) == "transformers.trainer":
            replaced.enter_context(_replaced(trainer, "_mixed_mesh_grad_norm", mixed_mesh_grad_norm))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    setattr(owner, name, method)
    try:
        yield
    finally:
        delattr(owner, name)


def _clip_with_schedule(
    trainer: Trainer, schedule: WeightDecaySchedule, parameters: list[Tensor], max_norm: float
) -> Tensor | None:
    """The norm of all gradients, now clipped; `None` where the schedule does not see it."""
    kind = trainer.accelerator.distributed_type
    if not (kind in ("NO", "FSDP") or kind.startswith("MULTI_")) or is_sagemaker_mp_enabled():
        return None
    optimizer = schedule.optimizer
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != {id(p) for p in parameters if p.requires_grad}:
        return None
    trainer.accelerator.unscale_gradients(trainer.optimizer)
    if isinstance(optimizer, AdamS):
        return optimizer.clip_grad_norm_(max_norm, defer=not _gradients_are_looked_at(trainer, optimizer))
    return schedule.clip_grad_norm_(max_norm)


def _gradients_are_looked_at(trainer: Trainer, optimizer: AdamS) -> bool:
    """Whether someone may read or change gradients between clipping and the step."""
    methods = [getattr(trainer, name, None) for name in _BETWEEN_CLIPPING_AND_STEP]
    modules = {method.__module__ for method in methods if method is not None}
    return (
        not modules <= {"transformers.trainer", "hf_swd.trainer.trainer"}
        or bool(optimizer._optimizer_step_pre_hooks)
        or any(
            type(callback).on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step
            for callback in trainer.callback_handler.callbacks
        )
    )
