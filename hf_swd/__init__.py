"""Scheduled Weight Decay (SWD) and its Adam, AdamS, for Hugging Face Transformers.

`import hf_swd` makes `TrainingArguments(optim="adams")` work. It imports torch and nothing heavier: transformers is
touched when it is imported (by whoever imports it), and `SWDTrainer` and `SWDCallback` import it when they are first
used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .adams import AdamS, create_adams
from .core.schedule import WeightDecaySchedule
from .engines.attach import attach
from .registration import register
from .scheduled_weight_decay import ScheduledWeightDecay


if TYPE_CHECKING:
    from .trainer import SWDCallback, SWDTrainer

__all__ = [
    "AdamS",
    "SWDCallback",
    "SWDTrainer",
    "ScheduledWeightDecay",
    "WeightDecaySchedule",
    "__version__",
    "attach",
    "create_adams",
    "register",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("SWDCallback", "SWDTrainer"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
