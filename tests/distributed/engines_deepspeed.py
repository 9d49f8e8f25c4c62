"""The run of `task.py` under DeepSpeed's engine, without accelerate."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from engines import Weights, build_optimizer, message_of
from probe import Probe
from task import GLOBAL_BATCH, LR, MAX_NORM, STEPS, WEIGHT_DECAY, batches, build_model, groups, share
from torch import nn

import hf_swd


def config(
    stage: int,
    *,
    dtype: str = "fp32",
    clip: bool = True,
    micros: int = 1,
    grad_accum_dtype: str | None = None,
    sub_group: int = 0,
    offload: str | None = None,
    force_cpu_adam: bool = True,
    autotp: int = 1,
    **zero: Any,
) -> dict[str, Any]:
    world = dist.get_world_size() // autotp
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // (world * micros),
        "gradient_accumulation_steps": micros,
        "gradient_clipping": MAX_NORM if clip else 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20000, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": force_cpu_adam,
        "steps_per_print": 10**9,
    }
    if "zenflow" in zero:
        result["optimizer"] = {"type": "AdamW", "params": {"lr": LR}}  # ZenFlow takes its options from here
    if autotp > 1:
        result["tensor_parallel"] = {"autotp_size": autotp}
    if sub_group:
        result["zero_optimization"]["sub_group_size"] = sub_group
    if offload == "nvme":
        path = tempfile.mkdtemp()
        result["zero_optimization"]["offload_optimizer"] = {"device": "nvme", "nvme_path": path, "buffer_count": 4}
        result["aio"] = {"block_size": 131072, "queue_depth": 8, "single_submit": False, "overlap_events": False}
    elif offload:
        result["zero_optimization"].setdefault("offload_optimizer", {})["device"] = offload
    if dtype == "bf16":
        result["bf16"] = {"enabled": True}
    elif dtype == "fp16":
        _allow_fp16_on_cpu()
        # So high that the first steps overflow.
        result["fp16"] = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}
    if grad_accum_dtype:
        result["data_types"] = {"grad_accum_dtype": grad_accum_dtype}
    return result


def _allow_fp16_on_cpu() -> None:
    """DeepSpeed's CPU backend says it has no fp16; what it needs for it works, slowly."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def ds_optimizer(model: nn.Module, optim: str, **options: Any) -> torch.optim.Optimizer:
    """ "cpu_adams" and "cpu_adamw" are what accelerate makes of AdamS and AdamW under offload."""
    if not optim.startswith("cpu_"):
        return build_optimizer(model, optim, **options)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    # DeepSpeed's Adam on the groups of an optimizer that is then dropped.
    source = build_optimizer(model, optim.removeprefix("cpu_"), **options)
    return DeepSpeedCPUAdam(source.param_groups, lr=LR, weight_decay=WEIGHT_DECAY, adamw_mode=True)


def initialize(
    ds_config: dict[str, Any] | str,
    *,
    optim: str = "adams",
    attach: bool = True,
    model: nn.Module | None = None,
    **options: Any,
) -> Any:
    import deepspeed

    model = build_model() if model is None else model
    optimizer = ds_optimizer(model, optim, **options)
    engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if attach and "adamw" not in optim:
        hf_swd.attach(wrapped)
    return engine


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    optimizer = engine.optimizer
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def train(engine: Any, probe: Probe | None = None, *, first: int = 0, last: int = STEPS, micros: int = 1) -> int:
    """Train on each batch until a step is applied; returns how many were skipped for an overflow."""
    rank, world = dist.get_rank(), dist.get_world_size()
    skipped = 0
    for batch in batches(first, last):
        applied = False
        while not applied:
            for micro in range(micros):
                engine.backward(engine(**share(batch, rank, world, micro, micros)).loss)
                engine.step()
            applied = engine.was_step_applied()
            skipped += not applied
        if probe is not None:
            probe.end_of_step()
    return skipped


def weights(engine: Any) -> Weights:
    """Full-precision weights: the partitions' master copies, gathered."""
    from deepspeed.utils import safe_get_full_fp32_param

    result = {}
    for name, p in engine.module.named_parameters():
        full = safe_get_full_fp32_param(p) if engine.zero_optimization() or hasattr(p, "_hp_mapping") else p
        result[name] = full.detach().float().cpu().clone()
    return result


def zero(
    stage: int,
    *,
    expect: str = "",
    optim: str = "adams",
    micros: int = 1,
    config_file: bool = False,
    adam_options: dict | None = None,
    **options: Any,
) -> dict:
    """A run; `expect` is the class of DeepSpeed's wrapper that it must have made: no test passes by another engine."""
    ds_config: Any = config(stage, micros=micros, **options)
    with tempfile.TemporaryDirectory() as folder:
        if config_file:
            path = Path(folder) / "ds_config.json"
            path.write_text(json.dumps(ds_config))
            ds_config = str(path)
        engine = initialize(ds_config, optim=optim, **(adam_options or {}))
    assert not expect or type(engine.optimizer).__name__ == expect, type(engine.optimizer).__name__
    assert engine.zero_optimization_stage() == stage
    optimizer = base_optimizer(engine)
    probe = Probe(optimizer)
    train(engine, probe, micros=micros)
    return probe.report(weights(engine), optimizer=type(optimizer).__name__)


def both(stage: int, *, cpu_adam: bool = False, **options: Any) -> dict:
    """AdamS and AdamW on the same engine."""
    prefix = "cpu_" if cpu_adam else ""
    return {optim: zero(stage, optim=prefix + optim, **options) for optim in ("adams", "adamw")}


def zero_fp16(stage: int, **options: Any) -> dict:
    """As [`both`], in fp16 with a loss scale that is too large at first; with what the skipped steps did to AdamS."""
    result: dict[str, Any] = {}
    for optim in ("adams", "adamw"):
        engine = initialize(config(stage, dtype="fp16", **options), optim=optim)
        probe = Probe(base_optimizer(engine))
        before = weights(engine)
        engine.backward(engine(**share(batches(0, 1)[0], dist.get_rank(), dist.get_world_size())).loss)
        engine.step()
        assert not engine.was_step_applied(), "the first step was to overflow"
        skip = probe.report(weights(engine))
        unchanged = all(torch.equal(before[n], w) for n, w in skip["weights"].items())
        skipped = 1 + train(engine, probe)
        after_skip = skip["step_count"]
        result[optim] = probe.report(
            weights(engine), skipped=skipped, unchanged=unchanged, step_count_after_skip=after_skip
        )
    return result


def refused(
    stage: int,
    *,
    attach: bool = True,
    optim: str = "adams",
    different_betas: bool = False,
    amsgrad: bool = False,
    own_clipping: bool = False,
    reported_version: str = "",
    kind: str = "bert",
    **options: Any,
) -> dict:
    """
    A configuration that must stop at `attach` or in the first step: the message, the weights before and after.

    `reported_version` only makes DeepSpeed say that it is another version.
    """
    model = build_model(kind=kind)
    if different_betas or amsgrad:
        params = groups(model)
        if different_betas:
            params[1]["betas"] = (0.9, 0.95)
        optimizer = hf_swd.AdamS(params, lr=LR, weight_decay=WEIGHT_DECAY, amsgrad=amsgrad)
    else:
        optimizer = ds_optimizer(model, optim)
    import deepspeed

    with _super_offload_on_cpu():
        engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, **options))
    before = weights(engine)

    def run() -> None:
        if attach:
            with contextlib.ExitStack() as stack:
                if reported_version:
                    stack.enter_context(mock.patch("importlib.metadata.version", return_value=reported_version))
                hf_swd.attach(wrapped)
        if own_clipping:
            base_optimizer(engine).clip_grad_norm_(MAX_NORM)
        (batch,) = batches(last=1, kind=kind)
        engine.backward(engine(**batch).loss)
        engine.step()

    message = message_of(run)
    return {"message": message, "before": before, "weights": weights(engine)}


def _super_offload_on_cpu() -> Any:
    """SuperOffload asks for CUDA when it is built, and needs it to train, but not to be refused."""
    return mock.patch("deepspeed.runtime.superoffload.superoffload_stage3._validate_superoffload_accelerator")


def refused_experts(stage: int, *, attach: bool = True) -> dict:
    """DeepSpeed's expert-parallel layers."""
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    model = nn.Sequential(nn.Linear(8, 8))
    model.experts = MoE(8, nn.Linear(8, 8), num_experts=dist.get_world_size(), ep_size=dist.get_world_size())
    params = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    optimizer = hf_swd.AdamS(params, lr=LR, weight_decay=WEIGHT_DECAY)
    ds_config = config(stage, dtype="bf16" if stage else "fp32")
    engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    before = {n: p.detach().float().clone() for n, p in engine.module.named_parameters()}

    def run() -> None:
        if attach:
            hf_swd.attach(wrapped)
        x = torch.randn(4, 8)
        engine.backward(engine(x)[0].square().mean())
        engine.step()

    message = message_of(run)
    return {
        "message": message,
        "before": before,
        "weights": {n: p.detach().float() for n, p in engine.module.named_parameters()},
    }
