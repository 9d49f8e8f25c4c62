"""What users are told of `reference_steps`: by the warnings of a training, and by `hf-swd advise`. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


USUAL_FOR_ADAMW = 0.01
"""A `weight_decay` from here on is hardly meant in units of the gradient rms."""
MANY_TIMES = 100
"""An effective decay of so many times `weight_decay` is hardly meant."""
_USUAL_WARM_UP = 100


def proposed_options(num_steps: int) -> dict[str, Any]:
    """Options with which `weight_decay` has its meaning in AdamW: `reference_steps` as long as a usual warm-up, or a
    third of a training of `num_steps` if that is less."""
    return {"reference_steps": max(1, min(_USUAL_WARM_UP, num_steps // 3))}


def with_options(optim_args: str, options: Mapping[str, Any]) -> str:
    """`optim_args` with these options, and with all else that it holds: pasted without, the decay would be another."""
    given = optim_args.replace(" ", "").split(",") if optim_args else []
    kept = (item for item in given if item.partition("=")[0] not in options)
    return ",".join([*kept, *(f"{name}={str(value).lower()}" for name, value in options.items())])
