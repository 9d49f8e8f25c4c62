"""Scheduled Weight Decay (SWD) and its Adam, AdamS, for Hugging Face Transformers.

`import hf_swd` makes `TrainingArguments(optim="adams")` work. It imports nothing heavy: names are imported when they
are first used (torch by `AdamS`, transformers by `SWDTrainer`), and transformers is patched right after its import, by
whoever imports it, through an import hook in `sys.meta_path` that is removed then. With the environment variable
`HF_SWD_NO_REGISTER` set, nothing is patched until [`register`] is called.

The first use of a name that needs torch also installs a step hook for all optimizers of the process
(`torch.optim.optimizer.register_optimizer_step_pre_hook`). It stops an optimizer with a schedule whose model has been
divided by an engine unseen, and does nothing to others.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from .registration import register


if TYPE_CHECKING:
    from .adams import AdamS
    from .core.schedule import WeightDecaySchedule
    from .engines.attach import attach
    from .param_groups import create_adams
    from .scheduled_weight_decay import ScheduledWeightDecay
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


_MODULES = {
    "AdamS": "hf_swd.adams",
    "SWDCallback": "hf_swd.trainer",
    "SWDTrainer": "hf_swd.trainer",
    "ScheduledWeightDecay": "hf_swd.scheduled_weight_decay",
    "WeightDecaySchedule": "hf_swd.core.schedule",
    "attach": "hf_swd.engines.attach",
    "create_adams": "hf_swd.param_groups",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not os.environ.get("HF_SWD_NO_REGISTER"):
    register()
