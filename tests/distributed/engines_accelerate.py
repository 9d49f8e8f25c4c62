"""The run of `task.py` in a bare accelerate loop, under each engine that accelerate can build."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engines import Weights, build_optimizer, whole_weights
from task import GLOBAL_BATCH, MAX_NORM, STEPS, batches, build_model, initial_weights, share
from torch import nn

import hf_swd


sys.path.insert(0, str(Path(__file__).parent / "cpu_shim"))
import pretend_gpus  # noqa: E402


# The engines: how the Accelerator is told, and how the prepared model shows that it is this engine.


def _fsdp(version: int, **options: Any) -> dict[str, Any]:
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False,
        **({"use_orig_params": True, "sync_module_states": False} if version == 1 else {}),
        **options,
    )
    return {"fsdp_plugin": plugin}


def _hsdp() -> dict[str, Any]:
    from accelerate import ParallelismConfig

    replicas = dist.get_world_size() // 2
    sizes = {"dp_replicate_size": replicas, "dp_shard_size": 2}
    return {**_fsdp(2), "parallelism_config": ParallelismConfig(**sizes)}


def zero_config(stage: int, offload: bool = False) -> dict[str, Any]:
    """Of DeepSpeed; batch sizes, accumulation and clipping are left to whoever uses it."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 20000}
    if stage == 3:
        zero["sub_group_size"] = 2000  # several inner steps of the optimizer per step
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {"zero_optimization": zero, "steps_per_print": 10**9}


def _zero(stage: int, micros: int, offload: bool) -> dict[str, Any]:
    from accelerate import DeepSpeedPlugin

    config = {
        **zero_config(stage, offload),
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // (dist.get_world_size() * micros),
        "gradient_accumulation_steps": micros,
        "gradient_clipping": MAX_NORM,
    }
    return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}


def _arguments(engine: str, micros: int) -> dict[str, Any]:
    if engine == "ddp":
        return {}
    if engine == "hsdp":
        return _hsdp()
    if engine.startswith("fsdp"):
        return _fsdp(int(engine[4]))
    return _zero(int(engine[4]), micros, engine.endswith("_offload"))


def check_engine(engine: str, model: nn.Module, optimizer: Any) -> None:
    """accelerate may quietly build another engine than was asked for; then nothing would be tested."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if engine.startswith("zero"):
        assert model.zero_optimization_stage() == int(engine[4]), model.zero_optimization_stage()
        base = optimizer
        while getattr(base, "optimizer", None) is not None:
            base = base.optimizer
        assert (type(base).__name__ == "DeepSpeedCPUAdam") == engine.endswith("_offload"), type(base)
        assert bool(model.zero_cpu_offload()) == engine.endswith("_offload")
    elif engine == "fsdp1":
        assert isinstance(model, FullyShardedDataParallel)
        assert len(FullyShardedDataParallel.fsdp_modules(model)) == 3
    elif engine == "ddp":
        assert isinstance(model, nn.parallel.DistributedDataParallel)
    else:
        assert isinstance(model, FSDPModule)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(isinstance(p, DTensor) and p.device_mesh.ndim == (2 if engine == "hsdp" else 1) for p in params)
    assert dist.get_world_size() > 1


def reset() -> None:
    """accelerate keeps its engine in class attributes and environment variables; the next variant wants another."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [n for n in os.environ if n.startswith(("FSDP_", "PARALLELISM_CONFIG_"))] + [
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE",
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_PARALLELISM_CONFIG",
        "ACCELERATE_MIXED_PRECISION",
    ]:
        os.environ.pop(name, None)


def prepared(
    engine: str, *, optim: str = "adams", attach: bool = True, micros: int = 1, **adam_options: Any
) -> tuple[Any, nn.Module, Any]:
    """Accelerator, model and optimizer as a user has them after `accelerator.prepare`."""
    from accelerate import Accelerator

    pretend_gpus.install()
    reset()
    accelerator = Accelerator(gradient_accumulation_steps=micros, **_arguments(engine, micros))
    model = build_model()
    optimizer = build_optimizer(model, optim, **adam_options)
    model, optimizer = accelerator.prepare(model, optimizer)
    check_engine(engine, model, optimizer)
    if engine.startswith("zero3"):
        assert len(optimizer.optimizer.fp16_groups) > len(optimizer.param_groups), "more inner steps than groups"
    if attach:
        hf_swd.attach(optimizer, model)
    return accelerator, model, optimizer


def train(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    *,
    first: int = 0,
    last: int = STEPS,
    micros: int = 1,
) -> None:
    for batch in batches(first, last):
        for micro in range(micros):
            with accelerator.accumulate(model):
                loss = model(**share(batch, accelerator.process_index, accelerator.num_processes, micro, micros)).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()


def weights(model: nn.Module) -> Weights:
    """Whole weights in full precision: under ZeRO the partitions' master copies, gathered."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if hasattr(model, "zero_optimization_stage"):
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param if model.zero_optimization() else lambda p: p
        return whole_weights((n, full(p)) for n, p in model.module.named_parameters())
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return whole_weights(model.named_parameters())
    return whole_weights(model.named_parameters())


def run(engine: str, *, micros: int = 1, **options: Any) -> Weights:
    accelerator, model, optimizer = prepared(engine, micros=micros, **options)
    train(accelerator, model, optimizer, micros=micros)
    return weights(model)


def refused(engine: str, **options: Any) -> dict[str, Any]:
    """The error of an optimizer that nobody attached, and whether the weights are as they were."""
    accelerator, model, optimizer = prepared(engine, attach=False, **options)
    try:
        train(accelerator, model, optimizer)
    except RuntimeError as error:
        message = str(error)
    else:
        message = ""
    after = weights(model)
    return {"message": message, "unchanged": all(torch.equal(after[n], w) for n, w in initial_weights().items())}


@contextlib.contextmanager
def shared_folder() -> Iterator[str]:
    """A new folder that all ranks know, gone afterwards."""
    with tempfile.TemporaryDirectory() as own:
        name: list[Any] = [own]
        dist.broadcast_object_list(name)
        yield name[0]
        dist.barrier()


def resumed(engine: str, *, at: int = 6, **options: Any) -> Weights:
    """The run, broken off after `at` steps; new objects go on with it from what `accelerator.save_state` wrote."""
    with shared_folder() as folder:
        accelerator, model, optimizer = prepared(engine, **options)
        train(accelerator, model, optimizer, last=at)
        accelerator.save_state(folder)
        dist.barrier()
        accelerator, model, optimizer = prepared(engine, **options)
        accelerator.load_state(folder)
        train(accelerator, model, optimizer, first=at)
        return weights(model)
