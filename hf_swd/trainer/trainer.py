"""[`SWDTrainer`]: a Trainer whose clipping and whose schedule read the gradients once, together."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerCallback
from transformers.utils import is_sagemaker_mp_enabled

from ..adams import AdamS
from ..core.schedule import schedule_of


class SWDTrainer(Trainer):
    """
    Trainer that clips with the norm that scheduled weight decay needs anyway: it reads gradients once per step.

    With AdamS, gradients are scaled inside its step, by torch's fused kernel, unless a callback looks at them before
    the step (`on_pre_optimizer_step`). The trained weights are those of the stock Trainer, up to rounding. It applies
    to one process, DDP and FSDP, when the optimizer has a schedule and holds all trainable parameters of the model;
    in all other cases (DeepSpeed, which clips by itself) it is the stock Trainer. `optim_args="unclipped_norm=true"`
    needs it, except under DeepSpeed.

    Args: those of `transformers.Trainer`.

    Example:

    ```python
    args = TrainingArguments("out", optim="adams", weight_decay=0.01, optim_args="reference_steps=100")
    SWDTrainer(model, args, train_dataset=dataset).train()
    ```
    """

    # Both overrides are of private methods: should transformers drop them, the gradients are read twice and nothing
    # else changes.

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self._clip_with_schedule(self.args.max_grad_norm)
        return super()._clip_grad_norm(model) if norm is None else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # max_grad_norm=0: not clipped, but logged
            grad_norm = self._clip_with_schedule(math.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _clip_with_schedule(self, max_norm: float) -> Tensor | None:
        schedule = schedule_of(self.optimizer)
        kind = self.accelerator.distributed_type
        if schedule is None or not (kind in ("NO", "FSDP") or kind.startswith("MULTI_")) or is_sagemaker_mp_enabled():
            return None
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if held != {id(p) for p in self.model.parameters() if p.requires_grad}:
            return None
        self.accelerator.unscale_gradients(self.optimizer)
        optimizer = schedule.optimizer
        if isinstance(optimizer, AdamS):
            return optimizer.clip_grad_norm_(max_norm, defer=not self._gradients_are_looked_at(optimizer))
        return schedule.clip_grad_norm_(max_norm)

    def _gradients_are_looked_at(self, optimizer: AdamS) -> bool:
        """Whether someone may read or change gradients between clipping and the step."""
        callbacks = self.callback_handler.callbacks
        return bool(optimizer._optimizer_step_pre_hooks) or any(
            type(callback).on_pre_optimizer_step is not TrainerCallback.on_pre_optimizer_step for callback in callbacks
        )
