"""Binding to DeepSpeed ZeRO: with `refusals`, the only module with names of DeepSpeed's inside.

ZeRO steps the optimizer several times per optimizer step, each time on one flat partition of some parameters, and
computes the norm of the whole gradient beforehand. The schedule advances at the first of these inner steps, from that
norm, and writes the decay at each. The whole model is one block, whose running sum lies in the parameter groups.
"""

from __future__ import annotations

import importlib.metadata
import math
import sys
import weakref
from collections.abc import Mapping
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import group_state
from ..core.blocks import Blocks
from ..core.clipping import Clipping
from ..core.grad_norm import accumulation_dtype
from ..core.recurrence import Measured, RunningSums, SecondMomentMean
from ..core.schedule import WeightDecaySchedule, schedule_of
from ..core.state_entries import STEP, SUM, as_saved
from ..core.step_hooks import drive
from ..core.wrappers import unwrapped
from .refusals import refuse_zero as _refuse


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


class ZeroBlock(Blocks):
    """
    The model as ZeRO 1, 2, 3 and `BF16_Optimizer` know it: one block.

    Args:
        zero_optimizer: DeepSpeed's wrapper around the optimizer (`engine.optimizer`).

    Raises:
        RuntimeError: the configuration leaves the schedule without the norm of the whole model, or this version of
            DeepSpeed lacks what is read here.
    """

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
        _refuse(zero_optimizer, [p for group in groups for p in group])
        params = [p for group in self._base.param_groups for p in group["params"]]
        device = params[0].device if params else torch.device("cpu")
        sums, steps = torch.zeros(2, 1, dtype=accumulation_dtype(device), device=device)
        num_elements = sum(getattr(p, "ds_numel", p.numel()) for group in groups for p in group)
        self.running = RunningSums(sums, steps, torch.full_like(sums, num_elements))
        self.group_entries = {SUM: sums[0], STEP: steps[0]}
        self.clipping = Clipping()
        self._moments_seen: list[weakref.ref[Tensor]] = []
        self._in_new_step = False
        inner_step = zero_optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            self._in_new_step = True
            return inner_step(*args, **kwargs)

        zero_optimizer.step = step

    def begins_step(self) -> bool:
        begins, self._in_new_step = self._in_new_step, False
        return begins

    def follow(self, loaded: Mapping[str, Any] | None, mean: SecondMomentMean) -> None:
        if loaded is None and not self._has_other_moments():
            return
        total, step = self._second_moment()
        if mean.step == 0:
            mean.step = torch.tensor(step, dtype=torch.float64)
        elif loaded is not None:
            if SUM in loaded:
                known, known_step = float(loaded[SUM]), float(loaded[STEP])
            else:  # a checkpoint from before hf_swd 0.1.0, or of an engine that knew every parameter
                known_step = float(mean.step)
                known = float(mean.mean * mean.num_elements) * (1 - float(self.beta2()) ** known_step)
            if step in (0, known_step):  # otherwise another optimizer has made steps since
                total, step = known, known_step
        self.running.sums.fill_(total)
        self.running.steps.fill_(step)

    def write_back(self) -> None:
        self._moments_seen = [weakref.ref(moment) for moment in self._moments()]

    def _has_other_moments(self) -> bool:
        """Whether DeepSpeed's universal loader has replaced Adam's state, and found nothing of ours for the groups."""
        moments = self._moments()
        seen = [reference() for reference in self._moments_seen]
        return len(seen) > 0 and not (len(seen) == len(moments) and all(map(is_, seen, moments)))

    def beta2(self) -> Tensor:
        beta2 = self._base.param_groups[0]["betas"][1]
        return torch.as_tensor(beta2).to(self.running.sums).reshape(1)

    def measure(self, *, unclipped: bool) -> Measured:
        norm = getattr(self._zero, "_global_grad_norm", None)
        if norm is None:
            raise RuntimeError(
                "DeepSpeed has not computed the norm of the gradient, which scheduled weight decay needs: leave "
                "zero_optimization.compute_grad_norm at true in the DeepSpeed config"
            )
        norm = torch.as_tensor(norm, dtype=torch.float64).to(self.running.sums)
        norm = torch.where(norm < 0, math.nan, norm)  # a norm that is inf or NaN is -1 in DeepSpeed
        clip = self._zero.clip_grad
        if not unclipped and clip > 0:
            norm = norm / ((norm + 1e-6) / clip).clamp(min=1)  # as DeepSpeed does it in the step, after this
        return Measured(norm.square().reshape(1))

    def total(self, values: Tensor) -> Tensor:
        return values[0]

    def clip(self, max_norm: float, *, defer: bool, unclipped: bool) -> Tensor:
        raise RuntimeError(
            "DeepSpeed ZeRO clips by itself, before the optimizer sees a gradient: set gradient_clipping in its "
            "config (max_grad_norm of a Trainer does) instead of calling clip_grad_norm_"
        )

    def saved_state(self, state: Mapping[Any, Any]) -> dict[Any, Any]:
        # Sums of flat partitions, from before the engine was attached, mean nothing.
        return as_saved(state, set(map(id, state.values())))

    def _second_moment(self) -> tuple[float, float]:
        """Sum of Adam's second moment over all ranks, and its number of steps: (0, 0) before the first."""
        import torch.distributed as dist

        steps = (float(state.get("step", 0)) for state in self._base.state.values())
        local = sum(float(m.sum(dtype=torch.float64)) for m in self._moments()), max(steps, default=0.0)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, local)
        return math.fsum(total for total, _ in ranks), max(step for _, step in ranks)

    def _moments(self) -> list[Tensor]:
        return [m for state in self._base.state.values() if isinstance(m := state.get("exp_avg_sq"), Tensor)]

    @property
    def _base(self) -> Optimizer:
        optimizer: Optimizer = self._zero.optimizer
        return optimizer


def bind_zero(zero_optimizer: Any) -> WeightDecaySchedule:
    """
    Bind the schedule of the optimizer inside `zero_optimizer` to the engine; a second time does nothing.

    accelerate replaces the optimizer under ZeRO-Offload by DeepSpeed's CPU Adam on the same parameter groups; these
    still say that they are scheduled, and DeepSpeed's Adam gets the schedule by a step hook.

    Raises:
        RuntimeError: see [`ZeroBlock`]; or the optimizer inside has no schedule, or does not decouple its decay.
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
        options = {key: group_state.read(base.param_groups, key) for key in group_state.OPTIONS}
        schedule = WeightDecaySchedule(base, **options)
        drive(schedule)
    if not isinstance(schedule._blocks, ZeroBlock):
        schedule._use(ZeroBlock(zero_optimizer))
    return schedule
