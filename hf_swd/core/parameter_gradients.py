"""The gradient of the whole model, measured on the parameters that an optimizer holds."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .grad_norm import accumulation_dtype, squared_norms
from .gradients import GradientSource, GroupGradients, with_gradients
from .moments import AdamParameter, MomentReader, adam_step, keeps_moments, moment_ids
from .recurrence import Numbers, Reading, StepTotals, recurrence_weights
from .sharding import Layout, Shard


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


_STEPS_BETWEEN_READINGS = 100


class _SteppingSet(NamedTuple):
    """What is known of the parameters that step together, for as long as they are the same."""

    key: tuple[list[Any], ...]
    """By which a change is noticed: `id`s of parameters and moments, and beta2."""
    sizes: Tensor
    """Number of scalars of each that are here, shape `(params,)`."""
    sizes_by_kind: Tensor
    """The same summed by kind of layout, shape `(kinds, 1)`."""
    reader: MomentReader | None
    """`None` where moments do not tell the mean: it is carried on as it is."""
    has_new: bool
    """Whether a parameter has no state yet."""


class ParameterGradients(GradientSource):
    """
    The gradients of an optimizer's own parameters.

    The mean is carried from step to step by the recurrence. Adam's moments are read instead when other parameters step
    than before (first of all after a checkpoint is loaded), at every step while the recurrence does not hold (step
    counts or beta2 differ, AMSGrad, moments in half precision), and every 100 steps, since anyone may write to them.

    Args:
        optimizer (`torch.optim.Optimizer`): held weakly.
        beta2 (`float`, *optional*): decay rate of the mean, which then is not that of Adam's moments; by default
            `betas[1]` of the parameter groups.
        process_group (`ProcessGroup`, *optional*): ranks whose optimizers hold disjoint parts of the model.
        shards (`Mapping[int, Shard]`, *optional*): by `id`, parameters that are divided without being DTensors.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        beta2: float | None = None,
        process_group: ProcessGroup | None = None,
        shards: Mapping[int, Shard] | None = None,
    ) -> None:
        self._reference = weakref.ref(optimizer)
        self._fixed_beta2 = beta2
        self.process_group = process_group
        self.shards = shards or {}
        self._layout: tuple[list[int], Layout] | None = None
        self._stepped: _SteppingSet | None = None
        """The set of the last step; `None` if the next one must read."""
        self._parts: Tensor | None = None
        """Where ranks hold different parameters: what this rank has of the sum of second moments, by kind of layout,
        shape `(kinds,)`. (From the mean a rank could not tell its own part.)"""
        self._measured: tuple[_SteppingSet, Tensor, Tensor] | None = None
        """Of the coming step: its set, and this rank's parts of the sum, of old moments and of gradients."""

    def divided(
        self, *, shards: Mapping[int, Shard] | None = None, process_group: ProcessGroup | None = None
    ) -> ParameterGradients:
        """The same for parameters of which this rank holds shards, or no part of others'."""
        return ParameterGradients(
            self._optimizer, beta2=self._fixed_beta2, process_group=process_group or self.process_group, shards=shards
        )

    @property
    def _optimizer(self) -> Optimizer:
        optimizer = self._reference()
        assert optimizer is not None, "the schedule has looked"
        return optimizer

    def refresh(self) -> None:
        self._stepped = None

    def norm(self, groups: list[GroupGradients]) -> Tensor:
        layout, positions = self._layout_of(groups)
        squares = self._squared_norms(groups).unsqueeze(1)
        return layout.total(layout.local_sums(squares, positions))[0].sqrt()

    def measure(
        self, groups: list[GroupGradients], before: Numbers, *, tried_steps: int, unclipped: bool
    ) -> StepTotals | None:
        layout, positions = self._layout_of(groups)
        if layout.is_local and not any(group.params for group in groups):
            return None
        squares = self._squared_norms(groups)
        sums = layout.local_sums(squares.unsqueeze(1), positions)

        stepping = self._stepping_set(groups, layout, positions, reads_moments=not unclipped)
        is_known = stepping is self._stepped
        self._stepped = None  # until the step is made
        reader = stepping.reader
        old_weight, new_weight = recurrence_weights(*self._beta2_and_step(groups, before, reader))

        # Sent in every step, as other ranks may read when this one does not: parts of the sum from old moments and
        # from gradients, step counts weighted by size, and the size of what has been read.
        parts = sums.new_zeros(len(sums), 4)
        tolerance = None
        if reader is not None:
            is_due = tried_steps % _STEPS_BETWEEN_READINGS == 0
            if self._reads(reader, is_known, is_due, squares.device):
                addends = reader.read(self._adam_parameters(groups), squares, self._grad_scale)
                addends[:, 2] *= stepping.sizes
                parts = torch.cat([layout.local_sums(addends, positions), stepping.sizes_by_kind], dim=1)
                tolerance = reader.tolerance
            elif self._parts is not None:
                parts[:, 0], parts[:, 1] = old_weight * self._parts, new_weight * sums[:, 0]
                parts[:, 3:] = stepping.sizes_by_kind
            if layout.ranks_differ:
                tolerance = 0.0  # the sum of all parts is what is carried on
        self._measured = stepping, parts[:, 0], parts[:, 1]
        total = layout.total(torch.cat([sums, stepping.sizes_by_kind, parts], dim=1))
        squared_norm, num_elements, old_sum, new_sum, steps, read_elements = total.unbind()
        reading = None
        if tolerance is not None:
            divisor = num_elements.clamp(min=1)
            is_complete = read_elements == num_elements
            reading = Reading(old_sum / divisor, new_sum / divisor, steps / divisor, is_complete, tolerance)
        return StepTotals(squared_norm, num_elements, old_weight, new_weight, reading)

    def end_step(self, clip: Tensor | None) -> None:
        assert self._measured is not None, "a step was measured"
        (stepping, old, new), self._measured = self._measured, None
        layout = self._layout[1] if self._layout is not None else None
        if layout is not None and layout.ranks_differ and stepping.reader is not None:
            self._parts = old + (new if clip is None else new * clip.square())
            if getattr(self._optimizer, "found_inf", None) is not None:
                return  # this step may have been left out: the next one reads
        if stepping.has_new and stepping.reader is not None:
            # Its moments are there now: the next step need not notice them.
            groups = with_gradients(self._optimizer)
            stepping = self._stepping_set(groups, *self._layout_of(groups), reads_moments=True)
        self._stepped = stepping

    @staticmethod
    def _reads(reader: MomentReader, is_known: bool, is_due: bool, device: torch.device) -> bool:
        reads = not is_known or is_due or not reader.tolerance
        if reads and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if not is_known:
                raise RuntimeError(
                    "this step has to read Adam's moments (it is the first one, or other parameters have a gradient "
                    "than before), which a CUDA graph cannot hold: make one step outside the graph first"
                )
            return not reader.tolerance
        return reads

    @property
    def _grad_scale(self) -> Tensor | None:
        """What a GradScaler has left to the optimizer to divide the gradients by."""
        return getattr(self._optimizer, "grad_scale", None)

    def _squared_norms(self, groups: list[GroupGradients]) -> Tensor:
        squares = squared_norms([grad for group in groups for grad in group.grads]).to(self.device())
        scale = self._grad_scale
        return squares if scale is None else squares / scale.to(squares).square()

    def _beta2(self, group: Mapping[str, Any]) -> float | Tensor:
        beta2: float | Tensor = group["betas"][1] if self._fixed_beta2 is None else self._fixed_beta2
        return beta2

    def _beta2_and_step(
        self, groups: list[GroupGradients], before: Numbers, reader: MomentReader | None
    ) -> tuple[float | Tensor, float | Tensor]:
        """Those of the first parameter, which are everyone's wherever the recurrence holds."""
        first = next((group for group in groups if group.params), groups[0])
        beta2 = self._beta2(first.group)
        if isinstance(beta2, Tensor):
            beta2 = float(beta2) if beta2.device.type == "cpu" else beta2.to(before.second_moment_mean)
        if reader is None or not first.states:
            return beta2, before.schedule_step + 1
        return beta2, adam_step(first.states[0], before.second_moment_mean) + 1

    def _layout_of(self, groups: list[GroupGradients]) -> tuple[Layout, Tensor | None]:
        """The layout of all parameters, and the positions among them of those that have a gradient (`None`: all)."""
        params = [p for group in groups for p in group.group["params"]]
        ids = list(map(id, params))
        if self._layout is None or self._layout[0] != ids:
            self._layout = ids, Layout(params, self.shards, self.process_group)
        if sum(len(group.params) for group in groups) == len(params):
            return self._layout[1], None
        positions = [i for i, p in enumerate(params) if p.grad is not None]
        return self._layout[1], torch.tensor(positions, dtype=torch.long, device="cpu")

    def _stepping_set(
        self, groups: list[GroupGradients], layout: Layout, positions: Tensor | None, *, reads_moments: bool
    ) -> _SteppingSet:
        """That of the last step, if nothing has changed."""
        reads_moments = reads_moments and self._fixed_beta2 is None and keeps_moments(self._optimizer)
        states = [state for group in groups for state in group.states] if reads_moments else []
        betas = [self._beta2(group.group) for group in groups]
        key = (
            [id(p) for group in groups for p in group.params],
            moment_ids(states),
            [id(beta2) if isinstance(beta2, Tensor) else beta2 for beta2 in betas],
            [reads_moments, *(group.group.get("amsgrad") for group in groups)],
        )
        if self._stepped is not None and self._stepped.key == key:
            return self._stepped
        reader = MomentReader(self._adam_parameters(groups)) if reads_moments else None
        if reader is not None and not reader.can_read:
            reader = None
        sizes = torch.tensor([layout.local_size(p) for group in groups for p in group.params], device="cpu")
        device = self.device()
        sizes = sizes.to(device, accumulation_dtype(device))
        return _SteppingSet(key, sizes, layout.local_sums(sizes.unsqueeze(1), positions), reader, not all(states))

    def _adam_parameters(self, groups: list[GroupGradients]) -> list[AdamParameter]:
        return [
            AdamParameter(grad, state, self._beta2(group.group), bool(group.group.get("amsgrad")))
            for group in groups
            for grad, state in zip(group.grads, group.states, strict=True)
        ]
