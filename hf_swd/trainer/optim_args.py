"""`TrainingArguments.optim_args` of `optim="adams"`: one string, read into typed keyword arguments of [`AdamS`]."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any


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


# `differentiable` and `process_group` are missing because no Trainer can use them.
_OPTIM_ARGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "reference_steps": (_count, "a number of optimizer steps, 0 or more"),
    "unclipped_norm": (_boolean, "true or false"),
    "amsgrad": (_boolean, "true or false"),
    "maximize": (_boolean, "true or false"),
    "capturable": (_boolean, "true or false"),
    "foreach": (_optional_boolean, "true, false or none"),
    "fused": (_optional_boolean, "true, false or none"),
}


def parse_optim_args(optim_args: str | None) -> dict[str, Any]:
    """
    Keyword arguments of [`AdamS`] from `TrainingArguments.optim_args`.

    Args:
        optim_args (`str`, *optional*): such as `"reference_steps=100,fused=true"`; spaces are ignored, as by
            transformers.

    Returns:
        `dict[str, Any]`: typed values of the keys that are given.

    Raises:
        ValueError: a part is not `key=value`, a key is unknown, or a value is not of its type.
    """
    result = {}
    for item in optim_args.replace(" ", "").split(",") if optim_args else []:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(
                f'optim_args="{optim_args}": expected key=value,key=value,...; found "{item}" without "="'
            )
        if key not in _OPTIM_ARGS:
            close = difflib.get_close_matches(key, _OPTIM_ARGS, n=1)
            guess = f'did you mean "{close[0]}"? ' if close else ""
            raise ValueError(
                f'optim_args="{optim_args}": unknown key "{key}"; {guess}optim="adams" knows {", ".join(_OPTIM_ARGS)}'
            )
        parse, expected = _OPTIM_ARGS[key]
        try:
            result[key] = parse(text)
        except ValueError:
            raise ValueError(f'optim_args="{optim_args}": {key}="{text}"; expected {expected}') from None
    return result
