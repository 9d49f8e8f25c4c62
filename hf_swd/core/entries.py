"""The schedule's numbers where a torch optimizer keeps its state: they change with the schedule, and copy as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


__all__ = ["STEP", "SUM", "Entry", "as_numbers"]

SUM = "second_moment_sum"
"""Key of the sum of Adam's second moment over a whole parameter."""
STEP = "second_moment_step"
"""Key of the number of steps that the sum is of."""


class Entry:
    """
    One element of a tensor of the schedule, as it is whenever it is looked at: `float(entry)`.

    Copying or pickling it gives the number (a `float`), and so whatever carries an optimizer's state carries the numbers of one moment. It
    is no tensor since torch casts tensors in a state to the dtype of the parameter.

    Args:
        owner: an object that may replace the tensor from step to step.
        name (`str`): the owner's attribute, a tensor.
        index (`int`, *optional*): which element; for a 0-d tensor left out.
    """

    __slots__ = ("index", "name", "owner")

    def __init__(self, owner: Any, name: str, index: int | None = None) -> None:
        self.owner, self.name, self.index = owner, name, index

    def __float__(self) -> float:
        tensor = getattr(self.owner, self.name).detach()
        return float(tensor if self.index is None else tensor[self.index])

    def __eq__(self, other: object) -> bool:
        return float(self) == (float(other) if isinstance(other, Entry) else other)

    __hash__ = None

    def __reduce__(self) -> tuple:
        return float, (float(self),)

    def __repr__(self) -> str:
        return repr(float(self))


def as_numbers(values: Sequence[Any]) -> list[float]:
    """Each value as a number; entries of one vector make the host wait for an accelerator once, not once each."""
    vectors: dict[tuple[int, str], list[float]] = {}
    numbers = []
    for value in values:
        if isinstance(value, Entry) and value.index is not None:
            key = (id(value.owner), value.name)
            if key not in vectors:
                vectors[key] = getattr(value.owner, value.name).detach().tolist()
            numbers.append(vectors[key][value.index])
        else:
            numbers.append(float(value))
    return numbers
