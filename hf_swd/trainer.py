"""What a Trainer shows of scheduled weight decay: [`SWDCallback`] for any Trainer, [`SWDTrainer`] which also saves a pass."""

from __future__ import annotations

import logging
import math
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.utils import is_sagemaker_mp_enabled

from . import registration
from .adams import AdamS
from .core.schedule import WeightDecaySchedule, schedule_of
from .engines.attach import attach, is_scheduled


__all__ = ["SWDCallback", "SWDTrainer"]

logger = logging.getLogger(__name__)

_DECAY_KEY = "swd/weight_decay"
_RMS_KEY = "swd/grad_rms"

_LARGE_DECAY = 0.01  # of the weights, per step
_NEARLY_ALL = 0.9
_ENOUGH_STEPS = 20
_ENOUGH_LOGS_AT_END = 3
_REMEDY = 'optim_args="reference_steps=100", with which weight_decay has its meaning in AdamW (usually 0.01 to 0.1)'


@dataclass
class _Watch:
    """What is known of one training; shared by all callbacks that watch the same schedule, so that they warn once."""

    state: TrainerState  # a new one for every training
    first_step: int
    clips_before: tuple[int, int]
    logs: int = 0
    clipped_logs: int = 0
    said: set[str] = field(default_factory=set)

    def warn(self, about: str, message: str) -> None:
        if about not in self.said:
            self.said.add(about)
            logger.warning(message)


_watches: weakref.WeakKeyDictionary[WeightDecaySchedule, _Watch] = weakref.WeakKeyDictionary()


def _watch_of(optimizer: Any) -> _Watch | None:
    schedule = schedule_of(optimizer)
    return None if schedule is None else _watches.get(schedule)


class SWDCallback(TrainerCallback):
    """
    Reports scheduled weight decay in the logs of a Trainer, and warns of settings under which it does not do what it should.

    Beside `loss`, every training log gets `swd/weight_decay`, the largest effective decay of any parameter group at the last step, and
    `swd/grad_rms`, the root of the mean second moment that it was divided by. TensorBoard shows them as `train/swd/weight_decay` and
    `train/swd/grad_rms`, as it renames all training logs.

    `import hf_swd` makes it a default callback of every Trainer; there it acts before the trackers' callbacks, so they see both keys.
    Without a schedule on the Trainer's optimizer it does nothing. A second one on the same Trainer changes nothing.

    Warnings, through the logger `hf_swd.trainer`, once per training and on the main process only: no decay at all; a decay of more than
    1 % of the weights per step (looked at in the steps that are powers of two and at every log); at least 90 % of at least 20 steps
    clipped (counted by [`SWDTrainer`]; with another Trainer as far as its logs show `grad_norm`, at the end of the training from 3 logs).
    """

    def on_init_end(self, args, state, control, optimizer=None, **kwargs):
        if optimizer is None:
            registration.check_arguments(args)

    def on_train_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
        if not is_scheduled(optimizer):
            return
        schedule = attach(optimizer, model)
        watch = _watches.get(schedule)
        if watch is None or watch.state is not state:
            watch = _watches[schedule] = _Watch(state, state.global_step, schedule.clip_statistics())
        if state.is_world_process_zero and _largest(optimizer, "initial_weight_decay") == 0:
            watch.warn(
                "no decay",
                f"weight_decay=0 (the default of TrainingArguments) in every parameter group of {type(schedule.optimizer).__name__}: there "
                "is no decay to schedule, and AdamS without decay is plain Adam. Set weight_decay=5e-4, the paper's value; or AdamW's value "
                '(usually 0.01 to 0.1) together with optim_args="reference_steps=100".',
            )

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        step = state.global_step + 1
        if step & (step - 1) == 0 and state.is_world_process_zero and _watch_of(optimizer) is not None:
            _check_decay(optimizer, step)

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        schedule = schedule_of(optimizer)
        if schedule is None or not logs or "loss" not in logs or _DECAY_KEY in logs:
            return
        values = {_DECAY_KEY: _largest(optimizer, "weight_decay"), _RMS_KEY: schedule.grad_rms}
        logs.update(values)  # all callbacks get this very dict, the history has a copy of it
        if (
            state.log_history
            and state.log_history[-1].get("step") == state.global_step
            and "loss" in state.log_history[-1]
        ):
            state.log_history[-1].update(values)
        watch = _watch_of(optimizer)
        if watch is not None and state.is_world_process_zero:
            watch.logs += 1
            watch.clipped_logs += logs.get("grad_norm", 0.0) > args.max_grad_norm
            _check_decay(optimizer, state.global_step)
            _check_clipping(optimizer, args.max_grad_norm, _ENOUGH_STEPS)

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        watch = _watch_of(optimizer)
        if watch is not None and state.is_world_process_zero and state.global_step - watch.first_step >= _ENOUGH_STEPS:
            _check_clipping(optimizer, args.max_grad_norm, _ENOUGH_LOGS_AT_END)


class SWDTrainer(Trainer):
    """
    Trainer that clips gradients with the norm that scheduled weight decay needs anyway: they are read once per step, not twice.

    With AdamS, gradients are scaled inside its step, by torch's fused kernel, unless a callback looks at them before the step
    (`on_pre_optimizer_step`). The trained weights are those of the stock Trainer, up to rounding. It applies to one process, DDP and
    FSDP, when the optimizer has a schedule and holds all trainable parameters of the model; in all other cases (DeepSpeed, which clips by
    itself) it is the stock Trainer. `optim_args="unclipped_norm=true"` needs it, except under DeepSpeed.

    Args: those of `transformers.Trainer`.

    Example:

    ```python
    args = TrainingArguments("out", optim="adams", weight_decay=0.01, optim_args="reference_steps=100")
    SWDTrainer(model, args, train_dataset=dataset).train()
    ```
    """

    # Both overrides are of private methods: should transformers drop them, the gradients are read twice and nothing else changes.

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


def _largest(optimizer: Any, key: str) -> float:
    return max((float(group[key]) for group in optimizer.param_groups), default=0.0)


def _check_decay(optimizer: Any, step: int) -> None:
    schedule = schedule_of(optimizer)
    watch = _watches[schedule]
    if "large decay" in watch.said:
        return
    group = max(optimizer.param_groups, key=lambda group: float(group["lr"]) * float(group["weight_decay"]))
    lr, decay, rms = float(group["lr"]), float(group["weight_decay"]), schedule.grad_rms
    if lr * decay > _LARGE_DECAY and rms > 0:
        user_decay = group["initial_weight_decay"]
        watch.warn(
            "large decay",
            f"weight decay takes {100 * lr * decay:.3g} % of the weights at step {step}: learning rate {lr:.3g} * effective decay "
            f"{decay:.3g}, from weight_decay={user_decay:g} at a gradient rms of {rms:.3g}. Choose a smaller weight_decay"
            + (
                f" ({_LARGE_DECAY / (lr * decay) * user_decay:.2g} would take 1 %)."
                if schedule.reference_steps
                else f" (an effective decay of 0.01 is {0.01 * rms:.2g} here), or {_REMEDY}."
            ),
        )


def _check_clipping(optimizer: Any, max_norm: float, enough_logs: int) -> None:
    schedule = schedule_of(optimizer)
    watch = _watches[schedule]
    user_decay = _largest(optimizer, "initial_weight_decay")
    if max_norm <= 0 or user_decay == 0 or "clipping" in watch.said or schedule.unclipped_norm:
        return
    clipped, seen = (now - before for now, before in zip(schedule.clip_statistics(), watch.clips_before, strict=True))
    enough, of_what = _ENOUGH_STEPS, "steps"
    if not seen:
        clipped, seen, enough, of_what = watch.clipped_logs, watch.logs, enough_logs, "logged steps"
    if seen < enough or clipped < _NEARLY_ALL * seen:
        return
    reference = schedule.reference_rms if schedule.reference_steps else 1.0
    size = schedule.num_elements
    if reference > 0:
        constant = user_decay * reference * math.sqrt(size) / max_norm
        formula = f"weight_decay={user_decay:g} {f'* {reference:.3g} ' if reference != 1 else ''}* sqrt({size:.0f}) / {max_norm:g}"
    else:  # before step `reference_steps`
        constant, formula = user_decay, "weight_decay itself"
    watch.warn(
        "clipping",
        f"{clipped} of {seen} {of_what} were clipped to max_grad_norm={max_norm:g}. Clipped gradients all have the same norm, so scheduled "
        f"weight decay becomes constant, about {constant:.3g} ({formula}), as in AdamW with weight_decay={constant:.3g}. To let it follow the "
        "gradient, raise max_grad_norm above the usual grad_norm of the log, set max_grad_norm=0, or use hf_swd.SWDTrainer with "
        'optim_args="unclipped_norm=true".',
    )


registration.register()  # the default callback, where importing this module is what imports transformers.trainer
