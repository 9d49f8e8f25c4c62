"""The running sums where torch keeps what belongs to a parameter: `optimizer.state[p]`.

| key | what |
|---|---|
| `second_moment_sum` | sum of Adam's second moment over the whole parameter |
| `second_moment_step` | number of steps in it: Adam's own `step` at that time |

In memory both are 0-d float64 tensors, views of the vectors that the schedule computes with; in a checkpoint numbers
(a tensor would be cast to the parameter's dtype when it is loaded). A sum counts only if its step is Adam's; otherwise
somebody else (AdamW) has trained in between, and Adam's moments tell the sum.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from operator import is_
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from .moments import second_moment


SUM = "second_moment_sum"
STEP = "second_moment_step"

State = dict[str, Any]
NO_STATE = cast(State, MappingProxyType({}))  # nobody may write to it


def has_entry(state: Any) -> bool:
    return isinstance(state, Mapping) and SUM in state and STEP in state


def read(states: Sequence[State], is_trusted: Sequence[bool]) -> tuple[list[float], list[float], dict[int, Tensor]]:
    """Sum and steps of each parameter; and, by position, the moments that have yet to be summed up for those whose
    entry is missing, zero, not finite, not of Adam's step, or not trusted."""
    sums, steps = ([0.0] * len(states) for _ in range(2))
    entries = [i for i, state in enumerate(states) if is_trusted[i] and has_entry(state)]
    for key, numbers in ((SUM, sums), (STEP, steps)):
        for i, number in zip(entries, _numbers([states[i][key] for i in entries]), strict=True):
            numbers[i] = number
    moments: dict[int, Tensor] = {}
    for i, state in enumerate(states):
        moment = second_moment(state)
        if moment is not None:
            adam_step = float(state["step"])
            if steps[i] != adam_step or not 0 < sums[i] < math.inf:
                sums[i], steps[i], moments[i] = 0.0, adam_step, moment
    return sums, steps, moments


def hold(states: Sequence[State]) -> None:
    """Make tensors of entries that are numbers, from a checkpoint: one number may be the entry of two states."""
    for state in states:
        if has_entry(state) and not isinstance(state[SUM], Tensor):
            state[SUM], state[STEP] = (torch.tensor(state[key], dtype=torch.float64) for key in (SUM, STEP))


def is_view(entry: Any) -> bool:
    """Whether an entry is of the vectors of a schedule, not from a checkpoint."""
    return isinstance(entry, Tensor) and entry._is_view()


def show(states: Sequence[State], views: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Put sum and steps into the states."""
    for state, (total, step) in zip(states, views, strict=True):
        if state.get(SUM) is not total and state is not NO_STATE:
            state[SUM], state[STEP] = total, step


def as_saved(state: Mapping[Any, Any], outdated: Collection[int]) -> dict[Any, Any]:
    """The state of a `state_dict` with numbers, and without the entries of the states whose `id` is in `outdated`."""
    saved = {key: dict(values) if has_entry(values) else values for key, values in state.items()}
    entries = [key for key, values in saved.items() if values is not state[key]]
    for name in (SUM, STEP):
        for key, number in zip(entries, _numbers([saved[key].pop(name) for key in entries]), strict=True):
            if id(state[key]) not in outdated:
                saved[key][name] = number
    return saved


class StateWatch:
    """Notices whether someone else than the optimizer's step has changed moments, step counts or sums since this was
    made of the states of all parameters."""

    def __init__(self, states: Sequence[State] = ()) -> None:
        self._look = _look_at(states)

    def sees_the_same(self, states: Sequence[State]) -> bool:
        return _same(_look_at(states), self._look)

    def outdated(self, states: Sequence[State]) -> list[bool]:
        """Of each state whether its moment or step count has changed, but not the sum beside it."""
        held, versions = self._look
        count = len(held) // 3
        positions = {id(total): i for i, total in enumerate(held[:count])}
        known = [positions.get(id(state[SUM])) if has_entry(state) else None for state in states]
        return [
            i is not None and not _same(_look_at([state]), (held[i::count], versions[i::count]))
            for i, state in zip(known, states, strict=True)
        ]


Look = tuple[list[Any], list[int]]


def _look_at(states: Sequence[State]) -> Look:
    """All sums, all moments and all step counts; and the versions of what may be written to in place."""
    held = [state.get(key) for key in (SUM, "exp_avg_sq", "step") for state in states]
    return held, [getattr(value, "_version", 0) for value in held[len(states) :]]


def _same(look: Look, other: Look) -> bool:
    return len(look[0]) == len(other[0]) and look[1] == other[1] and all(map(is_, look[0], other[0]))


def _numbers(values: Sequence[Tensor | float]) -> list[float]:
    """Each value (a number or a 0-d tensor) as a number; the host waits for an accelerator once."""
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    if not tensors:
        return list(map(float, values))
    known = iter(torch.stack([tensor.to(tensors[0].device, torch.float64) for tensor in tensors]).tolist())
    return [next(known) if isinstance(value, Tensor) else float(value) for value in values]
