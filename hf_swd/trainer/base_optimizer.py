"""The schedule on another of the Trainer's optimizers: `optim="adams"` with `optim_args="base=NAME,..."`."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, TrainingArguments


# What transformers reads from `optim_args` for optimizers of these names. It ignores any other key.
_KEYS = {
    r"adamw_torch(_fused|_xla|_npu_fused)?|adamw_hf|adamw_apex_fused|adafactor": (),
    r"adamw_(bnb_)?8bit|paged_adamw_\d+bit|(paged_)?lion_\d+bit": (),
    r"(paged_)?ademamix(_\d+bit)?": ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"),
    r"adamw_torch_[48]bit": ("block_size", "bf16_stochastic_round"),
    r"adamw_anyprecision": ("use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype"),
    r"grokadamw": ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    r"stable_adamw": ("decouple_lr", "max_lr", "kahan_sum"),
    r"schedule_free_.*": ("weight_lr_power", "r"),
}
_REFUSED = {
    r"sgd|adagrad|rmsprop.*": "its weight_decay is an L2 penalty, added to the gradient, and scheduled weight decay "
    "needs decoupled decay",
    r"lomo|adalomo|.*_layerwise": "it changes the weights during the backward pass, before the norm of the gradient "
    "is known",
    r"galore_.*|apollo_.*": "transformers gives it no weight decay",
    r"adams": "that is the schedule itself",
}


def keys_of_base(name: str) -> Collection[str] | None:
    """
    Keys that transformers reads from `optim_args` for the base optimizer `name`; `None` if that is not known.

    Raises:
        ValueError: the Trainer has no such optimizer, or the schedule cannot drive it.
    """
    from transformers.training_args import OptimizerNames

    names = [member.value for member in OptimizerNames]
    for pattern, reason in _REFUSED.items():
        if re.fullmatch(pattern, name):
            raise ValueError(f'optim="adams" with base="{name}": {reason}. base=adamw_torch_fused, for instance, can')
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        guess = f'; did you mean "{close[0]}"?' if close else ""
        raise ValueError(f'optim="adams" with base="{name}": this transformers has no optimizer of that name{guess}')
    return next((keys for pattern, keys in _KEYS.items() if re.fullmatch(pattern, name)), None)


def scheduled_base(
    args: TrainingArguments, model: PreTrainedModel | None, options: dict[str, Any]
) -> tuple[type[Optimizer], dict[str, Any]]:
    """
    Optimizer class and keyword arguments of the base optimizer, as transformers makes them; the class puts a
    [`ScheduledWeightDecay`] on its instances.

    Args:
        args (`TrainingArguments`): the learning rate, betas and so on.
        model (`PreTrainedModel`, *optional*): the model (no base that is supported looks at it so far).
        options (`dict[str, Any]`): from [`parse_optim_args`].

    Raises:
        ImportError, ValueError: transformers cannot make it (the package is missing).
    """
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    from ..scheduled_weight_decay import ScheduledWeightDecay

    options = dict(options)
    args = copy.copy(args)
    args.optim = OptimizerNames(options.pop("base"))
    args.optim_args = options.pop("optim_args", None)
    beta2 = options.pop("schedule_beta2", None)
    base, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)

    class Scheduled(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            ScheduledWeightDecay(self, beta2=beta2, **options)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            # A copy has no schedule; and pickle finds the class.
            return object.__new__, (base,), self.__getstate__()

    # The Trainer knows bitsandbytes' optimizers by their printed names.
    Scheduled.__module__, Scheduled.__name__, Scheduled.__qualname__ = (
        base.__module__,
        base.__name__,
        base.__qualname__,
    )
    return Scheduled, kwargs
