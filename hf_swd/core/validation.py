"""The options of the optimizers: what each may be. Errors name the argument, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import Tensor


class Option(NamedTuple):
    """What an option may be."""

    kind: type
    """`float` (any real number, a 1-element tensor), `int` or `bool`."""
    expected: str
    holds: Callable[[Any], bool] = lambda value: True
    may_be_none: bool = False


def _is_finite(value: Any) -> bool:
    return bool(0 <= value < math.inf)


_DECAY_RATE = Option(float, "a decay rate in [0, 1)", lambda value: bool(0 <= value < 1))
_FLAG = Option(bool, "True or False")
_FLAG_OR_NONE = Option(bool, "True, False or None", may_be_none=True)

OPTIONS = {
    "lr": Option(float, "a learning rate of at least 0", _is_finite),
    "eps": Option(float, "a small constant of at least 0", _is_finite),
    "weight_decay": Option(float, "a decay strength of at least 0", _is_finite),
    **dict.fromkeys(("beta2", "schedule_beta2"), _DECAY_RATE),
    "reference_steps": Option(
        int, "a number of optimizer steps, 0 (the paper's schedule) or more", lambda value: value >= 0
    ),
    "unclipped_norm": _FLAG,
    "max_grad_norm": Option(
        float, "a norm of at least 0 (0 clips nothing, inf only measures)", lambda value: value >= 0
    ),
    "max_norm": Option(float, "a positive norm (for no clipping, leave this call out)", lambda value: value > 0),
    **dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable"), _FLAG),
    **dict.fromkeys(("foreach", "fused"), _FLAG_OR_NONE),
}


def check_options(options: Mapping[str, Any]) -> None:
    """
    Check those of `options` (arguments, or a parameter group) that are known here.

    Raises:
        TypeError, ValueError: one has a wrong type, or is out of range.
    """
    for name, value in options.items():
        if name in OPTIONS:
            _check(name, value, OPTIONS[name])
    if "betas" in options:
        betas = options["betas"]
        if not isinstance(betas, Iterable) or isinstance(betas, (str, Tensor)) or len(list(betas)) != 2:
            raise TypeError(f"betas={betas!r}: expected two numbers in [0, 1), such as (0.9, 0.999)")
        for i, beta in enumerate(betas):
            _check(f"betas[{i}]", beta, _DECAY_RATE)
        if len({isinstance(beta, Tensor) for beta in betas}) == 2:
            raise ValueError(f"betas={betas!r}: betas must be either both numbers or both tensors")
    if options.get("differentiable"):
        raise ValueError(
            "differentiable=True: the schedule lets no gradients flow through step(); use torch.optim.AdamW for that"
        )
    # torch may be built without the class of process groups.
    process_group = options.get("process_group")
    if process_group is not None and not hasattr(process_group, "allreduce"):
        raise TypeError(
            f"process_group={process_group!r}: expected a torch.distributed.ProcessGroup (torch.distributed.new_group "
            "makes one) or None"
        )


_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "none": None}


def option_from_text(name: str, text: str) -> Any:
    """
    The value of an option that is given as text, such as `"true"`, `"none"` or `"100"`.

    Raises:
        ValueError: the option cannot be that.
    """
    option = OPTIONS[name]
    try:
        value = _WORDS[text.lower()] if option.kind is bool else option.kind(text)
        _check(name, value, option)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f'{name}="{text}"; expected {option.expected.lower()}') from None
    return value


def _check(name: str, value: Any, option: Option) -> None:
    if value is None and option.may_be_none:
        return
    if option.kind is bool:
        if not any(value is one for one in (True, False)):
            raise TypeError(f"{name}={value!r}: expected {option.expected}")
        return
    number = Integral if option.kind is int else (Real, Tensor)
    if isinstance(value, bool) or not isinstance(value, number):
        what = "an int" if option.kind is int else "a number"
        raise TypeError(f"{name}={value!r}: expected {option.expected}, {what}, not {type(value).__name__}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name}: expected {option.expected}; a tensor must have 1 element, not shape {tuple(value.shape)}"
        )
    if not option.holds(value):
        raise ValueError(f"{name}={value.item() if isinstance(value, Tensor) else value}: expected {option.expected}")
