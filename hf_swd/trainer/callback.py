"""[`SWDCallback`]: what any Trainer logs of scheduled weight decay. What it warns of stands in `watch.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

from ..core.wrappers import schedule_of
from ..engines.attach import attach, is_scheduled
from ..engines.zero import clipping_norm
from . import watch


if TYPE_CHECKING:
    from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState
    from transformers.training_args import TrainingArguments


_DECAY_KEY = "swd/weight_decay"
_RMS_KEY = "swd/grad_rms"


class SWDCallback(TrainerCallback):
    """
    Reports scheduled weight decay in the logs of a Trainer, and warns where it does not do what it should.

    Beside `loss`, every training log gets `swd/weight_decay`, the largest effective decay of any parameter group at
    the last step, and `swd/grad_rms`, the root of the mean second moment that it was divided by. TensorBoard shows
    them as `train/swd/weight_decay` and `train/swd/grad_rms`, as it renames all training logs.

    `import hf_swd` has it join every Trainer whose optimizer has a schedule when a training begins; there it acts
    before the trackers' callbacks, so they see both keys. A second one on the same Trainer changes nothing.

    Warnings, through the logger `hf_swd.trainer`, once per training and on the main process only:

    - no decay at all;
    - a training that ends before `reference_steps`;
    - a decay of more than 1 % of the weights per step (looked at in steps that are powers of two and at every log);
    - a decay of a hundred times `weight_decay` that is hardly meant;
    - at least 90 % of the steps were clipped (looked at from 20 steps on, and at the end; under DeepSpeed, which clips
      by itself, as far as logs show `grad_norm`);
    - a resumed checkpoint whose `reference_steps`, `unclipped_norm` or `amsgrad` are not what was asked for;
    - a resumed checkpoint without state for the optimizer: the schedule starts anew;
    - a resumed checkpoint of scheduled weight decay in an optimizer that has no schedule.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        if is_scheduled(optimizer):
            watch.begin(attach(optimizer, model), state, _clipping_norm(args), args)
        elif optimizer is not None:
            watch.begin_without_schedule(optimizer, state)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        watch.after_step(optimizer, state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        schedule = schedule_of(optimizer)
        if schedule is None or not logs or "loss" not in logs or _DECAY_KEY in logs:
            return
        values = {_DECAY_KEY: watch.largest(optimizer, "scheduled_weight_decay"), _RMS_KEY: schedule.grad_rms}
        logs.update(values)  # all callbacks get this very dict, the history has a copy of it
        if (
            state.log_history
            and state.log_history[-1].get("step") == state.global_step
            and "loss" in state.log_history[-1]
        ):
            state.log_history[-1].update(values)
        watch.after_log(optimizer, logs.get("grad_norm", 0.0), _clipping_norm(args))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        watch.end(optimizer, _clipping_norm(args))


def join(handler: CallbackHandler, state: TrainerState) -> None:
    """When a training begins: a [`SWDCallback`] for an optimizer with a schedule, a warning for one that lacks it."""
    if is_scheduled(handler.optimizer):
        put_first(handler.callbacks)
    elif handler.optimizer is not None:
        watch.begin_without_schedule(handler.optimizer, state)


def put_first(callbacks: list[TrainerCallback]) -> None:
    """Have a [`SWDCallback`] among a Trainer's callbacks, before the trackers', which then see what it logs."""
    if not any(isinstance(callback, SWDCallback) for callback in callbacks):
        callbacks.append(SWDCallback())
    callbacks.sort(key=lambda callback: not isinstance(callback, SWDCallback))


def _clipping_norm(args: TrainingArguments) -> float:
    """To what norm gradients are clipped, 0.0 for no clipping. DeepSpeed clips by itself."""
    plugin = args.deepspeed_plugin
    return args.max_grad_norm or 0.0 if plugin is None else clipping_norm(plugin.hf_ds_config.config)
