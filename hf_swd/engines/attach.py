"""`attach`: one call that tells the schedule how a prepared optimizer's model is sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..core.parameter_gradients import ParameterGradients
from ..core.schedule import WeightDecaySchedule
from ..core.step_hooks import begin_last
from ..core.wrappers import schedule_of
from .fsdp1 import fsdp1_shards, is_fsdp1_shard
from .refusals import (
    refuse_divided_model,
    refuse_old_version,
    refuse_other_parameters,
    refuse_replacement,
    refuse_step_in_backward,
    refuse_unscaled_fp16,
)
from .tensor_parallel import refuse_plain_shards
from .zero import bind_zero, deepspeed_callers, find_zero_optimizer


if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


def is_scheduled(optimizer: Any) -> bool:
    """Whether `optimizer` has a schedule, or was built with one that an engine has put aside (ZeRO-Offload)."""
    if schedule_of(optimizer) is not None:
        return True
    zero_optimizer = find_zero_optimizer(optimizer)
    return zero_optimizer is not None and any(
        "initial_weight_decay" in g for g in zero_optimizer.optimizer.param_groups
    )


def attach(optimizer: Any, model: nn.Module | None = None) -> WeightDecaySchedule:
    """
    Bind the weight decay schedule of an optimizer to the engine that shards its model.

    Needed once, after `accelerator.prepare` or `deepspeed.initialize`, under DeepSpeed ZeRO and FSDP1 in a loop of
    your own: a Trainer does it by itself, and DDP, FSDP2 and tensor parallelism need nothing. Calling it where nothing
    is needed, or twice, does no harm. A checkpoint may be loaded before or after.

    Args:
        optimizer: what `accelerator.prepare` or `deepspeed.initialize` returned for the optimizer (or DeepSpeed's
            engine).
        model (`nn.Module`, *optional*): the prepared model; needed under FSDP1, whose parameters do not say how they
            are sharded, and to refuse what other parameters do not say.

    Returns:
        [`WeightDecaySchedule`]: the schedule, with `grad_rms` and `step_count`.

    Raises:
        ValueError: the optimizer has no schedule.
        RuntimeError: under this configuration of DeepSpeed, or with the tensor parallelism of this version of
            transformers, the schedule cannot see the whole model; the optimizer holds none of its parameters; or this
            version of DeepSpeed is too old. The message says what to change.

    Example:

    ```python
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    hf_swd.attach(optimizer, model)
    ```
    """
    refuse_old_version(optimizer, model)
    zero_optimizer = find_zero_optimizer(optimizer) or find_zero_optimizer(model)
    refuse_unscaled_fp16(optimizer)
    schedule = schedule_of(optimizer) if zero_optimizer is None else bind_zero(zero_optimizer)
    if schedule is None:
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: it has no weight decay schedule; build it with hf_swd.AdamS or "
            "wrap it in hf_swd.ScheduledWeightDecay before accelerator.prepare"
        )
    if model is not None:
        refuse_other_parameters(optimizer, _params(schedule.optimizer), model)
        refuse_plain_shards(model)
        _refuse_division(schedule, model)
        if isinstance(schedule.source, ParameterGradients) and (shards := fsdp1_shards(model)):
            schedule.source.divide(shards=shards)
    return schedule


def _before_any_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a step of any optimizer: bind what needs no `attach`, and stop where `attach` is missing."""
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        _bind_zero_redundancy(optimizer)
        return
    schedule = schedule_of(optimizer)
    if schedule is None:
        refuse_replacement(optimizer)
        return
    refuse_step_in_backward()
    begin_last(optimizer)
    if schedule not in _seen_whole:
        _before_first_step(optimizer, schedule)


def _bind_zero_redundancy(optimizer: Any) -> None:
    """torch's ZeroRedundancyOptimizer builds the optimizer of each rank's share itself, and so must hand it the
    ranks."""
    schedule = schedule_of(optimizer.optim)
    if schedule is None or schedule.process_group is not None:
        return
    assert isinstance(schedule.source, ParameterGradients)
    schedule.source.divide(process_group=optimizer.process_group)
    # It saves groups that it has copied from the optimizer inside, as they are in memory.
    optimizer.register_state_dict_post_hook(lambda _, state_dict: schedule.as_saved(state_dict))


_seen_whole: WeakSet[WeightDecaySchedule] = WeakSet()
"""Schedules that have made a step in which nothing of the model was hidden from them."""


def _before_first_step(optimizer: Optimizer, schedule: WeightDecaySchedule) -> None:
    """Parts of a model that say nothing of the whole; zeros (by which an engine allocates state) do no harm."""
    params = _params(optimizer)
    callers = deepspeed_callers(optimizer)
    unattached = ""
    if isinstance(schedule.source, ParameterGradients):
        shards = schedule.source.shards
        if any(map(find_zero_optimizer, callers)):
            unattached = "DeepSpeed ZeRO"
        elif any(is_fsdp1_shard(p) and id(p) not in shards for p in params):
            unattached = "FSDP"
    if (callers or unattached) and not any(p.grad is not None and p.grad.any() for p in params):
        return
    if unattached:
        raise RuntimeError(
            f"{unattached} shards the model, and the weight decay schedule is not attached to it: each rank would "
            "decay by a number of its own. Call hf_swd.attach(optimizer, model) once, with what accelerator.prepare "
            "(or deepspeed.initialize) returned; a Trainer does it by itself after `import hf_swd`."
        )
    engine = next((each for each in callers if isinstance(each, nn.Module)), None)
    if engine is None:
        refuse_divided_model(params)
    else:
        _refuse_division(schedule, engine)
    _seen_whole.add(schedule)


def _refuse_division(schedule: WeightDecaySchedule, model: Any) -> None:
    """Of a model, or DeepSpeed's engine. Who builds an optimizer with a process group has said what ranks hold."""
    says_so = schedule.process_group is not None
    refuse_divided_model(model.parameters(), None if says_so else getattr(model, "mpu", None))


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


register_optimizer_step_pre_hook(_before_any_step)
