"""`TrainingArguments.optim_args` of `optim="adams"`: one string, read into typed keyword arguments."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from ..core.validation import option_from_text
from .base_optimizer import keys_of_base


_SCHEDULE = ("reference_steps", "unclipped_norm")
# `differentiable` and `process_group` are missing because no Trainer can use them; it clips by itself.
_ADAMS = (*_SCHEDULE, "amsgrad", "maximize", "capturable", "foreach", "fused")
# Not `beta2`, which AdEMAMix reads from optim_args, too.
_ON_A_BASE = (*_SCHEDULE, "schedule_beta2")


def parse_optim_args(optim_args: str | None) -> dict[str, Any]:
    """
    Keyword arguments of [`AdamS`], or of the schedule on another optimizer, from `TrainingArguments.optim_args`.

    Args:
        optim_args (`str`, *optional*): such as `"reference_steps=100,fused=true"`, or
            `"base=adamw_torch_8bit,reference_steps=100"`; spaces are ignored, as by transformers.

    Returns:
        `dict[str, Any]`: typed values of the keys that are given. With `base`, the keys that are the base optimizer's
        own stand, as they are given, in one string `optim_args`.

    Raises:
        ValueError: a part is not `key=value`, a key is unknown, or a value is not of its type.
    """
    given = f'optim_args="{optim_args}"'
    pairs = {}
    for item in optim_args.replace(" ", "").split(",") if optim_args else []:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f'{given}: expected key=value,key=value,...; found "{item}" without "="')
        pairs[key] = text
    base = pairs.pop("base", None)
    known: Collection[str] = _ADAMS
    of_base: Collection[str] | None = ()
    if base is not None:
        known, of_base = _ON_A_BASE, keys_of_base(base)

    result: dict[str, Any] = {} if base is None else {"base": base}
    others = []
    for key, text in pairs.items():
        if key in known:
            try:
                result[key] = option_from_text(key, text)
            except ValueError as error:
                raise ValueError(f"{given}: {error}") from None
        elif of_base is None or key in of_base:
            others.append(f"{key}={text}")
        else:
            names = ["base", *known, *of_base]
            close = difflib.get_close_matches(key, names, n=1)
            guess = f'did you mean "{close[0]}"? ' if close else ""
            optimizer = 'optim="adams"' if base is None else f'optim="adams" with base="{base}"'
            raise ValueError(f'{given}: unknown key "{key}"; {guess}{optimizer} knows {", ".join(names)}')
    if others:
        result["optim_args"] = ",".join(others)
    return result
