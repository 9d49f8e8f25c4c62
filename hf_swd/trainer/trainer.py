"""[`SWDTrainer`]: a Trainer with all that scheduled weight decay can have in one, registered or not."""

from __future__ import annotations

from typing import Any

from transformers.trainer import Trainer

from .callback import put_first
from .shared_norm import shared_norm


class SWDTrainer(Trainer):
    """
    Trainer that clips with the norm that scheduled weight decay needs anyway: it reads gradients once per step.

    `import hf_swd` makes every Trainer do so; this class does it without registration (`HF_SWD_NO_REGISTER=1`), and
    reports the schedule by [`SWDCallback`]. With AdamS, gradients are scaled inside its step, by torch's fused kernel,
    unless a callback looks at them before the step (`on_pre_optimizer_step`), or a subclass clips by itself or has a
    training loop of its own. The trained weights are those of clipping beforehand, up to rounding. It applies to one
    process, DDP and FSDP, when the optimizer has a schedule and holds all trainable parameters of the model; in all
    other cases (DeepSpeed, which clips by itself) it is transformers' Trainer.

    Args: those of `transformers.Trainer`.

    Example:

    ```python
    args = TrainingArguments("out", optim="adams", weight_decay=0.01, optim_args="reference_steps=100")
    SWDTrainer(model, args, train_dataset=dataset).train()
    ```
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        put_first(self.callback_handler.callbacks)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with shared_norm(self):
            return super()._inner_training_loop(*args, **kwargs)
