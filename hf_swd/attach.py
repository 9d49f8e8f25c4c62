"""`attach`: one call that tells the schedule how a prepared optimizer's model is sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .schedule import DecaySchedule, schedule_of
from .zero import bind_zero, find_zero_optimizer, refuse_unscaled_fp16


if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


__all__ = ["attach", "is_scheduled"]


def is_scheduled(optimizer: Any) -> bool:
    """Whether `optimizer` has a schedule, or was built with one that an engine has put aside (ZeRO-Offload)."""
    if schedule_of(optimizer) is not None:
        return True
    zero_optimizer = find_zero_optimizer(optimizer)
    return zero_optimizer is not None and any(
        "initial_weight_decay" in g for g in zero_optimizer.optimizer.param_groups
    )


def attach(optimizer: Any, model: nn.Module | None = None) -> DecaySchedule:
    """
    Bind the weight decay schedule of an optimizer to the engine that shards its model.

    Needed once, after `accelerator.prepare` or `deepspeed.initialize`, under DeepSpeed ZeRO and FSDP1 in a loop of your own: a
    Trainer does it by itself, and DDP, FSDP2 and tensor parallelism need nothing. Calling it where nothing is needed, or twice, does no
    harm. A checkpoint may be loaded before or after.

    Args:
        optimizer: what `accelerator.prepare` or `deepspeed.initialize` returned for the optimizer (or DeepSpeed's engine).
        model (`nn.Module`, *optional*): the prepared model; needed under FSDP1, whose parameters do not say how they are sharded.

    Returns:
        [`DecaySchedule`]: the schedule, with `grad_rms` and `step_count`.

    Raises:
        ValueError: the optimizer has no schedule.
        RuntimeError: under this configuration of DeepSpeed the schedule cannot see the whole model; the message says what to change.

    Example:

    ```python
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    hf_swd.attach(optimizer, model)
    ```
    """
    zero_optimizer = find_zero_optimizer(optimizer) or find_zero_optimizer(model)
    if zero_optimizer is not None:
        return bind_zero(zero_optimizer)
    refuse_unscaled_fp16(optimizer)
    schedule = schedule_of(optimizer)
    if schedule is None:
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: it has no weight decay schedule; build it with hf_swd.AdamS or wrap it in "
            "hf_swd.ScheduledWeightDecay before accelerator.prepare"
        )
    if model is not None and torch.distributed.is_available():
        schedule.set_shards(_fsdp1_shards(model))
    return schedule


def _fsdp1_shards(model: nn.Module) -> dict[Tensor, tuple[tuple[ProcessGroup, ...], int]]:
    """For each parameter that FSDP1 manages: the ranks that share it, and how many scalars of it are here (without padding)."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    shards: dict[Tensor, tuple[tuple[ProcessGroup, ...], int]] = {}
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle = module._handle
        if handle is None:
            continue
        flat = handle.flat_param
        whole = module.sharding_strategy == ShardingStrategy.NO_SHARD
        groups = () if whole else (module.process_group,)
        if not handle._use_orig_params:
            shards[flat] = groups, flat.numel() - (0 if whole else flat._shard_numel_padded)
        elif whole:
            shards.update((p, (groups, p.numel())) for p in flat._params)
        else:
            infos = zip(flat._params, flat._shard_param_infos, strict=True)
            shards.update((p, (groups, info.numel_in_shard or 0)) for p, info in infos)
    return shards


def _attach_zero_redundancy(optimizer: Any, args: tuple, kwargs: dict) -> None:
    """torch's ZeroRedundancyOptimizer builds the optimizer of each rank's share itself, and so must hand it the ranks."""
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        schedule = schedule_of(optimizer.optim)
        if schedule is not None and schedule.process_group is None:
            schedule.set_process_group(optimizer.process_group)


register_optimizer_step_pre_hook(_attach_zero_redundancy)
