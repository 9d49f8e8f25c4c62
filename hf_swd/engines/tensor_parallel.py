"""Tensor and expert parallelism of transformers: the only module with names of its inside.

Since 5.16 all that it divides is a DTensor, which says how. Before, some of it or all was plain tensors, which differ
from rank to rank and do not say so (gradient clipping, too, then sees another norm on each rank).
"""

from __future__ import annotations

import re
from typing import Any

from ..core.grad_norm import is_dtensor


# Styles under which every rank holds a module's own parameters whole.
_WHOLE = {
    "all_reduce",
    "ep_dispatch_experts",
    "ep_router",
    "gather",
    "local",
    "local_params",
    "mla_kv_a_proj",
    "moe_identity_expert",
    "moe_tp_experts",
    "replicate",
    "replicated_with_grad_allreduce",
    "sequence_parallel",
}


def refuse_plain_shards(model: Any) -> None:
    """
    Stop where a model has been divided, by its plan, into tensors that do not say so.

    Raises:
        RuntimeError: a trainable parameter is a part of a larger one, and no DTensor.
    """
    plan = getattr(model, "tp_plan", None)
    if not isinstance(plan, dict) or (getattr(model, "_tp_size", None) or 1) == 1:
        return
    parts = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not is_dtensor(p) and _style(plan, name) not in _WHOLE | {None}
    ]
    if parts:
        raise RuntimeError(
            f"tensor or expert parallelism has divided {parts[0]} (and {len(parts) - 1} more) into plain tensors, as "
            "transformers before 5.16 does: gradient clipping and the weight decay schedule would see another norm on "
            "each rank. Use transformers 5.20 or later, whose parts are DTensors"
        )


def _style(plan: dict[str, str], name: str) -> str | None:
    """What the plan says of a parameter, by its name or by that of its module, with `*` for numbers of layers."""
    name = re.sub(r"\.\d+(?=\.)", ".*", name)
    return plan.get(name, plan.get(name.rpartition(".")[0]))
