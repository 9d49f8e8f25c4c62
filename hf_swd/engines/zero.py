"""Binding to DeepSpeed ZeRO: with `refusals`, the only module with names of DeepSpeed's inside.

ZeRO steps the optimizer several times per optimizer step, each time on one flat partition of some parameters, and
computes the norm of the whole gradient beforehand. The schedule advances at the first of these inner steps, from that
norm, and writes the decay at each.
"""

from __future__ import annotations

import importlib.metadata
import math
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.grad_norm import sums
from ..core.gradients import GradientSource, GroupGradients
from ..core.group_state import OPTIONS
from ..core.recurrence import Numbers, Reading, StepTotals, recurrence_weights
from ..core.schedule import WeightDecaySchedule
from ..core.step_hooks import drive
from ..core.wrappers import schedule_of, unwrapped
from .refusals import refuse_zero


if TYPE_CHECKING:
    from types import FrameType

    from torch.optim import Optimizer


# Where each of DeepSpeed's sharding optimizers keeps the model's parameters (not the padded partitions).
_MODEL_PARAMETERS = {
    "DeepSpeedZeroOptimizer": "bit16_groups",
    "DeepSpeedZeroOptimizer_Stage3": "fp16_groups",
    "BF16_Optimizer": "bf16_groups",
}


def find_zero_optimizer(optimizer: Any) -> Any | None:
    """The ZeRO optimizer inside what accelerate or DeepSpeed returned (an engine, a chain of `.optimizer`), if any."""
    base = sys.modules.get("deepspeed.runtime.base_optimizer")
    if base is None:
        return None
    return next((each for each in unwrapped(optimizer) if isinstance(each, base.ZeROOptimizer)), None)


def deepspeed_callers(optimizer: Any) -> list[Any]:
    """The objects of DeepSpeed that wrap `optimizer` and are stepping it right now. Nothing on an optimizer tells that
    ZeRO 1 or 2 has put flat partitions into its groups."""
    callers = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("deepspeed.runtime."):
            callers.append(frame.f_locals.get("self"))
        frame = frame.f_back
    return [caller for caller in callers if any(each is optimizer for each in unwrapped(caller))]


def clipping_norm(config: Mapping[str, Any]) -> float:
    """To what norm DeepSpeed clips with this configuration, which need not say so; 0.0 if it does not clip."""
    from deepspeed.runtime.config import get_gradient_clipping

    return float(get_gradient_clipping(config))


class ZeroGradient(GradientSource):
    """
    The gradient of the whole model as ZeRO 1, 2, 3 and `BF16_Optimizer` know it: by its norm.

    Args:
        zero_optimizer: DeepSpeed's wrapper around the optimizer (`engine.optimizer`).

    Raises:
        RuntimeError: the configuration leaves the schedule without the norm of the whole model, or this version of
            DeepSpeed lacks what is read here.
    """

    clips_itself = True

    def __init__(self, zero_optimizer: Any) -> None:
        self._zero = zero_optimizer
        names = (_MODEL_PARAMETERS.get(c.__name__) for c in type(zero_optimizer).__mro__)
        name = next(filter(None, names), "")
        groups = getattr(zero_optimizer, name, None)
        version = importlib.metadata.version("deepspeed")
        if groups is None or not hasattr(zero_optimizer, "clip_grad"):
            raise RuntimeError(
                f"{type(zero_optimizer).__name__} of deepspeed {version} is not known to hf_swd, or lacks "
                f"{name or 'the groups of parameters'!r} or 'clip_grad': use a version that "
                "docs/distributed.md lists"
            )
        refuse_zero(zero_optimizer, [p for group in groups for p in group])
        self._num_elements = sum(getattr(p, "ds_numel", p.numel()) for group in groups for p in group)
        self._in_new_step = False
        self._must_read = True
        self._steps_of_others = 0.0
        """Steps in Adam's count, and so in its bias correction, that the schedule has not seen."""
        for method, before in (("step", self._begin), ("load_state_dict", self.refresh)):
            setattr(zero_optimizer, method, _preceded(getattr(zero_optimizer, method), before))

    def _begin(self) -> None:
        self._in_new_step = True

    def begins_step(self) -> bool:
        begins, self._in_new_step = self._in_new_step, False
        return begins

    def refresh(self) -> None:
        self._must_read = True

    def measure(self, groups: list[GroupGradients], before: Numbers, *, unclipped: bool) -> StepTotals | None:
        norm = getattr(self._zero, "_global_grad_norm", None)
        if norm is None:
            raise RuntimeError(
                "DeepSpeed has not computed the norm of the gradient, which scheduled weight decay needs: leave "
                "zero_optimization.compute_grad_norm at true in the DeepSpeed config"
            )
        norm = torch.as_tensor(norm, dtype=torch.float64).to(before.second_moment_mean)
        norm = torch.where(norm < 0, math.nan, norm)  # a norm that is inf or NaN is -1 in DeepSpeed
        clip = self._zero.clip_grad
        if not unclipped and clip > 0:
            norm = norm / ((norm + 1e-6) / clip).clamp(min=1)  # as DeepSpeed does it in the step, after this
        beta2 = float(self._optimizer.param_groups[0]["betas"][1])
        num_elements = torch.full_like(norm, self._num_elements)
        # A new run has no moments, on any rank: partitions are padded to one size.
        reads = self._must_read and not unclipped and self._moments()
        reading = self._read(beta2, before, norm.square()) if reads else None
        old_weight, new_weight = recurrence_weights(beta2, before.schedule_step + self._steps_of_others + 1)
        return StepTotals(norm.square(), num_elements, old_weight, new_weight, reading)

    def _read(self, beta2: float, before: Numbers, square: Tensor) -> Reading:
        """What Adam's moments of all ranks say of the coming step: after a checkpoint, which may be another
        optimizer's."""
        import torch.distributed as dist

        states = self._optimizer.state.values()
        local = float(sums(self._moments()).sum()), max((float(state.get("step", 0)) for state in states), default=0.0)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, local)
        step = max(step for _, step in ranks) + 1
        seen = float(before.schedule_step)
        self._steps_of_others = step - 1 - seen if seen else 0.0  # a new schedule takes all of them for its own
        correction = self._num_elements * (1 - beta2**step)
        return Reading(
            old_mean=torch.full_like(square, beta2 * math.fsum(total for total, _ in ranks) / correction),
            new_mean=(1 - beta2) * square / correction,
            step=torch.full_like(square, step),
            is_complete=True,
            # On CPU, DeepSpeed's float32 norms are off by so much.
            tolerance=5e-3 if seen == step - 1 else 0.0,
        )

    def _moments(self) -> list[Tensor]:
        return [m for state in self._optimizer.state.values() if isinstance(m := state.get("exp_avg_sq"), Tensor)]

    def norm(self, groups: list[GroupGradients]) -> Tensor:
        raise RuntimeError(
            "DeepSpeed ZeRO clips by itself, before the optimizer sees a gradient: set gradient_clipping in its "
            "config (max_grad_norm of a Trainer does) instead of calling clip_grad_norm_"
        )

    def end_step(self, clip: Tensor | None) -> None:
        self._must_read = False

    @property
    def _optimizer(self) -> Optimizer:
        optimizer: Optimizer = self._zero.optimizer
        return optimizer


def _preceded(method: Callable[..., Any], by: Callable[[], None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        by()
        return method(*args, **kwargs)

    return call


def bind_zero(zero_optimizer: Any) -> WeightDecaySchedule:
    """
    Bind the schedule of the optimizer inside `zero_optimizer` to the engine; a second time does nothing.

    accelerate replaces the optimizer under ZeRO-Offload by DeepSpeed's CPU Adam on the same parameter groups; these
    still say that they are scheduled, and DeepSpeed's Adam gets the schedule by a step hook.

    Raises:
        RuntimeError: see [`ZeroGradient`]; or the optimizer inside has no schedule, or does not decouple its decay.
    """
    base = zero_optimizer.optimizer
    schedule = schedule_of(base)
    if schedule is None:
        if not any("initial_weight_decay" in group for group in base.param_groups):
            raise RuntimeError(
                f"{type(base).__name__} has no weight decay schedule: build the optimizer with hf_swd.AdamS"
            )
        if not getattr(base, "adam_w_mode", False):
            raise RuntimeError(
                f"{type(base).__name__} under offload adds weight_decay to the gradient: DeepSpeed must be given "
                "adam_w_mode=True"
            )
        group = base.param_groups[0]
        schedule = WeightDecaySchedule(base, **{key: group[key] for key in OPTIONS})
        drive(schedule)
    if schedule.max_grad_norm:
        raise RuntimeError(
            f"max_grad_norm={schedule.max_grad_norm:g} of {type(base).__name__}: DeepSpeed ZeRO clips by itself, "
            "before the optimizer sees a gradient; leave it out, and set gradient_clipping in DeepSpeed's config"
        )
    if not isinstance(schedule.source, ZeroGradient):
        schedule.measure_by(ZeroGradient(zero_optimizer))
    return schedule
