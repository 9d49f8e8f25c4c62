"""What FSDP1 holds of each parameter: the only module with names of FSDP1's inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.sharding import Shard


def is_fsdp1_shard(p: Tensor) -> bool:
    """Whether FSDP1 manages this parameter, which then says nothing of how it is divided."""
    return getattr(p, "_fsdp_flattened", False)


def fsdp1_shards(model: nn.Module) -> dict[int, Shard]:
    """By `id`, for each parameter that FSDP1 manages: the ranks that share it, and how many scalars of it are here
    (without padding)."""
    if not torch.distributed.is_available():
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    shards: dict[int, Shard] = {}
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle = module._handle
        if handle is None:
            continue
        flat = handle.flat_param
        whole = module.sharding_strategy == ShardingStrategy.NO_SHARD
        group = None if whole else module.process_group
        if not handle._use_orig_params:
            shards[id(flat)] = Shard(group, flat.numel() - (0 if whole else flat._shard_numel_padded))
            continue
        assert flat._params is not None, "use_orig_params keeps them"
        if whole:
            shards.update((id(p), Shard(group, p.numel())) for p in flat._params)
        else:
            infos = zip(flat._params, flat._shard_param_infos, strict=True)
            shards.update((id(p), Shard(group, info.numel_in_shard or 0)) for p, info in infos)
    return shards
