"""AdamS over the parameters of a model, in the Trainer's two groups."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor, nn

from .adams import AdamS


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


# The Trainer's rule (Trainer.get_decay_parameter_names): no decay for biases and for what is named like a norm.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


class AdamSOptions(TypedDict, total=False):
    """Keyword arguments that [`create_adams`] hands on to [`AdamS`], for editors and type checkers."""

    betas: tuple[float | Tensor, float | Tensor]
    eps: float
    amsgrad: bool
    reference_steps: int
    unclipped_norm: bool
    max_grad_norm: float
    process_group: ProcessGroup | None
    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None


def create_adams(
    model: nn.Module, *, lr: float | Tensor = 1e-3, weight_decay: float = 5e-4, **adams_kwargs: Unpack[AdamSOptions]
) -> AdamS:
    """
    AdamS over the trainable parameters of a model, in the Trainer's two groups: no decay for biases and norms.

    Args:
        model (`nn.Module`): its parameters with `requires_grad` are optimized.
        lr (`float` or `Tensor`, defaults to 1e-3): learning rate.
        weight_decay (`float`, defaults to 5e-4): decay of the first group; the second has 0.
        adams_kwargs: further arguments of [`AdamS`].

    Raises:
        ValueError: the model has no trainable parameter, or an argument is out of range.
    """
    decay_names = set(decay_parameter_names(model))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"model={type(model).__name__}: no parameter has requires_grad=True; unfreeze what should be trained"
        )
    groups = [
        {"params": [p for name, p in trainable if name in decay_names], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in decay_names], "weight_decay": 0.0},
    ]
    return AdamS([group for group in groups if group["params"]], lr=lr, weight_decay=weight_decay, **adams_kwargs)


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that the Trainer decays: not in an `nn.LayerNorm`, not named like a bias or a norm."""
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    return [n for n, p in model.named_parameters() if id(p) not in norms and not _NO_DECAY.search(n.lower())]
