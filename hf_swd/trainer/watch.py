"""What a Trainer is warned of: settings under which scheduled weight decay does not do what it should."""

from __future__ import annotations

import logging
import math
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..core.calibration import MANY_TIMES, USUAL_FOR_ADAMW, proposed_options, with_options
from ..core.wrappers import schedule_of, unwrapped
from .rounding import rounding_warning


if TYPE_CHECKING:
    from transformers.trainer_callback import TrainerState
    from transformers.training_args import TrainingArguments

    from ..core.schedule import WeightDecaySchedule


logger = logging.getLogger("hf_swd.trainer")

_LARGE_DECAY = 0.01  # of the weights, per step
_NEARLY_ALL = 0.9
_ENOUGH_STEPS = 20
_ENOUGH_LOGS_AT_END = 3
_OPTIONS = ("reference_steps", "unclipped_norm", "amsgrad")


@dataclass
class _Watch:
    """What is known of one training; shared by all callbacks that see it, so that they warn once."""

    state: TrainerState  # a new one for every training
    first_step: int
    clips_before: tuple[int, int]
    clips_to: str = ""
    optim_args: str | None = None  # `None` if the optimizer was built by the user
    logs: int = 0
    clipped_logs: int = 0
    said: set[str] = field(default_factory=set)

    @property
    def like_adamw(self) -> dict[str, Any]:
        return proposed_options(self.state.max_steps)

    def setting(self, options: dict[str, Any]) -> str:
        """How to set options."""
        if self.optim_args is not None:
            return f'optim_args="{with_options(self.optim_args, options)}"'
        items = (f"{name}={value}" for name, value in options.items())
        return f"{', '.join(items)} where the optimizer, or its ScheduledWeightDecay, is built"

    def looks_for(self, subject: str) -> bool:
        return self.state.is_world_process_zero and subject not in self.said

    def warn(self, subject: str, message: str) -> None:
        if self.looks_for(subject):
            self.said.add(subject)
            with tqdm.external_write_mode():  # not behind a progress bar
                logger.warning(message)


# By schedule; by the optimizer itself where it has none.
_watches: weakref.WeakKeyDictionary[Any, _Watch] = weakref.WeakKeyDictionary()


def _begin(watched: Any, state: TrainerState, clips: tuple[int, int] = (0, 0)) -> _Watch:
    watch = _watches.get(watched)
    if watch is None or watch.state is not state:
        watch = _watches[watched] = _Watch(state, state.global_step, clips)
    return watch


def begin(schedule: WeightDecaySchedule, state: TrainerState, max_norm: float, args: TrainingArguments) -> None:
    """At the begin of a training that clips to `max_norm`, after its checkpoint has been loaded."""
    watch = _begin(schedule, state, schedule.clip_statistics())
    if args.optim == "adams":
        watch.optim_args = args.optim_args or ""
    optimizer, max_grad_norm = schedule.optimizer, args.max_grad_norm or 0.0
    if largest(optimizer, "initial_weight_decay") == 0:
        watch.warn(
            "no decay",
            "weight_decay=0 (the default of TrainingArguments) in every parameter group of "
            f"{type(optimizer).__name__}: there is no decay to schedule, and AdamS without decay is plain Adam. Set "
            "weight_decay=5e-4, the paper's value; or AdamW's value (usually 0.01 to 0.1) together with "
            f"{watch.setting(watch.like_adamw)}.",
        )
    elif schedule.reference_steps >= state.max_steps > 0:
        watch.warn(
            "all before reference_steps",
            f"reference_steps={schedule.reference_steps}, and the training has {state.max_steps} steps: up to that "
            "step weight_decay is what it is in AdamW, so nothing is scheduled. For a schedule, set "
            f"{watch.setting(watch.like_adamw)}.",
        )
    watch.clips_to = f"max_grad_norm={max_norm:g}"
    if max_norm != max_grad_norm:
        watch.clips_to = (
            f"gradient_clipping={max_norm:g} of DeepSpeed, whose configuration leaves it out (with "
            f'"gradient_clipping": "auto" it would be max_grad_norm={max_grad_norm:g})'
        )
    if watch.first_step > 0 and schedule.step_count == 0 and not optimizer.state:
        watch.warn(
            "no state",
            f"training goes on at step {watch.first_step}, but its checkpoint has no state for this optimizer "
            "(DeepSpeed writes one for itself alone, save_only_model none): the moments and the schedule, with "
            "reference_steps, start at step 0, as AdamW would. To go on with them, resume with the engine that wrote "
            "the checkpoint.",
        )
    elif watch.first_step > 0:
        _check_loaded_options(watch, optimizer)


def begin_without_schedule(optimizer: Any, state: TrainerState) -> None:
    """Like [`begin`], with an optimizer that has no schedule."""
    *_, optimizer = unwrapped(optimizer)
    steps = largest(optimizer, "schedule_step")
    if steps > 0:
        _begin(optimizer, state).warn(
            "no schedule",
            f"the checkpoint was written with scheduled weight decay ({steps:.0f} steps of it), but "
            f"{type(optimizer).__name__} has no schedule: this training goes on with the constant "
            f"weight_decay={largest(optimizer, 'weight_decay'):g}. To go on with the schedule, resume with "
            'optim="adams", or with an optimizer that hf_swd.ScheduledWeightDecay wraps.',
        )


def after_step(optimizer: Any, step: int) -> None:
    schedule = schedule_of(optimizer)
    if schedule is None or step & (step - 1):
        return
    watch = _watches.get(schedule)
    if watch is not None:
        _check_decay(watch, schedule, optimizer, step)


def after_log(optimizer: Any, grad_norm: float, max_norm: float) -> None:
    schedule = schedule_of(optimizer)
    if schedule is None:
        return
    watch = _watches.get(schedule)
    if watch is not None:
        watch.logs += 1
        watch.clipped_logs += grad_norm > max_norm
        _check_decay(watch, schedule, optimizer, watch.state.global_step)
        _check_clipping(watch, schedule, optimizer, max_norm, _ENOUGH_STEPS, _ENOUGH_STEPS)
        if watch.logs == 1 and (rounding := rounding_warning(schedule.optimizer)):
            watch.warn("rounding", rounding)


def end(optimizer: Any, max_norm: float) -> None:
    schedule = schedule_of(optimizer)
    if schedule is None:
        return
    watch = _watches.get(schedule)
    if watch is not None:
        _check_clipping(watch, schedule, optimizer, max_norm, 1, _ENOUGH_LOGS_AT_END)


def largest(optimizer: Any, key: str) -> float:
    """Of the values that the parameter groups have for `key`; 0 where none has it. Makes the host wait."""
    return max((float(group[key]) for group in optimizer.param_groups if key in group), default=0.0)


def _check_loaded_options(watch: _Watch, optimizer: Any) -> None:
    """Options of which no group has what the optimizer was built with: it has got them from the checkpoint."""
    groups, asked = optimizer.param_groups, optimizer.defaults
    differing = [
        key
        for key in _OPTIONS
        if groups and key in asked and all(group.get(key, asked[key]) != asked[key] for group in groups)
    ]
    if not differing:
        return
    # Adam's state lacks the maxima that amsgrad would need.
    assignable = [f'group["{key}"]' for key in differing if not (key == "amsgrad" and asked[key])]
    in_place = (
        f", or assign {', '.join(assignable)} in every group of optimizer.param_groups, for instance in a callback's "
        "on_train_begin"
    )
    watch.warn(
        "options",
        f"the checkpoint has {', '.join(f'{key}={groups[0][key]}' for key in differing)}, and "
        f"{type(optimizer).__name__} was built with {', '.join(f'{key}={asked[key]}' for key in differing)}: the "
        "checkpoint's are used, as its betas are. To change them, build the optimizer anew: load only the weights of "
        f"the checkpoint, and train without resume_from_checkpoint{in_place if assignable else ''}.",
    )


def _check_decay(watch: _Watch, schedule: WeightDecaySchedule, optimizer: Any, step: int) -> None:
    if not watch.looks_for("large decay"):
        return
    # Groups may be new, and have another `weight_decay`, since the step.
    groups = [group for group in optimizer.param_groups if "scheduled_weight_decay" in group]
    rms = schedule.grad_rms
    if rms <= 0 or not groups:
        return
    group = max(groups, key=lambda group: float(group["lr"]) * float(group["scheduled_weight_decay"]))
    lr, decay, user_decay = (float(group[key]) for key in ("lr", "scheduled_weight_decay", "initial_weight_decay"))
    setting = watch.setting(watch.like_adamw)
    like_adamw = f"{setting}, with which weight_decay has its meaning in AdamW (usually 0.01 to 0.1)"
    if lr * decay > _LARGE_DECAY:
        if schedule.reference_steps:
            remedy = f" ({_LARGE_DECAY / (lr * decay) * user_decay:.2g} would take 1 %)"
        else:
            remedy = f" ({0.01 * rms:.2g} gives an effective decay of 0.01 here), or set {like_adamw}"
        watch.warn(
            "large decay",
            f"weight decay takes {100 * lr * decay:.3g} % of the weights at step {step}: learning rate {lr:.3g} * "
            f"effective decay {decay:.3g}, from weight_decay={user_decay:g} at a gradient rms of {rms:.3g}. Choose a "
            f"smaller weight_decay{remedy}.",
        )
    elif decay > MANY_TIMES * user_decay and (schedule.reference_steps or user_decay >= USUAL_FOR_ADAMW):
        if schedule.reference_steps:
            why = f"the gradient rms has fallen from {schedule.reference_rms:.3g} to {rms:.3g} since reference_steps"
        else:
            why = f"without reference_steps it is divided by the gradient rms, {rms:.3g}. Set {like_adamw}"
        watch.warn(
            "large decay",
            f"the effective decay at step {step} is {decay:.3g}, {decay / user_decay:.0f} times "
            f"weight_decay={user_decay:g}: {why}.",
        )


def _check_clipping(
    watch: _Watch, schedule: WeightDecaySchedule, optimizer: Any, max_norm: float, enough: int, enough_logs: int
) -> None:
    if not watch.looks_for("clipping"):
        return
    user_decay = largest(optimizer, "initial_weight_decay")
    if max_norm <= 0 or user_decay == 0 or schedule.unclipped_norm:
        return
    clipped, seen = (now - then for now, then in zip(schedule.clip_statistics(), watch.clips_before, strict=True))
    of_what = "steps"
    if not seen:
        clipped, seen, enough, of_what = watch.clipped_logs, watch.logs, enough_logs, "logged steps"
    if seen < enough or clipped < _NEARLY_ALL * seen:
        return
    reference = schedule.reference_rms if schedule.reference_steps else 1.0
    size = schedule.num_elements
    if reference > 0:
        constant = user_decay * reference * math.sqrt(size) / max_norm
        factor = f"* {reference:.3g} " if reference != 1 else ""
        formula = f"weight_decay={user_decay:g} {factor}* sqrt({size:.0f}) / {max_norm:g}"
    else:  # before step `reference_steps`
        constant, formula = user_decay, "weight_decay itself"
    unclipped = {"unclipped_norm": True}
    if not schedule.reference_steps and "large decay" in watch.said:
        unclipped = {**watch.like_adamw, **unclipped}
    watch.warn(
        "clipping",
        f"{clipped} of {seen} {of_what} were clipped to {watch.clips_to}. Clipped gradients all have the "
        f"same norm, so scheduled weight decay becomes constant, about {constant:.3g} ({formula}), as in AdamW with "
        f"weight_decay={constant:.3g}. To let it follow the gradient, raise max_grad_norm above the usual grad_norm "
        f"of the log (0 clips nothing); or schedule by the norm before clipping: {watch.setting(unclipped)}.",
    )
