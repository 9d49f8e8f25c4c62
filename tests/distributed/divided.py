"""Models of `task.py` that `from_pretrained` divides among the ranks: tensors, experts, and with FSDP2 all of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from engines_accelerate import pretend_gpus, reset, shared_folder, weights
from probe import Probe
from task import KINDS, LR, batches, build_model, groups, share
from torch import nn

import hf_swd


def build(kind: str, sizes: dict[str, Any]) -> nn.Module:
    """`sizes` are those of transformers' `DistributedConfig`."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    with shared_folder() as folder:
        if dist.get_rank() == 0:
            build_model(kind=kind).save_pretrained(folder)
        dist.barrier()
        model = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(**sizes), dtype=torch.float32, attn_implementation="eager"
        )
    _check(model, sizes)
    return model.train()


def data_world(sizes: dict[str, Any]) -> int:
    """How many ranks have data of their own."""
    return dist.get_world_size() // sizes.get("tp_size", 1)


def accelerate_loop(kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The run in a bare accelerate loop, whose `Accelerator` knows of tensor parallelism only."""
    from accelerate import Accelerator, ParallelismConfig

    pretend_gpus.install()
    reset()
    accelerator = Accelerator(parallelism_config=ParallelismConfig(**sizes))
    model = build(kind, sizes)
    optimizer = hf_swd.AdamS(groups(model, KINDS[kind].weight_decay), lr=LR)
    model, optimizer = accelerator.prepare(model, optimizer)
    probe = Probe(optimizer.optimizer)
    world = data_world(sizes)
    rank = dist.get_rank() * world // dist.get_world_size()
    for batch in batches(kind=kind):
        accelerator.backward(model(**share(batch, rank, world)).loss)
        accelerator.clip_grad_norm_(model.parameters(), KINDS[kind].max_norm)
        optimizer.step()
        optimizer.zero_grad()
        probe.end_of_step()
    return probe.report(weights(model))


def _check(model: nn.Module, sizes: dict[str, Any]) -> None:
    """That the model is divided as it was asked for: nothing else would be tested otherwise."""
    from torch.distributed.tensor import DTensor

    dtensors = [p for p in model.parameters() if isinstance(p, DTensor)]
    found = {
        (p.device_mesh.mesh_dim_names[dim], p.device_mesh.size(dim))
        for p in dtensors
        for dim, placement in enumerate(p.placements)
        if not placement.is_replicate()
    }
    wanted = {(name.removesuffix("_size"), size) for name, size in sizes.items() if isinstance(size, int) and size > 1}
    wanted = {(name, size) for name, size in wanted if name != "dp_replicate"}
    assert wanted <= found, f"{wanted} / {found}"
    assert {p.device_mesh.size() for p in dtensors} <= {size for _, size in wanted} | {dist.get_world_size()}
