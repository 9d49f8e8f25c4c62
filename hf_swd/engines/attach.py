"""`attach`: one call that tells the schedule how a prepared optimizer's model is sharded."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..core.schedule import WeightDecaySchedule, schedule_of
from .fsdp1 import fsdp1_shards, is_fsdp1_shard
from .tensor_parallel import refuse_plain_shards
from .zero import (
    bind_zero,
    find_zero_optimizer,
    is_deepspeed_part,
    is_zero_parameter,
    refuse_old_version,
    refuse_replacement,
    refuse_unscaled_fp16,
)


if TYPE_CHECKING:
    from torch import Tensor, nn
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
            are sharded, and to refuse tensor parallelism of versions of transformers in which they do not either.

    Returns:
        [`WeightDecaySchedule`]: the schedule, with `grad_rms` and `step_count`.

    Raises:
        ValueError: the optimizer has no schedule.
        RuntimeError: under this configuration of DeepSpeed, or with the tensor parallelism of this version of
            transformers, the schedule cannot see the whole model, or this version of DeepSpeed is too old; the message
            says what to change.

    Example:

    ```python
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    hf_swd.attach(optimizer, model)
    ```
    """
    refuse_old_version(optimizer, model)
    zero_optimizer = find_zero_optimizer(optimizer) or find_zero_optimizer(model)
    if zero_optimizer is not None:
        return bind_zero(zero_optimizer)
    refuse_unscaled_fp16(optimizer)
    schedule = schedule_of(optimizer)
    if schedule is None:
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: it has no weight decay schedule; build it with hf_swd.AdamS or "
            "wrap it in hf_swd.ScheduledWeightDecay before accelerator.prepare"
        )
    refuse_plain_shards(model)
    _refuse_parts(() if model is None else model.parameters())
    shards = {} if model is None else fsdp1_shards(model)
    if shards and schedule.reads_parameters:
        schedule.divide(shards=shards)
    return schedule


def _before_any_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a step of any optimizer: bind what needs no `attach`, and stop where `attach` is missing."""
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        _bind_zero_redundancy(optimizer)
        return
    schedule = schedule_of(optimizer)
    if schedule is None:
        refuse_replacement(optimizer)
    elif schedule.reads_parameters and schedule not in _seen_whole:
        _refuse_unknown_shards(optimizer, schedule, schedule.shards)


def _bind_zero_redundancy(optimizer: Any) -> None:
    """torch's ZeroRedundancyOptimizer builds the optimizer of each rank's share itself, and so must hand it the
    ranks."""
    schedule = schedule_of(optimizer.optim)
    if schedule is None or not schedule.reads_parameters or schedule.process_group is not None:
        return
    schedule.divide(process_group=optimizer.process_group)
    # It saves groups that it has copied from the optimizer inside, as they are in memory.
    optimizer.register_state_dict_post_hook(lambda _, state_dict: schedule.as_saved(state_dict))


_seen_whole: WeakSet[WeightDecaySchedule] = WeakSet()
"""Schedules that have made a step with gradients on parameters that nobody divides."""


def _refuse_unknown_shards(optimizer: Optimizer, schedule: WeightDecaySchedule, known: Collection[Tensor]) -> None:
    """Parts of a model that say nothing of the whole; zeros (by which an engine allocates state) do no harm."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    _refuse_parts(params)
    originals: list[Tensor] = []  # until the other branch is merged
    zero = any(map(is_zero_parameter, originals))
    fsdp = any(is_fsdp1_shard(p) and id(p) not in known for p in params)
    if not (zero or fsdp):
        _seen_whole.add(schedule)
    elif any(p.grad is not None and p.grad.any() for p in params):
        raise RuntimeError(
            f"{'DeepSpeed ZeRO' if zero else 'FSDP'} shards the model, and the weight decay schedule is not attached "
            "to it: each rank would decay by a number of its own. Call hf_swd.attach(optimizer, model) once, with "
            "what accelerator.prepare (or deepspeed.initialize) returned; a Trainer does it by itself after `import "
            "hf_swd`."
        )


def _refuse_parts(params: Iterable[Tensor]) -> None:
    if any(map(is_deepspeed_part, params)):
        raise RuntimeError(
            "scheduled weight decay cannot run with DeepSpeed's AutoTP, nor with its expert parallelism (ep_size "
            "above 1): parameters are parts of larger ones, or experts of this rank alone, and each rank would decay "
            "by a number of its own. Use the tensor or expert parallelism of transformers (DistributedConfig)"
        )


register_optimizer_step_pre_hook(_before_any_step)
