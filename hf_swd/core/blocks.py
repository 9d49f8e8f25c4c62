"""What the recurrence runs over, and who tells it the squared norm of the gradient.

[`Blocks`] is the seam: the parameters themselves ([`ParameterBlocks`]), or an engine that knows the norm of the whole model
(`engines/zero.py`). The schedule knows nothing else of parameters.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from . import group_state
from .clipping import Clipping
from .entries import STEP, SUM, as_numbers
from .grad_norm import accumulation_dtype, squared_norms, without_pending_sums
from .moments import maximum_sums, moment_sums, second_moment
from .recurrence import Measured, RunningSums, SecondMomentMean, mean_of
from .sharding import Layout, Shard
from .state_watch import StateWatch


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


__all__ = ["Blocks", "ParameterBlocks"]

_NO_STATE: Mapping[str, Any] = {}


class Blocks(Protocol):
    """The blocks of one optimizer."""

    running: RunningSums
    clipping: Clipping
    group_entries: Mapping[str, Tensor]
    """What is to be shown in the parameter groups, beside the numbers of the whole model."""

    def begins_step(self) -> bool:
        """Whether this `step()` of the optimizer is the first one of a new step of whoever calls it."""

    def follow(self, loaded: Mapping[str, Any] | None, mean: SecondMomentMean) -> None:
        """Make the running sums those of the optimizer's state as it is now. `loaded`: the group whose numbers have just become `mean`, if
        they came from elsewhere."""

    def beta2(self) -> Tensor:
        """Decay rate of each block's moment, shape `(blocks,)`."""

    def measure(self, *, unclipped: bool) -> Measured | None:
        """What the coming step brings; `None` if no rank has a gradient."""

    def total(self, values: Tensor) -> Tensor:
        """Sum over the model of numbers of the blocks, of shape `(blocks, k)`: shape `(k,)`."""

    def clip(self, max_norm: float, *, defer: bool, unclipped: bool) -> Tensor:
        """Clip the gradients to a total norm, and return what it was: 0-d."""

    def write_back(self) -> None:
        """After the step: show the running sums in the optimizer's state."""

    def begin_anew(self) -> None:
        """After a checkpoint was loaded: what is known of the state no longer holds."""

    def saved_state(self, state: Mapping[Any, Any]) -> dict[Any, Any]:
        """The state of a `state_dict` with plain numbers for the entries."""


class ParameterBlocks:
    """
    One block for each parameter; its running sum lies in `optimizer.state[p]`.

    Args:
        optimizer (`torch.optim.Optimizer`): whose parameters, gradients and state are looked at; held weakly.
        beta2 (`float`, *optional*): decay rate of the second moment; by default `betas[1]` of each parameter group.
        process_group (`ProcessGroup`, *optional*): ranks whose optimizers hold disjoint parts of the model.
        shards (`Mapping[Tensor, Shard]`, *optional*): parameters that are divided among ranks without being DTensors.
    """

    group_entries: Mapping[str, Tensor] = {}

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
        self._shards = shards or {}
        self.clipping = Clipping()
        self.begin_anew()

    def divided(
        self, *, shards: Mapping[Tensor, Shard] | None = None, process_group: ProcessGroup | None = None
    ) -> ParameterBlocks:
        """The same for parameters of which this rank holds shards, or no part of others'."""
        return ParameterBlocks(
            self._optimizer, beta2=self._fixed_beta2, process_group=process_group or self.process_group, shards=shards
        )

    def knows_shard(self, p: Tensor) -> bool:
        return p in self._shards

    @property
    def _optimizer(self) -> Optimizer:
        return self._reference()

    def begins_step(self) -> bool:
        return True

    # The optimizer's state

    def begin_anew(self) -> None:
        params = self._all_params()
        self._watch = StateWatch(params, self._states(params))
        self._params: list[Tensor] | None = None

    def follow(self, loaded: Mapping[str, Any] | None, mean: SecondMomentMean) -> None:
        params = self._all_params()
        states = self._states(params)
        is_new = self._params is None
        if is_new or not self._watch.sees_the_same(params, states):
            had_entries = any(SUM in state for state in states)
            self._read(params, states)
        else:
            had_entries = True
        if is_new or loaded is not None:
            self._take_over(mean, states, had_entries)

    def write_back(self) -> None:
        # An optimizer takes a state that is not empty for complete: only now is it one's turn where there was none.
        state = self._optimizer.state
        self._show([state[p] if p.grad is not None else state.get(p, _NO_STATE) for p in self._params])

    def saved_state(self, state: Mapping[Any, Any]) -> dict[Any, Any]:
        params = self._all_params()
        states = self._states(params)
        outdated = {id(self._optimizer.state[p]) for p in self._watch.outdated(params, states)}
        # A shard's sum is no sum of the parameter, and would be taken for one on every rank.
        hidden = any(p in self._shards for p in params)
        saved = {k: dict(v) if _has_entry(v) else v for k, v in state.items()}
        shown = [key for key, values in saved.items() if values is not state[key]]
        for name in (SUM, STEP):
            numbers = as_numbers([saved[key].pop(name) for key in shown])
            for key, number in zip(shown, numbers, strict=True):
                if not hidden and id(state[key]) not in outdated:
                    saved[key][name] = number
        return saved

    def _show(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Put sum and steps of each parameter into its state, where there is one: views of the vectors, which follow them as long as
        these are changed in place."""
        if self._views[0] is not self.running.sums:
            views = (vector.detach().unbind() for vector in (self.running.sums, self.running.steps))
            self._views = self.running.sums, list(zip(*views, strict=True))
        for state, (total, step) in zip(states, self._views[1], strict=True):
            if state is not _NO_STATE and state.get(SUM) is not total:
                state[SUM], state[STEP] = total, step
        self._watch = StateWatch(self._params, states)

    def _all_params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _states(self, params: Sequence[Tensor]) -> list[Mapping[str, Any]]:
        state = self._optimizer.state
        return [state.get(p, _NO_STATE) for p in params]

    def _read(self, params: list[Tensor], states: Sequence[Mapping[str, Any]]) -> None:
        """Take the sums from the entries, and where these are missing, zero, not finite or not of Adam's step, from Adam's moments."""
        outdated = self._watch.outdated(params, states)
        with_entry = [
            i
            for i, (p, state) in enumerate(zip(params, states, strict=True))
            # A checkpoint's number is of the whole parameter.
            if _has_entry(state) and p not in outdated and (p not in self._shards or isinstance(state[SUM], Tensor))
        ]
        sums, steps = ([0.0] * len(params) for _ in range(2))
        for key, numbers in ((SUM, sums), (STEP, steps)):
            for i, number in zip(with_entry, as_numbers([states[i][key] for i in with_entry]), strict=True):
                numbers[i] = number
        rebuilt: dict[int, Tensor] = {}
        for i, state in enumerate(states):
            moment = second_moment(state)
            if moment is not None:
                adam_step = float(state["step"])
                if steps[i] != adam_step or not 0 < sums[i] < math.inf:
                    rebuilt[i], steps[i] = moment, adam_step
        device = params[0].device if params else torch.device("cpu")
        dtype = accumulation_dtype(device)
        if self._params is None or len(params) != len(self._params) or not all(map(is_, params, self._params)):
            self.clipping.settle()  # what is known of the gradients is known by position
        self._params = params
        self._layout = Layout(params, self._shards, self.process_group)
        self._beta2: tuple[list, Tensor] | None = None
        self._active: tuple[list[int], Tensor, Tensor] | None = None
        local, theirs = (torch.tensor(numbers, dtype=dtype).to(device) for numbers in (sums, steps))
        if rebuilt:
            local[list(rebuilt)] = 0.0
            parts = torch.zeros_like(local)
            parts[list(rebuilt)] = moment_sums(list(rebuilt.values())).to(local)
            local += self._layout.of_whole_parameters(parts.unsqueeze(1)).squeeze(1)
        self.running = RunningSums(local, theirs, self._layout.counts)
        self._views: tuple[Tensor | None, list[tuple[Tensor, Tensor]]] = None, []
        self._show(states)

    def _take_over(self, mean: SecondMomentMean, states: Sequence[Mapping[str, Any]], had_entries: bool) -> None:
        """
        Bring numbers of the model that have just been loaded, and the sums, together.

        After another optimizer's moments, its steps count. Where a checkpoint has the mean but no sums (FSDP1; hf_swd 0.1), sums rebuilt
        from moments of low precision are less than the truth; by how much is known if the mean was over all of them.
        """
        running, groups = self.running, self._optimizer.param_groups
        last_step = self.total(running.steps.unsqueeze(1), largest=True).squeeze(0)
        entries = torch.full_like(running.counts, had_entries).unsqueeze(1)
        if mean.step == 0:
            has_moments = self.total(running.sums.unsqueeze(1)).squeeze(0) > 0
            mean.step = torch.where(has_moments, last_step, 0.0)
        elif mean.mean > 0 and self.total(entries) == 0:
            known, num_elements = mean_of(
                running.sums, running.steps, running.counts, self.beta2(), running.steps > 0, self.total
            )
            unclipped = group_state.read(groups, "unclipped_norm")
            if num_elements == 0:  # the optimizer keeps no second moment: every parameter gets its share of the mean
                running.steps.copy_(mean.step * running.steps.new_tensor([len(state) > 0 for state in states]))
                running.sums.copy_(mean.mean * running.counts * (1 - self.beta2().pow(running.steps)))
            elif unclipped or (
                last_step == mean.step
                and num_elements == mean.num_elements
                and known.isfinite() and known > 0
                and not any(group.get("amsgrad") for group in groups)
            ):
                running.sums.mul_(mean.mean / known)

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
                    "unclipped_norm=True: the schedule does not know the norm that the gradients had before clipping. Clip with "
                    "clip_grad_norm_ of the optimizer (or of its schedule) after the last change to the gradients, as SWDTrainer does; "
                    "where nothing is clipped, leave unclipped_norm out"
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
        grads, positions = [], []
        for i, p in enumerate(self._params):
            grad = p.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(
                    f"the gradient of a parameter of shape {tuple(p.shape)} is sparse, and scheduled weight decay needs dense gradients: "
                    "use sparse=False in its nn.Embedding, or give it to torch.optim.SparseAdam"
                )
            if type(grad) is not Tensor:
                grad = p.grad = without_pending_sums(grad)
            grads.append(grad)
            positions.append(i)
        return grads, positions

    def _of_whole_parameters(self, squares: Tensor, positions: list[int]) -> Measured:
        squares, with_grad = squares.to(self.running.sums), None
        if len(positions) < len(self._params):
            index, with_grad = self._activity(positions)
            squares = torch.zeros_like(self.running.sums).index_copy(0, index, squares)
        if self._layout.has_meshes:
            # Ranks may differ in which parameters have a gradient.
            flags = torch.ones_like(squares) if with_grad is None else with_grad.to(squares)
            squares, flags = self._layout.of_whole_parameters(torch.stack([squares, flags], dim=1)).unbind(1)
            with_grad = flags > 0
        return Measured(squares, with_grad)

    def _maxima(self, grad_scale: Tensor | None) -> Tensor:
        """What AMSGrad's maxima add up to. As a lower bound, since in float16 they underflow to 0."""
        groups = self._optimizer.param_groups
        beta2s = [group["betas"][1] for group in groups]
        found = maximum_sums(self._optimizer, beta2s, grad_scale)
        zero = self.running.sums.new_zeros(())
        maxima = torch.stack([found.get(i, zero).to(zero) for i in range(len(self._params))])
        return self._layout.of_whole_parameters(maxima.unsqueeze(1)).squeeze(1)

    def _activity(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Index and mask, on the device, of the parameters that have a gradient."""
        if self._active is None or self._active[0] != positions:
            device = self.running.sums.device
            with_grad = torch.zeros(len(self._params), dtype=torch.bool)
            with_grad[positions] = True
            index = torch.tensor(positions, dtype=torch.long)
            self._active = positions, index.to(device, non_blocking=True), with_grad.to(device, non_blocking=True)
        return self._active[1:]


def _has_entry(state: Any) -> bool:
    return isinstance(state, Mapping) and SUM in state and STEP in state
