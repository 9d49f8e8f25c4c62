"""Where the parts of a model's parameters lie, and what it takes to sum over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .grad_norm import is_dtensor, local_part


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .gradients import GroupGradients


class Shard(NamedTuple):
    """What this rank holds of a parameter that is divided without being a DTensor."""

    group: ProcessGroup | None
    """Process group over which it is divided; `None` if every rank holds all of it."""
    numel: int
    """Number of scalars here, without padding."""


class Layout:
    """
    How the parameters of an optimizer are divided among ranks, to sum numbers of them over the whole model.

    Args:
        params (`Sequence[Tensor]`): all parameters, in the same order on every rank.
        shards (`Mapping[int, Shard]`): by `id`, those that are divided without being DTensors.
        process_group (`ProcessGroup`, *optional*): ranks that hold disjoint parts of the model altogether.
    """

    def __init__(
        self, params: Sequence[Tensor], shards: Mapping[int, Shard], process_group: ProcessGroup | None
    ) -> None:
        divided_over = [_dividing_groups(p, shards.get(id(p))) for p in params]
        kinds = list(dict.fromkeys(divided_over)) or [()]  # summed on this rank first, then over ranks
        groups = dict.fromkeys(group for kind in kinds for group in kind)
        self.is_local = not groups and process_group is None
        """Whether this rank needs no other to know everything."""
        self.ranks_know_their_part_only = process_group is not None or any(shard.group for shard in shards.values())
        """Whether ranks hold different parameters, and so may see changes (a new state) that others do not."""
        self._num_kinds = len(kinds)
        self._kind_of = {id(p): kinds.index(kind) for p, kind in zip(params, divided_over, strict=True)}
        self._reductions = {
            group: torch.tensor([i for i, kind in enumerate(kinds) if group in kind], device="cpu") for group in groups
        }
        self._process_group = process_group
        self._shards = shards

    def local_size(self, p: Tensor) -> int:
        """Number of real scalars of a parameter that are here."""
        shard = self._shards.get(id(p))
        numel = local_part(p).numel() if shard is None else shard.numel
        return numel * (2 if p.is_complex() else 1)

    def local_sums(self, values: Tensor, groups: Sequence[GroupGradients]) -> Tensor:
        """Sums of numbers of parameters with a gradient, of shape `(params, k)`, over those that are divided alike:
        shape `(kinds, k)`."""
        if self._num_kinds == 1:
            return values.sum(0, keepdim=True)
        kinds = torch.tensor([self._kind_of[id(p)] for group in groups for p in group.params], device="cpu")
        return values.new_zeros(self._num_kinds, values.shape[1]).index_add_(0, kinds.to(values.device), values)

    def total(self, local_sums: Tensor) -> Tensor:
        """Sum over the model, of shape `(k,)` and the same bits on every rank: one all-reduce for each mesh dimension,
        and each process group, over which anything is divided."""
        for group, kinds in self._reductions.items():
            kinds = kinds.to(local_sums.device)
            local_sums = local_sums.index_copy(0, kinds, _all_reduce(local_sums[kinds], group))
        total = local_sums.sum(0)
        return total if self._process_group is None else _all_reduce(total, self._process_group)


_LEFT_ALONE = (
    "hf_swd: step() and clip_grad_norm_() of AdamS (or of a scheduled optimizer) sum numbers of the gradients over "
    "ranks, and every rank must make each of these calls, in the same order. Has another rank skipped one (a batch "
    "less, a step left out for a bad loss), or ended with an error of its own?"
)


def _dividing_groups(param: Tensor, shard: Shard | None) -> tuple[ProcessGroup, ...]:
    if shard is not None:
        return () if shard.group is None else (shard.group,)
    if not is_dtensor(param):
        return ()
    mesh = param.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(param.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def _all_reduce(values: Tensor, group: ProcessGroup) -> Tensor:
    import torch.distributed as dist

    device = values.device
    if device.type == "cpu" and "gloo" not in str(dist.get_backend(group)):
        values = values.to(torch.accelerator.current_accelerator())
    values = values.clone()
    try:
        dist.all_reduce(values, group=group)
    except RuntimeError as error:
        # Of itself it says that someone was waited for, but not who waited for what.
        error.args = (f"{error}\n{_LEFT_ALONE}", *error.args[1:])
        raise
    return values.to(device)
