"""Checks of arguments; each error names the argument, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def check_options(options: dict[str, Any]) -> None:
    """Type and range of the hyperparameters of AdamS among `options` (constructor arguments or a parameter group)."""
    for name, what in (("lr", "a learning rate"), ("eps", "a small constant"), ("weight_decay", "a decay strength")):
        if name in options:
            check_number(name, options[name], f"{what} of at least 0", lambda value: 0 <= value < math.inf)
    if "betas" in options:
        betas = options["betas"]
        if not isinstance(betas, Iterable) or isinstance(betas, (str, Tensor)) or len(list(betas)) != 2:
            raise TypeError(f"betas={betas!r}: expected two numbers in [0, 1), such as (0.9, 0.999)")
        for i, beta in enumerate(betas):
            check_number(f"betas[{i}]", beta, "a decay rate in [0, 1)", lambda value: 0 <= value < 1)
        if len({isinstance(beta, Tensor) for beta in betas}) == 2:
            raise ValueError(f"betas={betas!r}: betas must be either both numbers or both tensors")
    for name in ("amsgrad", "maximize", "capturable", "differentiable", "foreach", "fused"):
        if name in options:
            check_flag(name, options[name], optional=name in ("foreach", "fused"))


def check_flag(name: str, value: Any, *, optional: bool = False) -> None:
    allowed = (True, False, None) if optional else (True, False)
    if not any(value is one for one in allowed):
        raise TypeError(f"{name}={value!r}: expected one of {', '.join(map(str, allowed))}")


def check_number(name: str, value: Any, expected: str, in_range: Callable[[Any], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name}={value!r}: expected {expected}, a number, not {type(value).__name__}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name}: expected {expected}; a tensor must have 1 element, not shape {tuple(value.shape)}")
    if not in_range(value):
        raise ValueError(f"{name}={value.item() if isinstance(value, Tensor) else value}: expected {expected}")


def check_reference_steps(reference_steps: int) -> None:
    if isinstance(reference_steps, bool) or not isinstance(reference_steps, int):
        raise TypeError(f"reference_steps={reference_steps!r}: expected an int, a number of optimizer steps (0: off)")
    if reference_steps < 0:
        raise ValueError(f"reference_steps={reference_steps}: expected 0 (the paper's schedule) or a number of steps")


def check_process_group(process_group: Any) -> None:
    # Every process group is an instance of this class, but torch may be built without it.
    if process_group is not None and not hasattr(process_group, "allreduce"):
        raise TypeError(
            f"process_group={process_group!r}: expected a torch.distributed.ProcessGroup (torch.distributed.new_group "
            "makes one) or None"
        )
