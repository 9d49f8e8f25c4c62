"""Which engine trains in fact: accelerate may quietly build another one than was asked for."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback


logger = logging.getLogger(__name__)


def engine_name(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> str:
    """What trains in fact, read from the prepared model and not from the configuration."""
    name = f"{accelerator.distributed_type.value}, {accelerator.num_processes} processes, {type(model).__name__}"
    if hasattr(model, "zero_optimization_stage"):
        name += f", ZeRO stage {model.zero_optimization_stage()}"
    if accelerator.is_fsdp2:
        name += f", FSDP version 2, mesh {tuple(next(model.parameters()).device_mesh.shape)}"
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return f"{name}, {type(optimizer).__name__}, mixed precision {accelerator.mixed_precision}"


class EngineCallback(TrainerCallback):
    """Has the logger of the script say which engine a Trainer has built."""

    def __init__(self, trainer: Trainer, script: logging.Logger) -> None:
        self.trainer = trainer
        self.script = script

    def on_train_begin(self, args, state, control, **kwargs):
        engine = engine_name(self.trainer.accelerator, self.trainer.model_wrapped, self.trainer.optimizer)
        self.script.info(f"Engine = {engine}")


def wrap_own_layers(trainer: Trainer) -> None:
    """Has FSDP wrap the layers of this model if those that the config names are another model's."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    named = set(getattr(plugin, "transformer_cls_names_to_wrap", None) or ())
    if named <= {type(module).__name__ for module in trainer.model.modules()}:
        return
    plugin.transformer_cls_names_to_wrap = None  # accelerate then asks the model
    logger.warning(
        f"The model has no {', '.join(sorted(named))}, which the config names; FSDP wraps the model's own layers."
    )
