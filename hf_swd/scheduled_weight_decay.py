"""`ScheduledWeightDecay`: the schedule on any torch optimizer with decoupled weight decay, by step hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .core.group_state import NUMBERS, OPTIONS, remove
from .core.schedule import WeightDecaySchedule
from .core.step_hooks import drive
from .core.validation import check_options
from .core.wrappers import schedule_of, unwrapped
from .engines import attach as _attach  # noqa: F401 - its hook stops steps of which the schedule sees a part only


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


class ScheduledWeightDecay(WeightDecaySchedule):
    """
    Scheduled weight decay for any torch optimizer with decoupled weight decay.

    At every `optimizer.step()` it writes `initial_weight_decay / sqrt(mean second moment)` into
    `group["weight_decay"]`, which the optimizer then applies as its own: `theta <- (1 - lr * weight_decay) theta`. The
    user's value is kept in `group["initial_weight_decay"]`; a value assigned to `group["weight_decay"]` between steps
    becomes the user's value. The state of the schedule is part of the optimizer's own `state_dict()`.

    On an accelerator the host waits once a step for the decay, since optimizers take it as a number ([`AdamS`] and
    torchao's do not). A copy of the optimizer (`copy.deepcopy`, pickle) has no schedule: attach one to it.

    Args:
        optimizer (`torch.optim.Optimizer`): AdamW, NAdam or RAdam with `decoupled_weight_decay=True`, 8-bit AdamW,
            Lion ...; a wrapper that keeps it in `.optimizer` is looked through.
        beta2 (`float`, *optional*, in [0, 1)): decay rate of the mean second moment; by default `betas[1]` of each
            group.
        reference_steps, unclipped_norm, max_grad_norm, process_group: as of [`AdamS`].

    Raises:
        TypeError, ValueError: an argument is out of range; the optimizer's decay is not decoupled (an L2 penalty), or
            it has a schedule already.

    Example:

    ```python
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=5e-4, fused=True)
    schedule = ScheduledWeightDecay(optimizer)
    ```
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        beta2: float | None = None,
        reference_steps: int = 0,
        unclipped_norm: bool = False,
        max_grad_norm: float = 0.0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        innermost = [optimizer, *unwrapped(optimizer)][-1]
        if not isinstance(innermost, torch.optim.Optimizer):
            raise TypeError(f"optimizer={optimizer!r}: expected a torch.optim.Optimizer")
        optimizer = innermost
        if schedule_of(optimizer) is not None:
            raise ValueError(
                f"optimizer={type(optimizer).__name__}: it has a schedule already; call .remove() on that one first"
            )
        _check_decoupled(optimizer)
        if beta2 is None and not all("betas" in group for group in optimizer.param_groups):
            raise ValueError(
                f"beta2=None: {type(optimizer).__name__} has no betas to take it from; pass beta2=0.999, for instance "
                '(in optim_args: "schedule_beta2=0.999")'
            )
        if beta2 is not None:
            check_options({"beta2": beta2})
        super().__init__(
            optimizer,
            beta2=beta2,
            reference_steps=reference_steps,
            unclipped_norm=unclipped_norm,
            max_grad_norm=max_grad_norm,
            process_group=process_group,
        )
        drive(self)

    def remove(self) -> None:
        """Detach from the optimizer, which goes on with the user's constant decay; a second time does nothing."""
        optimizer = self.optimizer
        if schedule_of(optimizer) is not self:
            return
        for hook in self.hooks:
            hook.remove()
        for group in optimizer.param_groups:
            remove(group)
        for key in OPTIONS:
            optimizer.defaults.pop(key, None)
        optimizer.__dict__.pop("load_state_dict", None)  # see drive
        del optimizer.__dict__["_decay_schedule"]

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer's own `state_dict()` holds of the schedule, in every parameter group: numbers and
        options, as docs/algorithm.md lists them."""
        group = self.optimizer.state_dict()["param_groups"][0]
        return {key: group[key] for key in (*OPTIONS, *NUMBERS)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state written by [`state_dict`], before or after the optimizer's own is loaded."""
        for group in self.optimizer.param_groups:
            group.update({key: state_dict[key] for key in (*OPTIONS, *NUMBERS)})
        self.loaded()


# The flag in parameter groups (of torch, optimi, pytorch_optimizer) and on the optimizer (of torchao, Apex).
_FLAGS_OF_GROUPS = ("decoupled_weight_decay", "decouple_wd", "weight_decouple")
_FLAGS_OF_OPTIMIZERS = ("is_adamw", "adam_w_mode")
# bitsandbytes' names of its kernels with an L2 penalty.
_COUPLED_KERNELS = ("momentum", "rmsprop", "adagrad", "lars")


def _check_decoupled(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if hasattr(optimizer, "optim_dict"):
        raise ValueError(
            f"optimizer={name}: it steps every parameter by itself during the backward pass (torchao's "
            "CPUOffloadOptimizer does), before the norm of the whole gradient is known. DeepSpeed ZeRO-Offload can "
            "keep the state of AdamS on the host"
        )
    coupled = any(not getattr(optimizer, flag, True) for flag in _FLAGS_OF_OPTIMIZERS)
    coupled = coupled or getattr(optimizer, "optimizer_name", None) in _COUPLED_KERNELS
    for group in optimizer.param_groups:
        if "weight_decay" not in group:
            raise ValueError(f"optimizer={name}: its parameter groups have no weight_decay to schedule")
        if group.get("lr", 0.0) is None:
            raise ValueError(
                f"optimizer={name}: its learning rate is not in its parameter groups (lr=None), and the decay of a "
                "step is kept below 1/lr: give it a learning rate (Adafactor: relative_step=False)"
            )
        if group.get("decouple_lr"):
            raise ValueError(
                f"optimizer={name}: with decouple_lr=True its decay per step is not lr * weight_decay, which "
                "scheduled weight decay keeps below 1: use decouple_lr=False"
            )
        flags = [group[flag] for flag in _FLAGS_OF_GROUPS if flag in group]
        known = type(optimizer).__module__.startswith("torch.optim") and name not in ("AdamW", "Muon", "Adafactor")
        if coupled or not all(flags) or (known and not flags):
            raise ValueError(
                f"optimizer={name}: its weight_decay is an L2 penalty, added to the gradient, and scheduled weight "
                "decay needs decoupled decay: use torch.optim.AdamW, or decoupled_weight_decay=True where the "
                "optimizer has it"
            )
