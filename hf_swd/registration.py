"""`optim="adams"` for transformers' `TrainingArguments` and `Trainer`: what is put into transformers, and how.

Importing transformers' Trainer takes seconds, so `import hf_swd` does not do it: [`register`] patches what is imported
already, and the rest right after its import.

Threads may import transformers and hf_swd at the same time. A patch runs while its thread holds the lock of the
module that it patches, so it imports nothing of hf_swd: another thread may be importing just that, and wait for the
module.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, Trainer, TrainingArguments
    from transformers.trainer_callback import CallbackHandler


logger = logging.getLogger(__name__)

_NAME = "adams"
_OLDEST_TRANSFORMERS = (4, 46)


def register() -> None:
    """
    Make `TrainingArguments(optim="adams")` known to transformers, and have every Trainer whose optimizer has a
    schedule train with a [`SWDCallback`] and clip with the schedule's norm (see [`SWDTrainer`]).

    `import hf_swd` does it, unless the environment variable `HF_SWD_NO_REGISTER` is set. Calling it again changes
    nothing, except that it repeats what has failed before, or what an `importlib.reload` of transformers' modules has
    undone.
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
    Refuse what cannot be trained when arguments are made and when a Trainer is built, before any data is prepared.

    Args:
        args (`TrainingArguments`): looked at only with `optim="adams"`, or with AdamS as DeepSpeed's optimizer.

    Raises:
        RuntimeError: this version of transformers could not be patched.
        ValueError: see [`parse_optim_args`]; or DeepSpeed's configuration brings an optimizer of its own.
    """
    from .trainer.optim_args import parse_optim_args

    if args.optim == _NAME:
        _refuse_failures()
        parse_optim_args(args.optim_args)
    _refuse_configured_optimizer(args, is_ours=args.optim == _NAME)


def check_trainer(trainer: Trainer) -> None:
    """
    [`check_arguments`] for `Trainer(optimizer_cls_and_kwargs=(AdamS, {...}))`, of which its arguments do not tell.

    Raises:
        ValueError: DeepSpeed's configuration brings an optimizer of its own.
    """
    from .adams import AdamS

    cls, _ = getattr(trainer, "optimizer_cls_and_kwargs", None) or (None, {})
    _refuse_configured_optimizer(trainer.args, is_ours=isinstance(cls, type) and issubclass(cls, AdamS))


def _refuse_configured_optimizer(args: TrainingArguments, *, is_ours: bool) -> None:
    """DeepSpeed would train with the optimizer of its configuration, whichever the Trainer has."""
    plugin = getattr(args, "deepspeed_plugin", None)  # there at the end of __post_init__
    configured = None if plugin is None else plugin.hf_ds_config.config.get("optimizer")
    name = None if configured is None else configured.get("type")
    if configured is not None and (is_ours or str(name).lower() == _NAME):
        raise ValueError(
            f'the DeepSpeed configuration has an "optimizer" section ("type": "{name}"), which DeepSpeed would train '
            f'with, and it has no AdamS: delete "optimizer" from the configuration, and set optim="{_NAME}". '
            "What its params say goes into TrainingArguments (learning_rate, weight_decay, adam_beta1, adam_beta2, "
            "adam_epsilon)"
        )


def optimizer_name() -> Any:
    """The member `OptimizerNames.ADAMS`. Pickled `TrainingArguments` name this function: it cannot be renamed."""
    from transformers.training_args import OptimizerNames

    _refuse_failures()
    return OptimizerNames(_NAME)


# What is put into transformers


def _adams(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[type[Optimizer], dict[str, Any]]:
    """Optimizer class and keyword arguments."""
    from .adams import AdamS
    from .trainer.base_optimizer import scheduled_base
    from .trainer.optim_args import parse_optim_args

    options = parse_optim_args(args.optim_args)
    if "base" in options:
        return scheduled_base(args, model, options)
    return AdamS, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        # The Trainer's parameter groups bring their own; AdamS's default must not reach groups that do not.
        "weight_decay": args.weight_decay,
        **options,
    }


# Patches: each reads the private names that it needs before it changes anything (but for the check of arguments, which
# says what has failed), and changes nothing the second time.

_lock = threading.Lock()  # nothing is imported, nor called that might import, by who holds it


def _wrap(owner: type, name: str, build: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `build(method)` in the place of a method or static method."""
    static = isinstance(vars(owner).get(name), staticmethod)
    with _lock:
        method = _private(owner, name)
        if not getattr(method, "_wrapped_by_hf_swd", False):
            wrapper = functools.wraps(method)(build(method))
            wrapper.__dict__["_wrapped_by_hf_swd"] = True
            setattr(owner, name, staticmethod(wrapper) if static else wrapper)


def _checked(post_init: Callable[..., None]) -> Callable[..., None]:
    def check(self: TrainingArguments) -> None:
        check_arguments(self)
        post_init(self)
        check_arguments(self)  # now with DeepSpeed's configuration

    return check


def _checking_arguments(on_init_end: Callable[..., Any]) -> Callable[..., Any]:
    def check_first(self: CallbackHandler, args: TrainingArguments, *rest: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            check_arguments(args)
        return on_init_end(self, args, *rest, **kwargs)

    return check_first


def _with_our_callback(on_train_begin: Callable[..., Any]) -> Callable[..., Any]:
    def join_first(self: CallbackHandler, args: Any, state: Any, *rest: Any, **kwargs: Any) -> Any:
        from .trainer.callback import join

        join(self, state)
        return on_train_begin(self, args, state, *rest, **kwargs)

    return join_first


def _knowing_adams(get_optimizer_cls_and_kwargs: Callable[..., Any]) -> Callable[..., Any]:
    def get(args: TrainingArguments, *rest: Any, **kwargs: Any) -> Any:
        build = _adams if args.optim == _NAME else get_optimizer_cls_and_kwargs
        return build(args, *rest, **kwargs)

    return get


def _sharing_the_norm(inner_training_loop: Callable[..., Any]) -> Callable[..., Any]:
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .trainer.shared_norm import shared_norm

        check_trainer(self)
        with shared_norm(self):
            return inner_training_loop(self, *args, **kwargs)

    return train


def _patch_training_args(training_args: ModuleType) -> None:
    _wrap(_private(training_args, "TrainingArguments"), "__post_init__", _checked)
    version = _version()
    if tuple(map(int, version.split(".")[:2])) < _OLDEST_TRANSFORMERS:
        raise RuntimeError("this version is too old")
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


def _patch_trainer_optimizer(trainer_optimizer: ModuleType) -> None:
    """The table of handlers, since transformers 5.2."""
    from transformers.training_args import OptimizerNames

    handlers = _private(trainer_optimizer, "_OPTIMIZER_HANDLERS")
    handlers.setdefault(OptimizerNames(_NAME), _handler)


def _handler(context: Any) -> tuple[type[Optimizer], dict[str, Any]]:
    return _adams(context.args, context.model)


def _patch_trainer(trainer: ModuleType) -> None:
    trainer_class = _private(trainer, "Trainer")
    if "transformers.trainer_optimizer" not in sys.modules:
        _wrap(trainer_class, "get_optimizer_cls_and_kwargs", _knowing_adams)
    if hasattr(trainer_class, "_inner_training_loop"):  # otherwise gradients are read twice, and nothing else changes
        _wrap(trainer_class, "_inner_training_loop", _sharing_the_norm)
    # The optimizer is there, and has its checkpoint, when a training begins.
    handler = _private(trainer, "CallbackHandler")
    _wrap(handler, "on_init_end", _checking_arguments)
    _wrap(handler, "on_train_begin", _with_our_callback)


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.training_args": _patch_training_args,
    "transformers.trainer_optimizer": _patch_trainer_optimizer,
    "transformers.trainer": _patch_trainer,
}
_LAST = "transformers.trainer"
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
                f"supports transformers {'.'.join(map(str, _OLDEST_TRANSFORMERS))} and later; other versions can use "
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
        """Be in `sys.meta_path` exactly as long as the module that imports the others is still to come."""
        wanted = executed != _LAST and not _is_loaded(_LAST)
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
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec and finder is not self else None
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
