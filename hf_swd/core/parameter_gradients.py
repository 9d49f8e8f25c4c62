"""The gradient of the whole model, measured on the parameters that an optimizer holds."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .grad_norm import squared_norms
from .gradients import GradientSource, GroupGradients, with_gradients
from .moments import keeps_moments, moments_in, read_moments, reading_tolerance, without_sync
from .recurrence import Numbers, Reading, StepTotals, recurrence_weights
from .sharding import Layout, Shard


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


_STEPS_BETWEEN_READINGS = 100


class _SteppingSet(NamedTuple):
    """What is known of the parameters that step together, for as long as they are the same."""

    key: tuple[list[Any], ...]
    """By which a change is noticed: `id`s and sizes of parameters, `id`s of moments, and beta2."""
    referred: list[weakref.ref[Tensor]]
    """Moments, and beta2 if it is a tensor: as long as they live, no other tensor has their `id`."""
    sizes: Tensor
    """Number of scalars of each that are here, shape `(params,)`."""
    sizes_by_kind: Tensor
    """The same summed by kind of layout, shape `(kinds, 1)`."""
    tolerance: float | None
    """See [`reading_tolerance`]; `None` where moments do not tell the mean, and it is carried on as it is."""
    is_new: bool
    """Whether a parameter has no state yet."""


class _MeasuredStep(NamedTuple):
    """Of the coming step, until it is made."""

    stepping: _SteppingSet
    old_parts: Tensor
    """This rank's parts of the sum of second moments, by kind of layout: of the old moments, shape `(kinds,)`."""
    new_parts: Tensor
    """And of the gradients."""


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
    """

    def __init__(
        self, optimizer: Optimizer, *, beta2: float | None = None, process_group: ProcessGroup | None = None
    ) -> None:
        self._reference = weakref.ref(optimizer)
        self._fixed_beta2 = beta2
        self.shards: Mapping[int, Shard] = {}
        """By `id`, parameters that are known to be divided without being DTensors."""
        self._to_be_ended: _MeasuredStep | None = None
        self._num_measured = 0
        self.divide(process_group=process_group)

    def divide(self, *, shards: Mapping[int, Shard] | None = None, process_group: ProcessGroup | None = None) -> None:
        """From now on, sum over the ranks that hold the other parts of these parameters (`shards`, by `id`), or over
        ranks that hold other parameters (`process_group`)."""
        self.shards = shards or self.shards
        self.process_group = process_group or self.process_group
        self._layout: tuple[list[int], Layout] | None = None
        self._parts: Tensor | None = None
        """Where ranks hold different parameters, instead of the mean: this rank's part of the sum of second moments,
        by kind of layout, shape `(kinds,)`."""
        self.refresh()

    @property
    def _optimizer(self) -> Optimizer:
        optimizer = self._reference()
        assert optimizer is not None, "the schedule has looked"
        return optimizer

    def refresh(self) -> None:
        self._stepped: _SteppingSet | None = None
        """The set of the last step; `None` if the next one must read."""

    def norm(self, groups: list[GroupGradients]) -> Tensor:
        layout = self._whole_layout(groups)
        squares = self._squared_norms(groups).unsqueeze(1)
        return layout.total(layout.local_sums(squares, groups))[0].sqrt()

    def measure(self, groups: list[GroupGradients], before: Numbers, *, unclipped: bool) -> StepTotals | None:
        layout = self._whole_layout(groups)
        if layout.is_local and not any(group.params for group in groups):
            return None
        squares = self._squared_norms(groups)
        sums = layout.local_sums(squares.unsqueeze(1), groups)
        stepping = self._stepping_set(groups, layout, squares, reads_moments=not unclipped)
        tolerance = stepping.tolerance
        old_weight, new_weight = self._weights(groups, before, is_adams=tolerance is not None)

        # Four columns: what is left of old moments, what gradients add, step counts weighted by size, and the size of
        # what was read. They are sent in every step, as another rank may read when this one does not.
        parts = sums.new_zeros(len(sums), 4)
        reads = self._reads(groups, stepping, squares.device)
        carries_parts = tolerance is not None and layout.ranks_know_their_part_only
        if reads:
            addends = read_moments(groups, squares, self._grad_scale)
            addends[:, 2] *= stepping.sizes
            parts = torch.cat([layout.local_sums(addends, groups), stepping.sizes_by_kind], dim=1)
        elif carries_parts and self._parts is not None:
            parts[:, 0], parts[:, 1] = old_weight * self._parts, new_weight * sums[:, 0]
            parts[:, 3:] = stepping.sizes_by_kind
        self._to_be_ended = _MeasuredStep(stepping, parts[:, 0], parts[:, 1])
        self._num_measured += 1
        self._stepped = None  # until the step is made

        total = layout.total(torch.cat([sums, stepping.sizes_by_kind, parts], dim=1))
        squared_norm, num_elements, old_sum, new_sum, steps, read_elements = total.unbind()
        reading = None
        if reads or carries_parts:
            divisor = num_elements.clamp(min=1)
            reading = Reading(
                old_sum / divisor,
                new_sum / divisor,
                steps / divisor,
                is_complete=read_elements == num_elements,
                tolerance=0.0 if carries_parts else tolerance or 0.0,
            )
        return StepTotals(squared_norm, num_elements, old_weight, new_weight, reading)

    def end_step(self, clip: Tensor | None) -> None:
        assert self._to_be_ended is not None and self._layout is not None, "a step was measured"
        (stepping, old, new), self._to_be_ended = self._to_be_ended, None
        layout = self._layout[1]
        if layout.ranks_know_their_part_only and stepping.tolerance is not None:
            self._parts = old + (new if clip is None else new * clip.square())
            if getattr(self._optimizer, "found_inf", None) is not None:
                return  # this step may have been left out: the next one reads
        self._stepped = stepping
        if stepping.is_new and stepping.tolerance is not None:
            # With the moments that Adam has made in this step, which need not be read.
            groups = with_gradients(self._optimizer)
            self._stepped = self._stepping_set(groups, layout, stepping.sizes, reads_moments=True)

    def _reads(self, groups: list[GroupGradients], stepping: _SteppingSet, device: torch.device) -> bool:
        """Whether this step reads the moments."""
        if stepping.tolerance is None:
            return False
        # A number that is no tensor yet is that of new groups, or just loaded.
        is_known = stepping is self._stepped and isinstance(groups[0].group["second_moment_mean"], Tensor)
        is_due = self._num_measured % _STEPS_BETWEEN_READINGS == 0  # on all ranks at once
        reads = is_due or not is_known or not stepping.tolerance
        if reads and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if not is_known:
                raise RuntimeError(
                    "this step has to read Adam's moments (it is the first one, or other parameters have a gradient "
                    "than before), which a CUDA graph cannot hold: make one step outside the graph first"
                )
            return not stepping.tolerance
        return reads

    @property
    def _grad_scale(self) -> Tensor | None:
        """What a GradScaler has left to the optimizer to divide the gradients by."""
        return getattr(self._optimizer, "grad_scale", None)

    def _squared_norms(self, groups: list[GroupGradients]) -> Tensor:
        squares = squared_norms([grad for group in groups for grad in group.grads])
        params = (p for group in groups for p in group.group["params"])
        squares = squares.to(next((p.device for p in params), squares.device))
        scale = self._grad_scale
        return squares if scale is None else squares / scale.to(squares).square()

    def _beta2(self, group: GroupGradients) -> float | Tensor:
        return group.beta2 if self._fixed_beta2 is None else self._fixed_beta2

    def _weights(
        self, groups: list[GroupGradients], before: Numbers, *, is_adams: bool
    ) -> tuple[float | Tensor, float | Tensor]:
        """Weights of the recurrence for the first parameter that steps: where it holds, all have the same. By Adam's
        step count, if the mean is that of its moments."""
        mean = before.second_moment_mean
        group = next((group for group in groups if group.params), groups[0])
        step: float | Tensor = before.schedule_step
        if is_adams and group.states:
            step = without_sync(group.states[0].get("step", 0.0), mean)
        return recurrence_weights(without_sync(self._beta2(group), mean), step + 1)

    def _whole_layout(self, groups: list[GroupGradients]) -> Layout:
        """The layout of all parameters, with and without a gradient."""
        params = [p for group in groups for p in group.group["params"]]
        ids = list(map(id, params))
        if self._layout is None or self._layout[0] != ids:
            self._layout = ids, Layout(params, self.shards, self.process_group)
        return self._layout[1]

    def _stepping_set(
        self,
        groups: list[GroupGradients],
        layout: Layout,
        like: Tensor,
        *,
        reads_moments: bool,
    ) -> _SteppingSet:
        """The parameters that step now: the same object as of the last step, if nothing has changed."""
        reads_moments = reads_moments and self._fixed_beta2 is None and keeps_moments(self._optimizer)
        states = [state for group in groups for state in group.states] if reads_moments else []
        moments = moments_in(states)
        rates = list(map(self._beta2, groups))
        key = (
            [id(p) for group in groups for p in group.params],
            [p.numel() for group in groups for p in group.params],
            list(map(id, moments)),
            [id(beta2) if isinstance(beta2, Tensor) else beta2 for beta2 in rates],
            [reads_moments, *(group.amsgrad for group in groups)],
        )
        stepped = self._stepped
        if stepped is not None and stepped.key == key and all(tensor() is not None for tensor in stepped.referred):
            return stepped
        sizes = torch.tensor([layout.local_size(p) for group in groups for p in group.params], device="cpu").to(like)
        return _SteppingSet(
            key,
            [weakref.ref(tensor) for tensor in (*moments, *rates) if isinstance(tensor, Tensor)],
            sizes,
            layout.local_sums(sizes.unsqueeze(1), groups),
            reading_tolerance(groups) if reads_moments else None,
            is_new=not all(states),
        )
