"""Scheduled weight decay on an optimizer. A step: measure the gradient, advance the mean, write the decay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import group_state
from .decay import DecayWriter
from .grad_norm import clip_factor, scale_
from .gradients import GradientSource, GroupGradients, with_gradients
from .parameter_gradients import ParameterGradients
from .recurrence import Numbers, StepTotals, advance
from .validation import check_options


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


class ScheduledStep(NamedTuple):
    """What an optimizer needs for a step of its parameters."""

    groups: list[GroupGradients]
    decays: list[float | Tensor]
    """The effective decay of each parameter group, at most 1/lr: a number, or a 0-d tensor on an accelerator."""
    clip: Tensor | None
    """What the gradients must be multiplied by first, 0-d."""


class WeightDecaySchedule(group_state.GroupValues):
    """
    Drives the weight decay of one optimizer: `decay = lambda * factor`, with [`decay_factor`].

    [`AdamS.schedule`], [`ScheduledWeightDecay`] and [`attach`] give it; it is not built by hand. All that it carries
    from step to step stands in the parameter groups (`group_state.py`).

    Args:
        optimizer (`torch.optim.Optimizer`): its parameter groups receive the effective decay; held weakly.
        beta2: see [`ScheduledWeightDecay`].
        reference_steps, unclipped_norm, max_grad_norm, process_group: see [`AdamS`].

    A checkpoint that is loaded brings its own `reference_steps`, `unclipped_norm` and `max_grad_norm`.

    References: Xie et al., NeurIPS 2023 (arXiv 2011.11152), algorithm "AdamS"; docs/algorithm.md.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        beta2: float | None = None,
        reference_steps: int = 0,
        unclipped_norm: bool = False,
        max_grad_norm: float = 0.0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        options = {
            "reference_steps": reference_steps,
            "unclipped_norm": unclipped_norm,
            "max_grad_norm": max_grad_norm,
        }
        check_options({**options, "process_group": process_group})
        super().__init__(optimizer)
        self.decay_writer = DecayWriter()
        self._clip_counts: tuple[Tensor | int, int] = (0, 0)
        self._grad_norm = torch.zeros((), device="cpu")
        self._num_elements: Tensor | int = 0
        self._measured: tuple[StepTotals, Tensor | None] | None = None
        """By [`clip_in_step`]: the gradients of the coming step, and what they must be multiplied by first."""
        self._under_way: tuple[Numbers, Tensor | None] | None = None
        """What the groups will hold once this step is made, and what its gradients are multiplied by. It stays for
        further inner steps of ZeRO, which show the same decay."""
        self.source: GradientSource = ParameterGradients(optimizer, beta2=beta2, process_group=process_group)
        # As torch's own options: groups that are added take them from here.
        optimizer.defaults.update(options)
        optimizer.__dict__["_decay_schedule"] = self  # see schedule_of
        group_state.complete(optimizer.param_groups, optimizer.defaults)
        self.hooks = [
            optimizer.register_state_dict_post_hook(lambda _, state_dict: self.as_saved(state_dict)),
            optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: self.adapted(state_dict)),
            optimizer.register_load_state_dict_post_hook(lambda _: self.loaded()),
        ]
        """Handles of the hooks on the optimizer."""

    @property
    def grad_norm(self) -> float:
        """2-norm of the whole gradient before clipping, at the last step that clipped (`max_grad_norm`) or measured it
        for a Trainer; 0.0 before the first. Makes the host wait."""
        return float(self._grad_norm)

    @property
    def num_elements(self) -> int:
        """Number of scalars, of all ranks, that the last step's mean was over; 0 before the first."""
        return int(self._num_elements)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks whose optimizers hold disjoint parts of the model."""
        return self.source.process_group

    def clip_statistics(self) -> tuple[int, int]:
        """How often gradients were clipped, and how often they were measured for it. Makes the host wait."""
        clipped, looks = self._clip_counts
        return int(clipped), looks

    # One step

    def refresh(self) -> None:
        """Have the next step read Adam's moments, after their numbers were changed in place. (It is not needed after a
        checkpoint is loaded or moments are replaced, and every 100th step reads them anyway.)"""
        self.source.refresh()

    @_disable_dynamo
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """
        Clip the gradients in place to a total 2-norm, right for any sharding. (With the option `max_grad_norm` the
        step does so itself, and reads the gradients once instead of twice.)

        Args:
            max_norm (`float`): largest norm of all gradients of the optimizer together, positive; `inf` only measures.

        Returns:
            `Tensor`: 0-d float32, the norm before clipping, of all shards.

        Raises:
            TypeError, ValueError: `max_norm` is not a positive number.
            RuntimeError: under DeepSpeed ZeRO, which clips by itself; a gradient is sparse.
        """
        check_options({"max_norm": max_norm})
        groups = with_gradients(self.optimizer)
        norm = self.source.norm(groups)
        clip = self._record_norm(norm, max_norm)
        if clip is not None:
            scale_([grad for group in groups for grad in group.grads], clip)
        return norm.float()

    @_disable_dynamo
    @torch.no_grad()
    def clip_in_step(self, max_norm: float) -> Tensor:
        """[`clip_grad_norm_`] that leaves the scaling to the step, for a caller who goes on to `step()` before anyone
        can look at a gradient; the option `max_grad_norm` holds as well. [`forget_clipping`] takes it back."""
        check_options({"max_norm": max_norm})
        max_norm = min(max_norm, self.max_grad_norm or math.inf)
        self._grad_norm = torch.zeros((), device="cpu")  # where there is no gradient at all
        self._measured = self._measure(with_gradients(self.optimizer), max_norm)
        return self._grad_norm.float()

    def forget_clipping(self) -> None:
        """The step that was to follow [`clip_in_step`] does not come."""
        self._measured = None

    @_disable_dynamo
    @torch.no_grad()
    def begin_step(self) -> ScheduledStep:
        """
        Take in the gradients of one optimizer step, before it changes any weight, and write the decay to
        `group["weight_decay"]`. [`end_step`] must follow when the step is made.

        Raises:
            RuntimeError: a gradient is sparse; with `unclipped_norm` the norm before clipping is not known.
        """
        groups = with_gradients(self.optimizer)
        group_state.complete(self.groups, self.optimizer.defaults)
        for group in self.groups:
            group_state.adopt_assignment(group)
        if self.source.begins_step():
            measured, self._measured = self._measured, None
            measured = measured or self._measure(groups, self.max_grad_norm)
            self._under_way = None if measured is None else self._advance(*measured)
        if self._under_way is None:
            return ScheduledStep(groups, [group["weight_decay"] for group in self.groups], None)
        numbers, clip = self._under_way
        return ScheduledStep(groups, self._write_decay(numbers), clip)

    @torch.no_grad()
    def end_step(self) -> None:
        """The step is made, and counts from now on. (If its kernel raises, this is not called: it did not happen.)"""
        if self._under_way is not None:
            numbers, clip = self._under_way
            group_state.write_numbers(self.groups, numbers)
            self.source.end_step(clip)

    def _measure(self, groups: list[GroupGradients], max_norm: float) -> tuple[StepTotals, Tensor | None] | None:
        """The coming step, clipped to `max_norm` if that is not 0; `None` if there is no gradient anywhere."""
        if max_norm and not self.unclipped_norm and any(group.get("amsgrad") for group in self.groups):
            self.clip_grad_norm_(max_norm)  # AMSGrad's maximum is looked up in the gradients as they will be
            max_norm = 0.0
        totals = self.source.measure(groups, self.numbers(), unclipped=self.unclipped_norm)
        if totals is None:
            return None
        if self.unclipped_norm and not (max_norm or self.source.clips_itself) and totals.squared_norm != 0:
            raise RuntimeError(
                "unclipped_norm=True: the schedule does not know the norm that the gradients had before clipping. Let "
                "the optimizer clip, by its option max_grad_norm (max_grad_norm=inf where nothing is to be clipped), "
                "or a Trainer in which no callback, hook or subclass looks at gradients before the step; where "
                "nothing is clipped, leave unclipped_norm out"
            )
        return totals, self._record_norm(totals.squared_norm.sqrt(), max_norm) if max_norm else None

    def _advance(self, totals: StepTotals, clip: Tensor | None) -> tuple[Numbers, Tensor | None]:
        self._num_elements = totals.num_elements
        numbers = advance(
            self.numbers(),
            totals,
            clip=None if self.unclipped_norm else clip,
            reference_steps=self.reference_steps,
            found_inf=getattr(self.optimizer, "found_inf", None),
        )
        return numbers, clip

    def _record_norm(self, norm: Tensor, max_norm: float) -> Tensor | None:
        clipped, looks = self._clip_counts
        self._clip_counts = clipped + (norm + 1e-6 > max_norm), looks + 1
        self._grad_norm = norm
        return clip_factor(norm, float(max_norm))

    def _write_decay(self, numbers: Numbers) -> list[float | Tensor]:
        return self.decay_writer.write(self.groups, numbers, calibrated=self.reference_steps > 0)

    # What engines, checkpoints and copies need

    def measure_by(self, source: GradientSource) -> None:
        """Take the gradient of the whole model from `source` from now on."""
        self.source = source
        self.forget_clipping()

    def as_saved(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A `state_dict` of the optimizer whose parameter groups have plain numbers, and the user's decay."""
        groups = group_state.as_saved(state_dict["param_groups"], self.optimizer.defaults)
        return {**state_dict, "param_groups": groups}

    def adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A `state_dict` as the optimizer is to load it; [`loaded`] must follow."""
        groups = group_state.adapted_for_loading(self.groups, state_dict["param_groups"], self.optimizer.defaults)
        return {"state": group_state.adapted_state(state_dict["state"]), "param_groups": groups}

    def loaded(self) -> None:
        """Groups and state are those of a checkpoint."""
        self.forget_clipping()
        self.source.refresh()
        group_state.complete(self.groups, self.optimizer.defaults)
        if self.step_count > 0:
            self._write_decay(self.numbers())  # of the last step
