"""`TrainingArguments.optim_args` of `optim="adams"`: one string, read into typed keyword arguments."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import Any

from .base_optimizer import keys_of_base


def _boolean(text: str) -> bool:
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
    if value is None:
        raise ValueError
    return value


def _optional_boolean(text: str) -> bool | None:
    return None if text.lower() == "none" else _boolean(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError
    return int(text)


def _decay_rate(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError
    return value


_Keys = dict[str, tuple[Callable[[str], Any], str]]

_SCHEDULE: _Keys = {
    "reference_steps": (_count, "a number of optimizer steps, 0 or more"),
    "unclipped_norm": (_boolean, "true or false"),
}
# `differentiable` and `process_group` are missing because no Trainer can use them.
_ADAMS: _Keys = {
    **_SCHEDULE,
    "amsgrad": (_boolean, "true or false"),
    "maximize": (_boolean, "true or false"),
    "capturable": (_boolean, "true or false"),
    "foreach": (_optional_boolean, "true, false or none"),
    "fused": (_optional_boolean, "true, false or none"),
}
_ON_A_BASE: _Keys = {
    "base": (str, "the name of another optimizer of the Trainer"),
    **_SCHEDULE,
    # Not `beta2`, which AdEMAMix reads from optim_args, too.
    "schedule_beta2": (_decay_rate, "a decay rate in [0, 1)"),
}


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
    pairs = {}
    for item in optim_args.replace(" ", "").split(",") if optim_args else []:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(
                f'optim_args="{optim_args}": expected key=value,key=value,...; found "{item}" without "="'
            )
        pairs[key] = text
    known = _ADAMS
    others: Collection[str] | None = ()
    if "base" in pairs:
        known, others = _ON_A_BASE, keys_of_base(pairs["base"])

    result = {}
    of_base = []
    for key, text in pairs.items():
        if key in known:
            parse, expected = known[key]
            try:
                result[key] = parse(text)
            except ValueError:
                raise ValueError(f'optim_args="{optim_args}": {key}="{text}"; expected {expected}') from None
        elif others is None or key in others:
            of_base.append(f"{key}={text}")
        else:
            names = [*known, *others] if "base" in pairs else [*known, "base"]
            close = difflib.get_close_matches(key, names, n=1)
            guess = f'did you mean "{close[0]}"? ' if close else ""
            with_base = f' with base="{pairs["base"]}"' if "base" in pairs else ""
            raise ValueError(
                f'optim_args="{optim_args}": unknown key "{key}"; {guess}optim="adams"{with_base} knows '
                f"{', '.join(names)}"
            )
    if of_base:
        result["optim_args"] = ",".join(of_base)
    return result
