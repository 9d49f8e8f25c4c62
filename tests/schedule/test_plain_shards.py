"""Tensor parallelism that leaves plain tensors, as transformers before 5.16 does: `attach` stops."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_swd


class Model(nn.Module):
    """What a divided model of transformers shows: a size, a plan, and (here) plain tensors."""

    def __init__(self, plan: dict[str, str] | None, size: int | None = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 2), "norm": nn.LayerNorm(2)}) for _ in range(2))
        self.experts = nn.Parameter(torch.zeros(2, 2))
        self._tp_size = size
        self.tp_plan = plan


def attach(model: nn.Module) -> None:
    hf_swd.attach(hf_swd.AdamS(model.parameters()), model)


@pytest.mark.parametrize(
    ("plan", "first", "more"),
    [
        ({"layers.*.up": "colwise"}, "layers.0.up.weight", 3),
        ({"layers.*.up.weight": "local_rowwise"}, "layers.0.up.weight", 1),
        ({"experts": "grouped_gemm", "layers.*.norm": "sequence_parallel"}, "experts", 0),
    ],
)
def test_plain_parts_are_refused(plan: dict[str, str], first: str, more: int) -> None:
    with pytest.raises(RuntimeError, match=rf"{first} \(and {more} more\) into plain tensors.* 5\.20"):
        attach(Model(plan))


@pytest.mark.parametrize(
    "model",
    [
        Model(None),
        Model({}),
        Model({"layers.*.up": "colwise"}, size=1),
        Model({"layers.*.up": "colwise"}, size=None),
        Model({"layers.*.norm": "replicated_with_grad_allreduce", "layers": "gather"}),
        Model({"layers.*.up": "colwise"}).requires_grad_(False),
        nn.Linear(2, 2),
    ],
)
def test_all_else_is_not(model: nn.Module) -> None:
    attach(model)
