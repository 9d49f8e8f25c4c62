"""Scheduled weight decay on an optimizer. A step: take in what has changed, measure, advance, write the decay."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import group_state
from .blocks import Blocks, ParameterBlocks
from .recurrence import SecondMomentMean
from .validation import check_flag, check_number, check_process_group, check_reference_steps
from .wrappers import unwrapped


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


# Largest lr * decay: one rounding below 1, so that 1 - lr * decay is never negative.
_LARGEST_DECAY = 1.0 - 2.0**-52
# Keys in the parameter groups, and what they show of a SecondMomentMean.
_NUMBERS = {
    "schedule_step": "step",
    "second_moment_mean": "mean",
    "num_elements": "num_elements",
    "reference_rms": "reference",
}


def schedule_of(optimizer: Any) -> WeightDecaySchedule | None:
    """The schedule that drives `optimizer`, or one that it wraps; `None` if there is none."""
    schedules = (getattr(each, "__dict__", {}).get("_decay_schedule") for each in unwrapped(optimizer))
    return next(filter(None, schedules), None)


class WeightDecaySchedule:
    """
    Drives the weight decay of one optimizer: `decay = lambda * factor`, with the factor of [`SecondMomentMean`].

    [`AdamS.schedule`], [`ScheduledWeightDecay`] and [`attach`] give it; it is not built by hand.

    Args:
        optimizer (`torch.optim.Optimizer`): its parameter groups receive the effective decay; held weakly.
        beta2, reference_steps, unclipped_norm, process_group: see [`ScheduledWeightDecay`].

    A checkpoint that is loaded brings its own `reference_steps` and `unclipped_norm`.

    References: Xie et al., NeurIPS 2023 (arXiv 2011.11152), algorithm "AdamS"; docs/algorithm.md.
    """

    # Whether the optimizer takes the decay as a number, for which the host must wait for an accelerator; None: if the
    # weights are on the CPU.
    _decay_on_host: bool | None = None

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        beta2: float | None = None,
        reference_steps: int = 0,
        unclipped_norm: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_reference_steps(reference_steps)
        check_flag("unclipped_norm", unclipped_norm)
        check_process_group(process_group)
        self._optimizer = weakref.ref(optimizer)
        self._warned_cap = False
        self._shown: dict[str, Any] = {}
        self._model_params = [weakref.ref(p) for group in optimizer.param_groups for p in group["params"]]
        """The parameters that the optimizer was built for; an engine may have put others in their place."""
        # As torch's own options: groups that are added take them from here.
        optimizer.defaults.update(reference_steps=reference_steps, unclipped_norm=unclipped_norm)
        optimizer.__dict__["_decay_schedule"] = self  # see schedule_of
        first = {**dict.fromkeys(_NUMBERS, 0), "reference_steps": reference_steps, "unclipped_norm": unclipped_norm}
        for group in optimizer.param_groups:
            for key, value in first.items():
                group.setdefault(key, value)
        self._use(ParameterBlocks(optimizer, beta2=beta2, process_group=process_group))
        self._complete_groups()
        self._handles = [
            optimizer.register_state_dict_pre_hook(lambda _: self._complete_groups()),
            optimizer.register_state_dict_post_hook(lambda _, state_dict: self._save(state_dict)),
            optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: self._adapt(state_dict)),
            optimizer.register_load_state_dict_post_hook(lambda _: self._loaded()),
        ]

    # Reading

    @property
    def optimizer(self) -> Optimizer:
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer of this weight decay schedule no longer exists")
        return optimizer

    @property
    def grad_rms(self) -> float:
        """sqrt of the mean second moment over the whole model at the last step; 0.0 before the first. Reading it makes
        the host wait for an accelerator."""
        return math.sqrt(self._mean.mean.detach())

    @property
    def step_count(self) -> int:
        """Optimizer steps that the schedule has seen; skipped steps (overflow) do not count, nor do those before the
        first gradient that was not zero."""
        return int(self._mean.step)

    @property
    def num_elements(self) -> int:
        """Number of scalars, of all ranks, that the last step's mean was over."""
        return int(self._mean.num_elements)

    @property
    def reference_rms(self) -> float:
        """The gradient rms of step `reference_steps`, 0.0 until then."""
        return float(self._mean.reference.detach())

    @property
    def reference_steps(self) -> int:
        """K of the calibration; 0 for the paper's schedule."""
        steps: int = group_state.read(self._groups, "reference_steps")
        return steps

    @property
    def unclipped_norm(self) -> bool:
        """Whether the schedule follows the norm that gradients had before clipping."""
        return bool(group_state.read(self._groups, "unclipped_norm"))

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks whose optimizers hold disjoint parts of the model."""
        return self._blocks.process_group

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """The parameter groups as they are now: engines replace them."""
        return self.optimizer.param_groups

    def clip_statistics(self) -> tuple[int, int]:
        """How many calls of [`clip_grad_norm_`] have clipped, and how many there were. Makes the host wait."""
        return self._blocks.clipping.statistics()

    # One step

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """
        Clip the gradients in place to a total 2-norm, and keep the norm for the step, which need not read them then.

        Args:
            max_norm (`float`): largest norm of all gradients of the optimizer together, positive; `inf` only measures.

        Returns:
            `Tensor`: 0-d float32, the norm before clipping, of all shards.

        Raises:
            TypeError, ValueError: `max_norm` is not a positive number.
            RuntimeError: under DeepSpeed ZeRO, which clips by itself.
        """
        return self._clip(max_norm, defer=False)

    @_disable_dynamo
    @torch.no_grad()
    def _clip(self, max_norm: float, *, defer: bool) -> Tensor:
        """[`clip_grad_norm_`], or with `defer` only its measuring: the optimizer must then scale by
        `clipping.deferred` in the step."""
        check_number(
            "max_norm", max_norm, "a positive norm (for no clipping, leave this call out)", lambda norm: norm > 0
        )
        self._take_in()
        return self._blocks.clip(max_norm, defer=defer, unclipped=self.unclipped_norm)

    @_disable_dynamo
    def _before_step(self) -> list[float | Tensor]:
        """
        Take in the gradients of one optimizer step, before the step changes any weight.

        Returns:
            `list[float | Tensor]`: the effective decay of each parameter group, at most 1/lr. A number where the
            weights are on the CPU (a 0-d tensor with a graph in a differentiable optimizer), else a 0-d tensor. It is
            also written to `group["weight_decay"]`.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        begins = self._blocks.begins_step()
        self._take_in(begins)
        if begins:
            measured = self._blocks.measure(unclipped=self.unclipped_norm)
            if measured is None:
                return [group["weight_decay"] for group in self._groups]
            self._mean.advance(
                self._blocks.running,
                self._blocks.beta2(),
                measured,
                total=self._blocks.total,
                reference_steps=self.reference_steps,
            )
            self._show()
        return self._write_decay()

    def _take_in(self, begins: bool = True) -> None:
        """Whatever has happened to groups and state since the last step."""
        self._complete_groups()
        groups = self._groups
        for group in groups:
            group_state.adopt_assignment(group)
        if begins:
            loaded = group_state.numbers_from_elsewhere(groups, self._shown)
            if loaded is not None:
                self._restart(loaded)
            self._blocks.follow(loaded, self._mean)
        self._show()

    def _write_decay(self) -> list[float | Tensor]:
        scalar = self._mean.factor(calibrated=self.reference_steps > 0)
        on_host = scalar.device.type == "cpu" if self._decay_on_host is None else self._decay_on_host
        factor = scalar.item() if on_host and not scalar.requires_grad else scalar
        groups = self._groups
        decays = [self._effective(group, factor) for group in groups]
        for group, decay in zip(groups, decays, strict=True):
            group_state.write_decay(
                group, decay.item() if isinstance(decay, Tensor) and decay.requires_grad else decay
            )
        return decays

    def _effective(self, group: dict[str, Any], factor: float | Tensor) -> float | Tensor:
        user_decay: float = group["initial_weight_decay"]
        lr: float | Tensor = group["lr"]
        if user_decay == 0:
            return 0.0
        decay = user_decay * factor
        if isinstance(decay, Tensor):
            if isinstance(lr, Tensor):
                return torch.minimum(decay, (_LARGEST_DECAY / lr.detach()).to(decay))
            return decay.clamp(max=_LARGEST_DECAY / lr) if lr > 0 else decay
        lr = float(lr)
        if lr * decay > _LARGEST_DECAY:
            self._warn_of_cap(user_decay, lr, decay)
            decay = _LARGEST_DECAY / lr
        return decay

    def _warn_of_cap(self, user_decay: float, lr: float, decay: float) -> None:
        if self._warned_cap:
            return
        self._warned_cap = True
        warnings.warn(
            f"the effective weight decay {decay:.3g} (weight_decay={user_decay:g}, gradient rms {self.grad_rms:.3g}) "
            f"times lr={lr:g} exceeds 1: it is held at 1/lr, which sets the weights to zero at every such step. "
            f"Choose a smaller weight_decay (an effective 0.01 is {0.01 * self.grad_rms:.2g} here), or "
            "reference_steps=100, which gives AdamW's value its usual meaning.",
            RuntimeWarning,
            stacklevel=3,
        )

    # State

    def _use(self, blocks: Blocks) -> None:
        """Take the squared norms of the gradient from `blocks` from now on (an engine does so when it is attached)."""
        if hasattr(self, "_blocks"):
            self._blocks.clipping.settle()
        self._blocks: Blocks = blocks
        self._restart(self._groups[0])

    def _detach(self) -> None:
        """Give the optimizer back to itself, with the user's constant decay."""
        for handle in self._handles:
            handle.remove()
        for group in self._groups:
            group_state.remove(group, self._shown)
        for key in group_state.OPTIONS:
            self.optimizer.defaults.pop(key, None)
        self._blocks.remove()
        del self.optimizer.__dict__["_decay_schedule"]

    def _restart(self, group: Mapping[str, Any]) -> None:
        """Go on from the numbers that a group holds."""
        self._mean = SecondMomentMean(**{name: float(group.get(key, 0)) for key, name in _NUMBERS.items()})
        self._shown = self._numbers()

    def _numbers(self) -> dict[str, Any]:
        """What all groups hold: options, and numbers of the whole model."""
        options = {key: group_state.read(self._groups, key, self._shown.get(key)) for key in group_state.OPTIONS}
        numbers = {key: getattr(self._mean, name) for key, name in _NUMBERS.items()}
        # With a graph only in a differentiable optimizer; a state must be copyable.
        numbers = {key: number.detach() if number.requires_grad else number for key, number in numbers.items()}
        return {**options, **numbers, **self._blocks.group_entries}

    def _show(self) -> None:
        """The groups hold the very tensors that the schedule goes on with: whoever replaces them is noticed."""
        self._shown = self._numbers()
        for group in self._groups:
            group.update(self._shown)

    def _complete_groups(self) -> None:
        group_state.complete(self._groups, self._shown)

    def _save_groups(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A `state_dict` whose parameter groups have plain numbers, and the user's decay."""
        groups = [group_state.as_saved(group, self._shown) for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def _save(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**self._save_groups(state_dict), "state": self._blocks.saved_state(state_dict["state"])}

    def _adapt(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._blocks.check_loadable(state_dict["param_groups"], state_dict["state"])
        self._complete_groups()
        groups = group_state.adapted_for_loading(self._groups, state_dict["param_groups"], self._shown)
        return {**state_dict, "param_groups": groups}

    def _loaded(self) -> None:
        self._blocks.clipping.settle()
        self._blocks.begin_anew()
        self._complete_groups()
        self._restart(self._groups[0])
        if self.step_count > 0:
            self._write_decay()  # of the last step
