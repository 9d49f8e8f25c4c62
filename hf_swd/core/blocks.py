"""What the recurrence runs over, and who tells it the squared norm of the gradient.

[`Blocks`] is the seam: the parameters themselves ([`ParameterBlocks`]), or an engine that knows the norm of the whole
model (`engines/zero.py`). The schedule knows nothing else of parameters.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import group_state
from .clipping import Clipping
from .grad_norm import HALF, placed_as, squared_norms
from .moments import maximum_sum, moment_sums, second_moment
from .recurrence import Measured, RunningSums, SecondMomentMean
from .sharding import Layout, Shard
from .state_entries import NO_STATE, STEP, SUM, State, StateWatch, as_saved, has_entry, hold, is_view, read, show


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


_IS_SPARSE = attrgetter("is_sparse")


class Blocks(ABC):
    """What the schedule asks of whoever tells it the squared norm of the whole gradient."""

    running: RunningSums
    clipping: Clipping
    group_entries: Mapping[str, Tensor] = {}
    """What the parameter groups hold beside the numbers of the whole model."""
    process_group: ProcessGroup | None = None
    """Ranks whose optimizers hold disjoint parts of the model."""

    def begins_step(self) -> bool:
        """Whether this `step()` of the optimizer is the first one of a new step of whoever calls it."""
        return True

    @abstractmethod
    def follow(self, loaded: Mapping[str, Any] | None, mean: SecondMomentMean) -> None:
        """Make the running sums those of the optimizer's state. `loaded`: the group that `mean` is from, if new."""

    @abstractmethod
    def beta2(self) -> Tensor:
        """Decay rate of each block's moment, shape `(blocks,)`."""

    @abstractmethod
    def measure(self, *, unclipped: bool) -> Measured | None:
        """What the coming step brings; `None` if no rank has a gradient."""

    @abstractmethod
    def total(self, values: Tensor) -> Tensor:
        """Sum over the model of numbers of the blocks, of shape `(blocks, k)`: shape `(k,)`."""

    @abstractmethod
    def clip(self, max_norm: float, *, defer: bool, unclipped: bool) -> Tensor:
        """Clip the gradients to a total norm, and return what it was: 0-d."""

    @abstractmethod
    def saved_state(self, state: Mapping[Any, Any]) -> dict[Any, Any]:
        """The state of a `state_dict` with plain numbers."""

    @abstractmethod
    def write_back(self) -> None:
        """After the step: let the optimizer's state hold the running sums."""

    def begin_anew(self) -> None:
        """A checkpoint was loaded: what is known of the state no longer holds."""
        return

    def check_loadable(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
        """Raise a `RuntimeError` if a checkpoint lacks what nothing else in it tells."""
        return

    def remove(self) -> None:
        """Take out of the optimizer's state what was put there."""
        return


class ParameterBlocks(Blocks):
    """
    One block for each parameter; its running sum lies in `optimizer.state[p]`.

    Args:
        optimizer (`torch.optim.Optimizer`): whose parameters, gradients and state are looked at; held weakly.
        beta2 (`float`, *optional*): decay rate of the second moment; by default `betas[1]` of each parameter group.
        process_group (`ProcessGroup`, *optional*): ranks whose optimizers hold disjoint parts of the model.
        shards (`Mapping[Tensor, Shard]`, *optional*): parameters that are divided among ranks without being DTensors.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        beta2: float | None = None,
        process_group: ProcessGroup | None = None,
        shards: Mapping[Tensor, Shard] | None = None,
    ) -> None:
        self._reference = weakref.ref(optimizer)
        self._fixed_beta2 = beta2
        self.process_group = process_group
        self.shards = shards or {}
        self.clipping = Clipping()
        self.begin_anew()

    def divided(
        self, *, shards: Mapping[Tensor, Shard] | None = None, process_group: ProcessGroup | None = None
    ) -> ParameterBlocks:
        """The same for parameters of which this rank holds shards, or no part of others'."""
        return ParameterBlocks(
            self._optimizer, beta2=self._fixed_beta2, process_group=process_group or self.process_group, shards=shards
        )

    @property
    def _optimizer(self) -> Optimizer:
        optimizer = self._reference()
        assert optimizer is not None, "the schedule has looked"
        return optimizer

    # The optimizer's state

    def begin_anew(self) -> None:
        self._params: list[Tensor] = []
        self._is_read = False
        states = self._states_of(self._all_params())
        hold(states)
        self._watch = StateWatch(states)

    def follow(self, loaded: Mapping[str, Any] | None, mean: SecondMomentMean) -> None:
        params = self._all_params()
        self._states = states = self._states_of(params)
        is_new = not self._is_read
        if not self._holds(params) or not self._watch.sees_the_same(states):
            self._read(params, states)
        if (is_new or loaded is not None) and mean.step == 0:
            # After another optimizer's moments, its steps count.
            last_step = self.total(self.running.steps.unsqueeze(1), largest=True).squeeze(0)
            has_moments = self.total(self.running.sums.unsqueeze(1)).squeeze(0) > 0
            mean.step = torch.where(has_moments, last_step, 0.0)

    def check_loadable(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
        states = [values for values in state.values() if isinstance(values, Mapping)]
        if not any(map(group_state.has_effective_decay, groups)) or any(map(has_entry, states)):
            return
        moments = [second_moment(values) for values in states]
        clipped = any(group.get("unclipped_norm") for group in groups)
        if clipped or any(moment is None or moment.dtype in HALF for moment in moments):
            raise RuntimeError(
                "state_dict: this checkpoint from before hf_swd 0.1.0 lacks the sums of second moments, and moments "
                "in half precision, of clipped gradients (unclipped_norm), or none at all do not tell them: resume "
                "with the version that wrote it, or load the weights alone"
            )

    def write_back(self) -> None:
        new = [i for i, state in enumerate(self._states) if state is NO_STATE and self._params[i].grad is not None]
        for i in new:
            self._states[i] = self._optimizer.state[self._params[i]]
        if new or self._views[0] is not self.running.sums:
            show(self._states, self._entries())
        self._watch = StateWatch(self._states)

    def saved_state(self, state: Mapping[Any, Any]) -> dict[Any, Any]:
        params = self._all_params()
        states = self._states_of(params)
        # A shard's sum is no sum of the parameter, and would be taken for one on every rank.
        hidden = [p in self.shards or old for p, old in zip(params, self._watch.outdated(states), strict=True)]
        return as_saved(
            state, {id(self._optimizer.state.get(p)) for p, hide in zip(params, hidden, strict=True) if hide}
        )

    def remove(self) -> None:
        for state in self._optimizer.state.values():
            for key in (SUM, STEP):
                state.pop(key, None)

    def _all_params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _states_of(self, params: Sequence[Tensor]) -> list[State]:
        """The state of each parameter. An optimizer takes one that is not empty for complete: an empty one counts as
        none, and is not written to before the step."""
        state = self._optimizer.state
        return [state.get(p) or NO_STATE for p in params]

    def _holds(self, params: Sequence[Tensor]) -> bool:
        return self._is_read and len(params) == len(self._params) and all(map(is_, params, self._params))

    def _read(self, params: list[Tensor], states: Sequence[State]) -> None:
        if not self._holds(params):
            # What is known of the gradients is known by position.
            self.clipping.settle([p.grad for p in params if p.grad is not None])
        is_trusted = [
            # Of a shard, a number from a checkpoint would be of the whole parameter.
            not old and (p not in self.shards or (has_entry(state) and is_view(state[SUM])))
            for p, state, old in zip(params, states, self._watch.outdated(states), strict=True)
        ]
        numbers = read(states, is_trusted)
        self._params, self._is_read = params, True
        self._layout = Layout(params, self.shards, self.process_group)
        counts = self._layout.counts
        sums, steps = (torch.tensor(vector, dtype=counts.dtype).to(counts.device) for vector in numbers[:2])
        if moments := numbers[2]:
            parts = torch.zeros_like(sums)
            parts[list(moments)] = moment_sums(list(moments.values())).to(sums)
            sums += self._layout.of_whole_parameters(parts.unsqueeze(1)).squeeze(1)
        self.running = RunningSums(sums, steps, counts)
        self._views: tuple[Tensor | None, list[tuple[Tensor, Tensor]]] = None, []
        self._beta2: tuple[list[tuple[Any, int]], Tensor] | None = None
        self._index: tuple[list[int], Tensor] | None = None
        show(states, self._entries())
        self._watch = StateWatch(states)

    def _entries(self) -> list[tuple[Tensor, Tensor]]:
        """Views of the vectors, which follow them as long as these are changed in place."""
        if self._views[0] is not self.running.sums:
            views = (vector.detach().unbind() for vector in (self.running.sums, self.running.steps))
            self._views = self.running.sums, list(zip(*views, strict=True))
        return self._views[1]

    # One step

    def beta2(self) -> Tensor:
        groups = self._optimizer.param_groups
        values = [
            (group["betas"][1] if self._fixed_beta2 is None else self._fixed_beta2, len(group["params"]))
            for group in groups
        ]
        if self._beta2 is None or any(isinstance(beta2, Tensor) for beta2, _ in values) or self._beta2[0] != values:
            like = self.running.sums
            vectors = [torch.as_tensor(beta2, dtype=like.dtype).to(like.device).expand(n) for beta2, n in values]
            self._beta2 = values, torch.cat(vectors)
        return self._beta2[1]

    def clip(self, max_norm: float, *, defer: bool, unclipped: bool) -> Tensor:
        grads, positions = self._gradients()
        self.clipping.settle(grads)
        measured = self._of_whole_parameters(squared_norms(grads), positions)
        norm = self.total(measured.squares.unsqueeze(1)).squeeze(0).sqrt()
        self.clipping.clip(grads, measured, norm, max_norm, defer=defer, unclipped=unclipped)
        return norm.float()

    def measure(self, *, unclipped: bool) -> Measured | None:
        grads, positions = self._gradients()
        measured = self.clipping.take(grads)
        if not grads and self._layout.is_local:
            return None
        # From here to the end of the step, sums and moments are not of the same step.
        self._watch = StateWatch()
        if measured is None:
            measured = self._of_whole_parameters(squared_norms(grads), positions)
            if unclipped and measured.squares.any():
                raise RuntimeError(
                    "unclipped_norm=True: the schedule does not know the norm that the gradients had before clipping. "
                    "Clip with clip_grad_norm_ of the optimizer (or of its schedule) after the last change to the "
                    "gradients, as a Trainer does; where nothing is clipped, leave unclipped_norm out"
                )
        optimizer = self._optimizer
        grad_scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if grad_scale is not None:
            measured = replace(measured, squares=measured.squares / grad_scale.to(measured.squares).square())
        if not unclipped and any(group.get("amsgrad") for group in optimizer.param_groups):
            measured = replace(measured, at_least=self._maxima(grad_scale))
        if found_inf is not None:
            measured = replace(measured, skipped=found_inf.to(measured.squares) > 0)
        return measured

    def total(self, values: Tensor, *, largest: bool = False) -> Tensor:
        return self._layout.total(values, largest=largest)

    def _gradients(self) -> tuple[list[Tensor], list[int]]:
        """The gradients that there are, and the positions of their parameters."""
        found = [p.grad for p in self._params]
        positions = [i for i, grad in enumerate(found) if grad is not None]
        grads = [grad for grad in found if grad is not None]
        for grad in grads if any(map(_IS_SPARSE, grads)) else ():
            if grad.is_sparse:
                raise RuntimeError(
                    f"the gradient of a parameter of shape {tuple(grad.shape)} is sparse, and scheduled weight decay "
                    "needs dense gradients: use sparse=False in its nn.Embedding, or give it to torch.optim.SparseAdam"
                )
        for k, grad in enumerate(grads if set(map(type, grads)) - {Tensor} else ()):
            param = self._params[positions[k]]
            grads[k] = param.grad = placed_as(grad, param)
        return grads, positions

    def _of_whole_parameters(self, squares: Tensor, positions: list[int]) -> Measured:
        found = torch.stack([squares, torch.ones_like(squares)], dim=1).to(self.running.sums)
        is_known = not self._layout.has_meshes  # ranks may differ in which parameters have a gradient
        if len(positions) < len(self._params):
            is_known = False
            if self._index is None or self._index[0] != positions:
                self._index = positions, torch.tensor(positions, dtype=torch.long).to(found.device, non_blocking=True)
            found = found.new_zeros(len(self._params), 2).index_copy(0, self._index[1], found)
        squares, flags = self._layout.of_whole_parameters(found).unbind(1)
        return Measured(squares, None if is_known else flags > 0)

    def _maxima(self, grad_scale: Tensor | None) -> Tensor:
        """What AMSGrad's maxima add up to. As a lower bound, since in float16 they underflow to 0."""
        zero = self.running.sums.new_zeros(())
        maxima = [
            maximum_sum(p.grad, self._optimizer.state.get(p, NO_STATE), group["betas"][1], grad_scale).to(zero)
            if group.get("amsgrad") and p.grad is not None
            else zero
            for group in self._optimizer.param_groups
            for p in group["params"]
        ]
        return self._layout.of_whole_parameters(torch.stack(maxima).unsqueeze(1)).squeeze(1)
