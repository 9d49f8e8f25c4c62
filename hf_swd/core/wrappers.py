"""Wrappers of optimizers: accelerate's and DeepSpeed's keep the optimizer that they wrap in `.optimizer`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def unwrapped(optimizer: Any) -> Iterator[Any]:
    """`optimizer`, what it wraps, and so on inwards: each object once, since some optimizers call themselves
    `self.optimizer`."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield optimizer
        optimizer = getattr(optimizer, "__dict__", {}).get("optimizer")
