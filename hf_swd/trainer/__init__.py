"""Scheduled weight decay in a Trainer: `SWDTrainer`, `SWDCallback`, and what `optim_args` may say.

Both classes are imported when they are first asked for: transformers' Trainer takes seconds, and only `SWDTrainer`
needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .callback import SWDCallback
    from .trainer import SWDTrainer

__all__ = ["SWDCallback", "SWDTrainer"]


def __getattr__(name: str) -> Any:
    if name == "SWDCallback":
        from .callback import SWDCallback

        return SWDCallback
    if name == "SWDTrainer":
        from .trainer import SWDTrainer

        return SWDTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
