"""`optim="adams"` for transformers' `TrainingArguments` and `Trainer`; the only module with private names of transformers.

Importing transformers' Trainer takes seconds, so `import hf_swd` does not do it: [`register`] patches what is imported already, and
the rest right after its import.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .adams import AdamS


if TYPE_CHECKING:
    from transformers import TrainingArguments


__all__ = ["check_arguments", "optimizer_name", "parse_optim_args", "register"]

logger = logging.getLogger(__name__)

_NAME = "adams"
_OLDEST_TRANSFORMERS = "5.5"


def register() -> None:
    """
    Make `TrainingArguments(optim="adams")` known to transformers, and [`SWDCallback`] one of the Trainer's default callbacks.

    `import hf_swd` does it. Calling it again changes nothing, except that it repeats what an `importlib.reload` of transformers' modules
    has undone.
    """
    for name in _PATCHES:
        if sys.modules.get(name) is not None:
            module = importlib.import_module(name)  # waits if another thread is in the middle of it
            if not getattr(module.__spec__, "_initializing", False):
                _patch(module)
    _finder.install_if_needed()


# optim_args


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
        optim_args (`str`, *optional*): such as `"reference_steps=100,fused=true"`; spaces are ignored, as transformers does.

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
            raise ValueError(
                f'optim_args="{optim_args}": unknown key "{key}"; optim="{_NAME}" knows {", ".join(_OPTIM_ARGS)}'
            )
        parse, expected = _OPTIM_ARGS[key]
        try:
            result[key] = parse(text)
        except ValueError:
            raise ValueError(f'optim_args="{optim_args}": {key}="{text}"; expected {expected}') from None
    return result


def check_arguments(args: TrainingArguments) -> None:
    """
    Refuse what cannot be trained when a Trainer is built, not after its data has been prepared.

    Args:
        args (`TrainingArguments`): looked at only with `optim="adams"`.

    Raises:
        RuntimeError: this version of transformers could not be patched.
        ValueError: see [`parse_optim_args`].
    """
    if args.optim == _NAME:
        if _failure is not None:
            raise RuntimeError(_failure)
        parse_optim_args(args.optim_args)


# Patches: each reads the private names that it needs before it changes anything, and changes nothing the second time.


def _add_optimizer_name(training_args: ModuleType) -> None:
    names = _private(training_args, "OptimizerNames")
    by_name, by_value, in_order = (
        _private(names, name) for name in ("_member_map_", "_value2member_map_", "_member_names_")
    )
    if _NAME in by_value:
        return
    member = str.__new__(names, _NAME)
    member._name_, member._value_ = _NAME.upper(), _NAME
    member.__objclass__ = names
    member._sort_order_ = len(in_order)
    # So that a process which reads a pickled training_args.bin imports hf_swd, or says that it is missing.
    member.__reduce_ex__ = lambda protocol: (optimizer_name, ())
    setattr(names, member._name_, member)
    by_name[member._name_] = by_value[_NAME] = member
    in_order.append(member._name_)


def _add_handler(trainer_optimizer: ModuleType) -> None:
    _private(trainer_optimizer, "_OPTIMIZER_HANDLERS").setdefault(optimizer_name(), _adams)


def _add_callback(trainer: ModuleType) -> None:
    if "transformers.trainer_optimizer" not in sys.modules:
        raise AttributeError("it does not import transformers.trainer_optimizer")
    if not hasattr(trainer, "DEFAULT_CALLBACKS"):
        if _failure is None:
            logger.warning(
                f'transformers {_version()} has no transformers.trainer.DEFAULT_CALLBACKS: the Trainer trains with optim="{_NAME}", but '
                "reports the effective weight decay only with Trainer(callbacks=[hf_swd.SWDCallback])."
            )
        return
    # Without SWDCallback, hf_swd.trainer is in the middle of importing transformers.trainer; it ends with register().
    callback = getattr(importlib.import_module("hf_swd.trainer"), "SWDCallback", None)
    if callback is not None and callback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(callback)


def optimizer_name() -> Any:
    """The member `OptimizerNames.ADAMS`. Pickled `TrainingArguments` name this function: it cannot be renamed."""
    from transformers.training_args import OptimizerNames

    if _failure is not None:
        raise RuntimeError(_failure)
    return OptimizerNames(_NAME)


def _adams(context: Any) -> tuple[type[AdamS], dict[str, Any]]:
    """The handler: optimizer class and keyword arguments from an `OptimizerContext`."""
    args = context.args
    # The Trainer's parameter groups bring their own weight_decay; AdamS's default must not reach groups that do not.
    kwargs = {"weight_decay": args.weight_decay, **parse_optim_args(args.optim_args)}
    return AdamS, {**context.optimizer_kwargs, **context.adam_kwargs, **kwargs}


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.training_args": _add_optimizer_name,
    "transformers.trainer_optimizer": _add_handler,
    "transformers.trainer": _add_callback,
}
# Why optim="adams" cannot work with this transformers; None where it can.
_failure: str | None = None


def _patch(module: ModuleType) -> None:
    global _failure
    try:
        _PATCHES[module.__name__](module)
    except Exception as error:  # whatever it is, transformers itself must remain usable
        if _failure is None:
            _failure = (
                f'optim="{_NAME}" does not work with transformers {_version()}: cannot patch {module.__name__} ({error}). hf_swd '
                f"supports transformers {_OLDEST_TRANSFORMERS} and later; other versions can use "
                "Trainer(optimizers=(hf_swd.create_adams(model, ...), None), callbacks=[hf_swd.SWDCallback])."
            )
            logger.warning(_failure)


def _private(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:  # whose own message speaks of a circular import, as the module is still being imported
        raise AttributeError(f"{owner.__name__} has no {name}") from None


def _version() -> str:
    return getattr(sys.modules.get("transformers"), "__version__", "of unknown version")


class _PatchAfterImport:
    """
    Meta path finder that has the real finders find the three modules, and patches them when their real loader has executed them.

    Only the loader's instance attribute `exec_module` is set, and removed before the module runs: `__spec__` and `__loader__` are the
    real ones.
    """

    def install_if_needed(self) -> None:
        wanted = not all(name in sys.modules for name in _PATCHES)
        if wanted != (self in sys.meta_path):
            # A new list: other threads may be iterating over the old one.
            sys.meta_path = [*([self] if wanted else []), *(finder for finder in sys.meta_path if finder is not self)]

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in _PATCHES:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec and finder is not self else None
            if spec is not None:
                self._watch(fullname, spec.loader)
                return spec
        return None

    def _watch(self, fullname: str, loader: Any) -> None:
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def execute_and_patch(module: ModuleType) -> None:
            loader.__dict__.pop("exec_module", None)
            execute(module)
            if module.__name__ == fullname:
                _patch(module)
                self.install_if_needed()

        with contextlib.suppress(AttributeError):  # a loader without instance attributes: a later register() patches
            loader.exec_module = execute_and_patch


_finder = _PatchAfterImport()
