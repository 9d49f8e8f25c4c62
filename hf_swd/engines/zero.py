"""Binding to DeepSpeed ZeRO: the only module with names of DeepSpeed's inside.

ZeRO steps the optimizer several times per optimizer step, each time on one flat partition of some parameters, and
computes the norm of the whole gradient beforehand. The schedule advances at the first of these inner steps, from that
norm, and writes the decay at each. The whole model is one block, whose running sum lies in the parameter groups.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import group_state
from ..core.grad_norm import sums
from ..core.gradients import GradientSource, GroupGradients
from ..core.recurrence import Numbers, Reading, StepTotals, recurrence_weights
from ..core.schedule import WeightDecaySchedule, schedule_of
from ..core.step_hooks import drive


if TYPE_CHECKING:
    from torch.optim import Optimizer


# Before 0.19.6 accumulated gradients are wrong below stage 3, with any optimizer (0.19.5 divides those that come
# through a model's logits by the number of micro-batches twice); 0.19.6 loads stage 2 universal checkpoints wrongly;
# 0.19.7 goes wrong now and then under ZeRO-3 with the optimizer on CPU, with any optimizer.
_OLDEST = "0.19.8"

# Where each of DeepSpeed's sharding optimizers keeps the model's parameters (not the padded partitions).
_MODEL_PARAMETERS = {
    "DeepSpeedZeroOptimizer": "bit16_groups",
    "DeepSpeedZeroOptimizer_Stage3": "fp16_groups",
    "BF16_Optimizer": "bf16_groups",
}


def find_zero_optimizer(optimizer: Any) -> Any | None:
    """The ZeRO optimizer inside what accelerate or DeepSpeed returned (an engine, a chain of `.optimizer`), if any."""
    base = sys.modules.get("deepspeed.runtime.base_optimizer")
    while base is not None and optimizer is not None:
        if isinstance(optimizer, base.ZeROOptimizer):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def refuse_old_version(*prepared: Any) -> None:
    """
    Stop where one of these objects is DeepSpeed's, or accelerate's wrapper for it, and DeepSpeed trains wrongly.

    Raises:
        RuntimeError: this version of DeepSpeed is too old.
    """
    if not any("deepspeed" in type(each).__module__.split(".") for each in prepared):
        return
    from packaging.version import Version  # comes with DeepSpeed

    version = importlib.metadata.version("deepspeed")
    if Version(version) < Version(_OLDEST):
        raise RuntimeError(
            f"hf_swd needs deepspeed {_OLDEST} or later; this is {version}, which trains wrong weights in some "
            f"configurations, with any optimizer (docs/distributed.md): pip install 'deepspeed>={_OLDEST}'"
        )


def is_zero_parameter(p: Tensor) -> bool:
    """Whether ZeRO has put a part of a flat partition in the place of this parameter of a model."""
    return any(hasattr(p, mark) for mark in ("_hp_mapping", "ds_id"))


def is_deepspeed_part(p: Tensor) -> bool:
    """Whether other ranks hold other parts of this parameter (AutoTP), or other experts in its place (MoE)."""
    experts = getattr(p, "allreduce", True) is False and getattr(p, "group_name", "ep_size_1") != "ep_size_1"
    return experts or getattr(p, "ds_is_replaced_module", False)


def refuse_unscaled_fp16(optimizer: Any) -> None:
    """
    Stop under DeepSpeed's stage 0 in fp16, which (0.19.8) divides gradients by a loss scale that the loss was never
    multiplied by: Adam hardly notices gradients that are all 2^16 times too small, a decay relative to them does.

    Raises:
        RuntimeError: the wrapper around the optimizer has a loss scale.
    """
    while optimizer is not None:
        config = getattr(optimizer, "loss_scale_config", optimizer)  # on the optimizer itself in older versions
        if type(optimizer).__module__.startswith("deepspeed.runtime.fp16.") and getattr(config, "cur_scale", 1) != 1:
            raise RuntimeError(
                "scheduled weight decay cannot run with fp16 under DeepSpeed's ZeRO stage 0, where gradients are "
                "divided by a loss scale that the loss was not multiplied by: use stage 1 or bf16"
            )
        optimizer = getattr(optimizer, "optimizer", None)


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
        _refuse(zero_optimizer, [p for group in groups for p in group])
        self._num_elements = sum(getattr(p, "ds_numel", p.numel()) for group in groups for p in group)
        self._in_new_step = False
        self._must_read = True
        for method, before in (("step", self._begin), ("load_state_dict", self.refresh)):
            setattr(zero_optimizer, method, _preceded(getattr(zero_optimizer, method), before))

    def _begin(self) -> None:
        self._in_new_step = True

    def begins_step(self) -> bool:
        begins, self._in_new_step = self._in_new_step, False
        return begins

    def refresh(self) -> None:
        self._must_read = True

    def device(self) -> torch.device:
        params = (p for group in self._base.param_groups for p in group["params"])
        return next((p.device for p in params), torch.device("cpu"))

    def measure(
        self, groups: list[GroupGradients], before: Numbers, *, tried_steps: int, unclipped: bool
    ) -> StepTotals | None:
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
        beta2 = float(self._base.param_groups[0]["betas"][1])
        old_weight, new_weight = recurrence_weights(beta2, before.schedule_step + 1)
        num_elements = torch.full_like(norm, self._num_elements)
        reading = self._read(beta2, before, norm.square()) if self._must_read and not unclipped else None
        return StepTotals(norm.square(), num_elements, old_weight, new_weight, reading)

    def _read(self, beta2: float, before: Numbers, square: Tensor) -> Reading:
        """What Adam's moments of all ranks say of the coming step: after a checkpoint, which may be another
        optimizer's."""
        import torch.distributed as dist

        states = self._base.state.values()
        moments = [m for state in states if isinstance(m := state.get("exp_avg_sq"), Tensor)]
        local = float(sums(moments).sum()), max((float(state.get("step", 0)) for state in states), default=0.0)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, local)
        step = max(step for _, step in ranks) + 1
        correction = self._num_elements * (1 - beta2**step)
        return Reading(
            old_mean=torch.full_like(square, beta2 * math.fsum(total for total, _ in ranks) / correction),
            new_mean=(1 - beta2) * square / correction,
            step=torch.full_like(square, step),
            is_complete=True,
            # On CPU, DeepSpeed's float32 norms are off by so much.
            tolerance=5e-3 if before.schedule_step == step - 1 else 0.0,
        )

    def norm(self, groups: list[GroupGradients]) -> Tensor:
        raise RuntimeError(
            "DeepSpeed ZeRO clips by itself, before the optimizer sees a gradient: set gradient_clipping in its "
            "config (max_grad_norm of a Trainer does) instead of calling clip_grad_norm_"
        )

    def end_step(self, clip: Tensor | None) -> None:
        self._must_read = False

    @property
    def _base(self) -> Optimizer:
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
        options = {key: group_state.value_in(base.param_groups, key) for key in group_state.OPTIONS}
        schedule = WeightDecaySchedule(base, **options)
        drive(schedule)
    if schedule.max_grad_norm:
        raise RuntimeError(
            f"max_grad_norm={schedule.max_grad_norm:g} of {type(base).__name__}: DeepSpeed ZeRO clips by itself, before "
            "the optimizer sees a gradient; leave it out, and set gradient_clipping in DeepSpeed's config"
        )
    if schedule.reads_parameters:
        schedule.measure_by(ZeroGradient(zero_optimizer))
    return schedule


def refuse_replacement(optimizer: Optimizer) -> None:
    """DeepSpeed's own Adam on the groups of an AdamS that accelerate has dropped, before `attach`."""
    if not type(optimizer).__module__.startswith("deepspeed."):
        return
    grads = (p.grad for group in optimizer.param_groups if "initial_weight_decay" in group for p in group["params"])
    if any(grad is not None and grad.any() for grad in grads):
        raise RuntimeError(
            f"{type(optimizer).__name__} has replaced AdamS (ZeRO-Offload does that), and nothing schedules its "
            "weight decay: call hf_swd.attach(optimizer) once, with what accelerator.prepare returned; a Trainer does "
            "it by itself after `import hf_swd`"
        )


def _refuse(zero_optimizer: Any, model_params: list[Tensor]) -> None:
    """What cannot be made right stops here, before the first step."""
    groups = zero_optimizer.optimizer.param_groups
    read = functools.partial(getattr, zero_optimizer)
    reasons = [
        (
            len({tuple(map(float, group["betas"])) for group in groups if "betas" in group}) > 1,
            "different betas in the parameter groups; ZeRO knows one norm for all: give all groups the same",
        ),
        (read("has_moe_layers", False), "expert-parallel parameters, whose norm is another on each rank: use FSDP2"),
        (
            any(map(is_deepspeed_part, model_params)),
            "AutoTP (tensor_parallel.autotp_size), of whose parameters each rank counts its own parts: use the tensor "
            "parallelism of transformers (DistributedConfig) or of torch",
        ),
        (read("compute_grad_norm", True) is False, "zero_optimization.compute_grad_norm=false: leave it at true"),
        (read("zenflow", False), "ZenFlow, which steps outside the optimizer: leave zero_optimization.zenflow out"),
        (
            hasattr(zero_optimizer, "superoffload_cpu_optimizer"),
            "SuperOffload, whose optimizer is in another process: leave offload_optimizer.super_offload out",
        ),
        (read("backup_optimizer", None) is not None, "offload_optimizer.ratio below 1 (two optimizers): set it to 1"),
        (any(group.get("amsgrad") for group in groups), "AMSGrad, which needs every gradient: set amsgrad=False"),
    ]
    found = [reason for holds, reason in reasons if holds]
    if found:
        raise RuntimeError("scheduled weight decay cannot run with " + "; nor with ".join(found))
