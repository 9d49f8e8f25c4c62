"""`optim="adams"` for transformers' `TrainingArguments` and `Trainer`; all private names of transformers are here.

Importing transformers' Trainer takes seconds, so `import hf_swd` does not do it: [`register`] patches what is imported
already, and the rest right after its import.

Threads may import transformers and hf_swd at the same time. A patch runs while its thread holds the lock of the
module that it patches, so it imports nothing of hf_swd: another thread may be importing just that, and wait for the
module.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .adams import AdamS


if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .trainer.callback import SWDCallback


logger = logging.getLogger(__name__)

_NAME = "adams"
_OLDEST_TRANSFORMERS = "5.5"


def register() -> None:
    """
    Make `TrainingArguments(optim="adams")` known to transformers, and [`SWDCallback`] one of the Trainer's default
    callbacks.

    `import hf_swd` does it. Calling it again changes nothing, except that it repeats what has failed before, or what
    an `importlib.reload` of transformers' modules has undone.
    """
    _finder.install_if_needed()  # before the look at what is there: nothing can be imported unseen in between
    for name in _PATCHES:
        if name in sys.modules and not _is_loaded(name):
            # Waits for the thread that is in the middle of it. Should that one fail, the next import of it is seen.
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    _patch_loaded()
    _finder.install_if_needed()


def check_arguments(args: TrainingArguments) -> None:
    """
    Refuse what cannot be trained when a Trainer is built, not after its data has been prepared.

    Args:
        args (`TrainingArguments`): looked at only with `optim="adams"`.

    Raises:
        RuntimeError: this version of transformers could not be patched.
        ValueError: see [`parse_optim_args`].
    """
    from .trainer.optim_args import parse_optim_args

    if args.optim == _NAME:
        _refuse_failures()
        parse_optim_args(args.optim_args)


def optimizer_name() -> Any:
    """The member `OptimizerNames.ADAMS`. Pickled `TrainingArguments` name this function: it cannot be renamed."""
    from transformers.training_args import OptimizerNames

    _refuse_failures()
    return OptimizerNames(_NAME)


# What is put into transformers


def _adams(context: Any) -> tuple[type[AdamS], dict[str, Any]]:
    """The handler: optimizer class and keyword arguments from an `OptimizerContext`."""
    from .trainer.optim_args import parse_optim_args

    args = context.args
    # The Trainer's parameter groups bring their own weight_decay; AdamS's default must not reach groups that do not.
    kwargs = {"weight_decay": args.weight_decay, **parse_optim_args(args.optim_args)}
    return AdamS, {**context.optimizer_kwargs, **context.adam_kwargs, **kwargs}


class _DefaultCallback:
    """The Trainer calls it, as it calls all classes in `DEFAULT_CALLBACKS`, and gets a [`SWDCallback`]."""

    def __new__(cls) -> SWDCallback:
        from .trainer.callback import SWDCallback

        callback = SWDCallback()
        callback._check_arguments = check_arguments
        return callback


# Patches: each reads the private names that it needs before it changes anything, and changes nothing the second time.

_lock = threading.Lock()  # nothing is imported, nor called that might import, by who holds it


def _add_optimizer_name(training_args: ModuleType) -> None:
    names = _private(training_args, "OptimizerNames")
    by_name, by_value, in_order = (
        _private(names, name) for name in ("_member_map_", "_value2member_map_", "_member_names_")
    )
    with _lock:
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
    from transformers.training_args import OptimizerNames

    _private(trainer_optimizer, "_OPTIMIZER_HANDLERS").setdefault(OptimizerNames(_NAME), _adams)


def _add_callback(trainer: ModuleType) -> None:
    if "transformers.trainer_optimizer" not in sys.modules:
        raise AttributeError("it does not import transformers.trainer_optimizer")
    callbacks = getattr(trainer, "DEFAULT_CALLBACKS", None)
    if callbacks is None:
        _warn(
            f"transformers {_version()} has no transformers.trainer.DEFAULT_CALLBACKS: the Trainer trains with "
            f'optim="{_NAME}", but reports the effective weight decay only with '
            "Trainer(callbacks=[hf_swd.SWDCallback])."
        )
        return
    with _lock:
        if _DefaultCallback not in callbacks:
            callbacks.append(_DefaultCallback)


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.training_args": _add_optimizer_name,
    "transformers.trainer_optimizer": _add_handler,
    "transformers.trainer": _add_callback,
}
# By module: why optim="adams" does not work. Tried again before anybody is refused for it.
_failures: dict[str, str] = {}
_warned: set[str] = set()


def _patch_loaded(executed: ModuleType | None = None) -> None:
    """Patch the modules that are imported, and the one whose code has just run to its end."""
    for name, patch in _PATCHES.items():
        module = sys.modules.get(name)
        if module is None or not (module is executed or _is_loaded(name)):
            continue
        try:
            patch(module)
        except Exception as error:  # whatever it is, transformers itself must remain usable
            _failures[name] = (
                f'optim="{_NAME}" does not work with transformers {_version()}: cannot patch {name} ({error}). hf_swd '
                f"supports transformers {_OLDEST_TRANSFORMERS} and later; other versions can use "
                "Trainer(optimizers=(hf_swd.create_adams(model, ...), None), callbacks=[hf_swd.SWDCallback])."
            )
            _warn(_failures[name])
        else:
            _failures.pop(name, None)


def _refuse_failures() -> None:
    if _failures:
        register()
    for message in _failures.values():
        raise RuntimeError(message)


def _warn(message: str) -> None:
    """The first of several consequences is the cause."""
    if not _warned:
        _warned.add(message)
        logger.warning(message)


def _is_loaded(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


def _private(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:  # whose own message speaks of a circular import, as the module is still being imported
        raise AttributeError(f"{owner.__name__} has no {name}") from None


def _version() -> str:
    return getattr(sys.modules.get("transformers"), "__version__", "of unknown version")


class _PatchAfterImport:
    """
    Meta path finder that has the real finders find the three modules, and patches them when their loader has run them.

    Only the loader's instance attribute `exec_module` is set, and removed before the module runs: `__spec__` and
    `__loader__` are the real ones.
    """

    def install_if_needed(self, executed: str | None = None) -> None:
        """Be in `sys.meta_path` exactly as long as one of the modules is still to come."""
        wanted = not all(name == executed or _is_loaded(name) for name in _PATCHES)
        with _lock:
            if wanted != any(finder is self for finder in sys.meta_path):
                # A new list: other threads may be iterating over the old one.
                others = [finder for finder in sys.meta_path if finder is not self]
                sys.meta_path = [self, *others] if wanted else others

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
                _patch_loaded(executed=module)
                self.install_if_needed(executed=fullname)

        with contextlib.suppress(AttributeError):  # a loader without instance attributes: a later register() patches
            loader.exec_module = execute_and_patch


_finder = _PatchAfterImport()
