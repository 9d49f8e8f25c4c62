"""Where the parts of a model's parameters lie, and what it takes to sum over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .grad_norm import accumulation_dtype, is_dtensor


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """What this rank holds of a parameter that is divided without being a DTensor."""

    group: ProcessGroup | None
    """Process group over which it is divided; `None` if every rank holds all of it."""
    numel: int
    """Number of scalars here, without padding."""


class Layout:
    """
    How the parameters of an optimizer are divided among ranks.

    Every rank holds a shard of every DTensor, so that numbers of whole parameters can be had on all ranks:
    [`of_whole_parameters`]. Of a `Shard`, or of the parameters of an optimizer with a `process_group`, other ranks
    know nothing: their numbers meet in [`total`].

    Args:
        params (`Sequence[Tensor]`): the parameters, in the same order on every rank.
        shards (`Mapping[Tensor, Shard]`): those that are divided without being DTensors.
        process_group (`ProcessGroup`, *optional*): ranks that hold disjoint parts of the model altogether.
    """

    def __init__(
        self, params: Sequence[Tensor], shards: Mapping[Tensor, Shard], process_group: ProcessGroup | None
    ) -> None:
        device = params[0].device if params else torch.device("cpu")
        meshes: dict[ProcessGroup, list[int]] = defaultdict(list)
        parts: dict[ProcessGroup | None, list[int]] = defaultdict(list, {None: []})
        sizes = []
        for i, p in enumerate(params):
            for group in _sharding_groups(p):
                meshes[group].append(i)
            shard = shards.get(p, Shard(None, p.numel()))
            parts[shard.group].append(i)
            sizes.append(shard.numel * (2 if p.is_complex() else 1))
        self.counts = torch.tensor(sizes, dtype=accumulation_dtype(device)).to(device)
        self._meshes, self._parts = (
            [(group, torch.tensor(members, dtype=torch.long, device=device)) for group, members in groups.items()]
            for groups in (meshes, parts)
        )
        self._process_group = process_group

    @property
    def has_meshes(self) -> bool:
        """Whether any parameter is a sharded DTensor."""
        return bool(self._meshes)

    @property
    def is_local(self) -> bool:
        """Whether this rank needs no other to know everything."""
        return not (self._meshes or self._process_group or any(group for group, _ in self._parts))

    def of_whole_parameters(self, values: Tensor) -> Tensor:
        """From numbers of the local parts, of shape `(params, k)`, those of the whole parameters, the same bits on
        every rank that holds a part: one all-reduce for each mesh dimension on which anything is sharded."""
        for group, members in self._meshes:
            values = values.index_copy(0, members, _all_reduce(values[members], group, _sum))
        return values

    def total(self, values: Tensor, *, largest: bool = False) -> Tensor:
        """Sum over the model (or maximum of non-negative numbers) of numbers of its parameters, of shape `(params,
        k)`: shape `(k,)`, the same bits on every rank."""
        combine = _maximum if largest else _sum
        parts = [_all_reduce(combine(values[members]), group, combine) for group, members in self._parts]
        return _all_reduce(combine(torch.stack(parts)), self._process_group, combine)


_LEFT_ALONE = (
    "hf_swd: step() and clip_grad_norm_() of AdamS (or of a scheduled optimizer) sum numbers of the gradients over "
    "ranks, and every rank must make each of these calls, in the same order. Has another rank skipped one (a batch "
    "less, a step left out for a bad loss), or ended with an error of its own?"
)


def _sum(values: Tensor) -> Tensor:
    return values.sum(0)


def _maximum(values: Tensor) -> Tensor:
    return values.amax(0) if len(values) else values.sum(0)


def _sharding_groups(param: Tensor) -> list[ProcessGroup]:
    if not is_dtensor(param):
        return []
    mesh = param.device_mesh
    return [
        mesh.get_group(dim) for dim, p in enumerate(param.placements) if not p.is_replicate() and mesh.size(dim) > 1
    ]


def _all_reduce(values: Tensor, group: ProcessGroup | None, combine: Callable[[Tensor], Tensor]) -> Tensor:
    if group is None:
        return values
    import torch.distributed as dist

    device = values.device
    if device.type == "cpu" and "gloo" not in str(dist.get_backend(group)):
        values = values.to(torch.accelerator.current_accelerator())
    values = values.clone()
    try:
        dist.all_reduce(values, dist.ReduceOp.MAX if combine is _maximum else dist.ReduceOp.SUM, group=group)
    except RuntimeError as error:
        # Of itself it says that someone was waited for, but not who waited for what.
        error.args = (f"{error}\n{_LEFT_ALONE}", *error.args[1:])
        raise
    return values.to(device)
