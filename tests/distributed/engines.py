"""The run of `task.py` under each engine of torch.

Every function is called on all ranks and returns a [`Probe.report`] with the whole final weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from probe import Probe
from task import ADAMW_DECAY, LR, MAX_NORM, STEPS, WEIGHT_DECAY, batches, build_model, groups, share
from torch import Tensor, nn

import hf_swd
from hf_swd.core.wrappers import schedule_of


Weights = dict[str, Tensor]


def _scheduled_adamw(
    params: Any, *, unclipped_norm: bool = False, max_grad_norm: float = 0.0, **options: Any
) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(params, **options)
    hf_swd.ScheduledWeightDecay(optimizer, unclipped_norm=unclipped_norm, max_grad_norm=max_grad_norm)
    return optimizer


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adams": hf_swd.AdamS,
    "adamw": torch.optim.AdamW,
    "scheduled": _scheduled_adamw,
}


def build_optimizer(
    model: nn.Module, optim: str = "adams", *, one_group: bool = False, split: bool = False, **options: Any
) -> Any:
    """The optimizer with the groups of [`task.groups`], or with everything decayed."""
    decay = ADAMW_DECAY if optim == "adamw" else WEIGHT_DECAY
    if one_group:
        params: Any = [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": decay}]
    else:
        params = groups(model, decay, split)
    return OPTIMIZERS[optim](params, lr=LR, weight_decay=decay, **options)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    clip: Callable[[], Any],
    *,
    probe: Probe | None = None,
    first: int = 0,
    last: int = STEPS,
    micros: int = 1,
    no_sync: Callable[[], Any] = contextlib.nullcontext,
    data_rank: int | None = None,
    data_world: int | None = None,
) -> None:
    rank = dist.get_rank() if data_rank is None else data_rank
    world = dist.get_world_size() if data_world is None else data_world
    for batch in batches(first, last):
        for micro in range(micros):
            with no_sync() if micro < micros - 1 else contextlib.nullcontext():
                (model(**share(batch, rank, world, micro, micros)).loss / micros).backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        if probe is not None:
            probe.end_of_step()


def whole_weights(named: Iterable[tuple[str, Tensor]]) -> Weights:
    weights = {}
    for name, p in named:
        full = p.full_tensor() if hasattr(p, "full_tensor") else p
        weights[name.replace("module.", "").replace("_fsdp_wrapped_module.", "")] = full.detach().float().cpu().clone()
    return weights


def clipper(model: nn.Module, optimizer: Any, clip: str = "exact") -> Callable[[], Any]:
    """How gradients are clipped: "exact" (float64, mixed meshes, too), "torch", "shared" (by the schedule), "none"."""

    def exact() -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        total = sum((g.full_tensor() if hasattr(g, "full_tensor") else g).double().square().sum() for g in grads)
        factor = min(1.0, MAX_NORM / (total.sqrt().item() + 1e-6))
        for g in grads:
            g.mul_(factor)

    return {
        "exact": exact,
        "torch": lambda: nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM),
        "shared": lambda: schedule_of(optimizer).clip_grad_norm_(MAX_NORM),
        "none": lambda: None,
    }[clip]


# DistributedDataParallel


def ddp(
    *,
    optim: str = "adams",
    micros: int = 1,
    clip: str = "torch",
    unused: bool = False,
    adam_options: dict | None = None,
    **options: Any,
) -> dict:
    model = nn.parallel.DistributedDataParallel(build_model(unused=unused), **options)
    optimizer = build_optimizer(model.module, optim, **(adam_options or {}))
    probe = Probe(optimizer)
    train(model, optimizer, clipper(model, optimizer, clip), probe=probe, micros=micros, no_sync=model.no_sync)
    return probe.report(whole_weights(model.module.named_parameters()))


# FSDP


def build_fsdp1(
    *, strategy: str = "FULL_SHARD", use_orig_params: bool = True, wrap: bool = True, ignore: bool = False
) -> tuple[Any, list[Tensor]]:
    """The wrapped model, and the parameters that FSDP was told to ignore."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from transformers.models.bert.modeling_bert import BertLayer

    options: dict[str, Any] = {}
    if "HYBRID" in strategy:
        shape = (2, dist.get_world_size() // 2)
        options["device_mesh"] = dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    if wrap:
        options["auto_wrap_policy"] = partial(transformer_auto_wrap_policy, transformer_layer_cls={BertLayer})
    source = build_model()
    ignored = [source.classifier] if ignore else []
    model = FullyShardedDataParallel(
        source,
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=use_orig_params,
        ignored_modules=ignored,
        device_id=torch.device("cpu"),
        **options,
    )
    ignored_params = [p for module in ignored for p in module.parameters()]
    for p in ignored_params:
        p.register_hook(_mean_over_ranks)
    return model, ignored_params


def fsdp1(
    *,
    attach: bool = True,
    optim: str = "adams",
    clip: str = "exact",
    adam_options: dict | None = None,
    **options: Any,
) -> dict:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, ignored = build_fsdp1(**options)
    one_group = not options.get("use_orig_params", True)
    optimizer = build_optimizer(model, optim, one_group=one_group, **(adam_options or {}))
    if attach:
        hf_swd.attach(optimizer, model)
    probe = Probe(optimizer)
    clips = {
        "exact": _clip_fsdp1(model, ignored),
        "shared": lambda: optimizer.clip_grad_norm_(MAX_NORM),
        "none": lambda: None,
    }
    train(model, optimizer, clips[clip], probe=probe)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return probe.report(whole_weights(model.named_parameters()))


def fsdp1_refused(**options: Any) -> dict:
    """Without attach: the message, and the weights it left."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, _ = build_fsdp1(**options)
    optimizer = build_optimizer(model, one_group=not options.get("use_orig_params", True))
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        before = whole_weights(model.named_parameters())
    message = message_of(lambda: train(model, optimizer, lambda: None, last=1))
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {"message": message, "before": before, "weights": whole_weights(model.named_parameters())}


def message_of(run: Callable[[], Any]) -> str:
    """The message of the error with which `run` must stop."""
    try:
        run()
    except (RuntimeError, ValueError) as error:
        return str(error)
    raise AssertionError("it went on")


def _mean_over_ranks(grad: Tensor) -> Tensor:
    grad = grad.clone()
    dist.all_reduce(grad)
    return grad / dist.get_world_size()


def _clip_fsdp1(model: Any, ignored: list[Tensor]) -> Callable[[], None]:
    # FSDP1's own clip_grad_norm_ leaves out what it ignores on all ranks but counts it on each: so by hand where there
    # is any.
    def clip() -> None:
        if not ignored:
            model.clip_grad_norm_(MAX_NORM)
            return
        ids = {id(p) for p in ignored}
        managed = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in ids]
        total = torch.stack(
            [torch.zeros((), dtype=torch.float64), *(g.double().square().sum() for g in managed)]
        ).sum()
        dist.all_reduce(total)
        total += sum(p.grad.double().square().sum() for p in ignored)
        factor = min(1.0, MAX_NORM / (total.sqrt().item() + 1e-6))
        for grad in [*managed, *(p.grad for p in ignored)]:
            grad.mul_(factor)

    return clip


def build_fsdp2(
    *, mesh: tuple[int, ...] | None = None, unsharded: tuple[str, ...] = (), mixed: bool = False, offload: bool = False
) -> nn.Module:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    mesh = tuple(mesh or (dist.get_world_size(),))
    model = build_model()
    device_mesh = dist.init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :])
    ignored = {p for n, p in model.named_parameters() if n.startswith(tuple(unsharded))} if unsharded else set()
    for p in ignored:
        p.register_hook(_mean_over_ranks)
    options: dict[str, Any] = {"mesh": device_mesh, "ignored_params": ignored}
    if mixed:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for layer in model.bert.encoder.layer:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def fsdp2(*, clip: str = "exact", optim: str = "adams", adam_options: dict | None = None, **options: Any) -> dict:
    model = build_fsdp2(**options)
    optimizer = build_optimizer(model, optim, **(adam_options or {}))
    probe = Probe(optimizer)
    train(model, optimizer, clipper(model, optimizer, clip), probe=probe)
    return probe.report(whole_weights(model.named_parameters()))


# Tensor parallelism


def tensor_parallel(
    *, data: int = 1, clip: str = "exact", optim: str = "adams", adam_options: dict | None = None
) -> dict:
    """The feed-forward blocks on a tp mesh, the rest replicated; with `data` > 1 all under FSDP2."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    world = dist.get_world_size()
    model = build_model()
    mesh = dist.init_device_mesh("cpu", (data, world // data), mesh_dim_names=("dp", "tp"))
    for layer in model.bert.encoder.layer:
        plan = {"intermediate.dense": ColwiseParallel(), "output.dense": RowwiseParallel()}
        parallelize_module(layer, mesh["tp"], plan)
    if data > 1:
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    optimizer = build_optimizer(model, optim, **(adam_options or {}))
    probe = Probe(optimizer)
    rank = mesh.get_local_rank("dp")
    train(model, optimizer, clipper(model, optimizer, clip), probe=probe, data_rank=rank, data_world=data)
    return probe.report(whole_weights(model.named_parameters()))


def gradient_placements(*, clip: bool, **options: Any) -> dict[str, float]:
    """Of a divided matrix, autograd may leave the gradient whole on each rank, or as addends that are still to be
    summed: what that makes of the weights and of the rms, against a plain tensor."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    world = dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    start = torch.randn(2 * world + 1, 3)  # the parts are of different sizes
    grads = torch.randn(4, *start.shape)
    whole = nn.Parameter(start.clone())
    parts = {name: nn.Parameter(distribute_tensor(start, mesh, [Shard(0)])) for name in ("replicate", "partial")}
    optimizers = {name: hf_swd.AdamS([p], lr=0.1, weight_decay=0.1, **options) for name, p in parts.items()}
    plain = hf_swd.AdamS([whole], lr=0.1, weight_decay=0.1, **options)
    errors: dict[str, float] = {}
    for grad in grads:
        whole.grad = grad.clone()
        parts["replicate"].grad = DTensor.from_local(grad.clone(), mesh, [Replicate()])
        parts["partial"].grad = DTensor.from_local(grad / world, mesh, [Partial()])
        for optimizer in (plain, *optimizers.values()):
            if clip:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        for name, p in parts.items():
            error = float((p.full_tensor() - whole).abs().max()) + abs(optimizers[name].grad_rms / plain.grad_rms - 1)
            errors[name] = max(errors.get(name, 0.0), error)
    return errors


# Optimizers that hold disjoint parts of the model


def zero_redundancy(**options: Any) -> dict:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(build_model())
    optimizer = ZeroRedundancyOptimizer(
        groups(model.module), hf_swd.AdamS, lr=LR, weight_decay=WEIGHT_DECAY, **options
    )
    probe = Probe(optimizer.optim)
    train(model, optimizer, clipper(model, optimizer, "torch"), probe=probe)
    return probe.report(whole_weights(model.module.named_parameters()))


def pipeline_stages(clip: str = "exact") -> dict:
    """Each rank optimizes every second parameter, as the stages of a pipeline do, and the others send it theirs."""
    model = build_model()
    rank, world = dist.get_rank(), dist.get_world_size()
    owners = {name: i % world for i, (name, _) in enumerate(model.named_parameters())}
    for name, p in model.named_parameters():
        p.requires_grad_(owners[name] == rank)
    optimizer = build_optimizer(model, process_group=dist.group.WORLD)
    probe = Probe(optimizer)

    def clip_and_exchange() -> None:
        if clip == "shared":
            optimizer.clip_grad_norm_(MAX_NORM)
            return
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        total = sum(g.double().square().sum() for g in grads)
        dist.all_reduce(total)
        for g in grads:
            g.mul_(min(1.0, MAX_NORM / (total.sqrt().item() + 1e-6)))

    for first in range(STEPS):
        train(model, optimizer, clip_and_exchange, probe=probe, first=first, last=first + 1, data_rank=0, data_world=1)
        for name, p in model.named_parameters():
            dist.broadcast(p.detach(), owners[name])
    return probe.report(whole_weights(model.named_parameters()))


def left_alone(call: str) -> str:
    """The last rank leaves out one call that the others make: what they are told when they have waited long enough."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    model = build_model()
    optimizer = build_optimizer(model, process_group=group)
    model(**batches(0, 1)[0]).loss.backward()
    message = ""
    if dist.get_rank() < dist.get_world_size() - 1:
        before = whole_weights(model.named_parameters())
        message = message_of({"step": optimizer.step, "clip": lambda: optimizer.clip_grad_norm_(MAX_NORM)}[call])
        assert all(torch.equal(before[n], w) for n, w in whole_weights(model.named_parameters()).items())
    dist.barrier()
    return message


# Low precision


def mixed_fsdp2(**options: Any) -> dict:
    """AdamS and AdamW on the same engine."""
    return {optim: fsdp2(mixed=True, optim=optim, **options) for optim in ("adams", "adamw")}
