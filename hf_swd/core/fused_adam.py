"""torch's fused AdamW kernel: for what tensors it is right, and the way to it on CPU that takes the least time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def have_one_layout(lists: Sequence[list[Tensor]]) -> bool:
    """Whether tensors at the same place of all lists correspond in memory: these kernels walk through it, and on CPU
    they do not look at strides."""
    return all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists) or all(map(_same_layout, *lists))


def fused_adamw_on_cpu(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    beta1: float | Tensor,
    beta2: float | Tensor,
    found_inf: Tensor | None,
    **options: Any,
) -> None:
    """
    [`torch.optim.adamw.adamw`] with `fused=True` for parameters of one dtype, the same numbers.

    Per tensor that function takes longer than the kernel does for a thousand elements: it groups the lists by device
    and dtype, and adds the number 1 to each step count by itself, which must be made a tensor each time.

    Args:
        options: `lr`, `weight_decay`, `eps`, `amsgrad`, `maximize` and `grad_scale` of that function.
    """
    torch._foreach_add_(steps, [torch.tensor(1.0, device="cpu")] * len(steps))  # pyright: ignore[reportPrivateImportUsage]
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        beta1=float(beta1),
        beta2=float(beta2),
        found_inf=found_inf,
        **options,
    )
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))  # pyright: ignore[reportPrivateImportUsage]


def _same_layout(p: Tensor, *others: Tensor) -> bool:
    """Whether the elements of all correspond in memory, in which there are no gaps."""
    stride = p.stride()
    if any(other.stride() != stride for other in others):
        return False
    return p.is_contiguous() or torch.empty_like(p, device="meta").stride() == stride
