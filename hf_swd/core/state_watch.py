"""Notices when someone else than the optimizer's step has changed what its state holds."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from .entries import SUM


__all__ = ["StateWatch"]

State = Mapping[str, Any]


class StateWatch:
    """
    The second moments of parameters, their step counts and the sums beside them, as they are now. Holds the tensors weakly.

    Args:
        params (`Sequence[Tensor]`): the parameters.
        states (`Sequence[Mapping]`): the optimizer's state of each, possibly empty.
    """

    def __init__(self, params: Sequence[Tensor] = (), states: Sequence[State] = ()) -> None:
        self._params = params
        self._sums = [state.get(SUM) for state in states]
        tensors = _tensors(states)
        self._references = [None if tensor is None else weakref.ref(tensor) for tensor in tensors]
        self._versions = _versions(tensors)

    def sees_the_same(self, params: Sequence[Tensor], states: Sequence[State]) -> bool:
        """Whether these are the same parameters, and nothing has been replaced or changed in place."""
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return False
        tensors = _tensors(states)
        return (
            all(map(is_, self._sums, [state.get(SUM) for state in states]))
            and all(map(is_, tensors, map(_referent, self._references)))
            and _versions(tensors) == self._versions
        )

    def outdated(self, params: Sequence[Tensor], states: Sequence[State]) -> set[Tensor]:
        """The parameters whose moment or step count has changed since, but not the sum beside it."""
        positions = {p: i for i, p in enumerate(self._params)}
        count, changed = len(self._params), set()
        for p, state in zip(params, states, strict=True):
            i = positions.get(p)
            if i is None or state.get(SUM) is None or state[SUM] is not self._sums[i]:
                continue
            tensors = _tensors([state])
            before = [_referent(self._references[j]) for j in (i, count + i)]
            versions = [self._versions[j] for j in (i, count + i)]
            if not all(map(is_, tensors, before)) or _versions(tensors) != versions:
                changed.add(p)
        return changed


def _tensors(states: Sequence[State]) -> list[Tensor | None]:
    """The moments of all, then the step counts of all."""
    values = [state.get(key) for key in ("exp_avg_sq", "step") for state in states]
    return [value if isinstance(value, Tensor) else None for value in values]


def _versions(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor._version for tensor in tensors]


def _referent(reference: weakref.ref | None) -> Tensor | None:
    return None if reference is None else reference()
