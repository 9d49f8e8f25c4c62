"""Save at step 6, go on in a fresh model and optimizer: the uninterrupted run, in the processes of harness.py.

Every function that resumes saves first unless `saved` names a folder of an earlier run; [`Probe.report`] then shows
the steps after the resume.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import divided
import engines
import engines_deepspeed as ds
import task
import torch
import torch.distributed as dist
from engines import build_optimizer, clipper, whole_weights
from probe import Probe
from task import STEPS
from torch import nn

import hf_swd


HALF = STEPS // 2


def shared_folder() -> Path:
    """A new folder that all ranks know."""
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


# FSDP2 with torch.distributed.checkpoint


def fsdp2_save(*, folder: str, optim: str = "adams", options: dict | None = None, **build: Any) -> dict:
    """Train half of the steps and save."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = engines.build_fsdp2(**build)
    optimizer = build_optimizer(model, optim, **(options or {}))
    probe = Probe(optimizer)
    engines.train(model, optimizer, clipper(model, optimizer), probe=probe, last=HALF)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return probe.report({})


def fsdp2_resume(
    *,
    saved: str = "",
    optim: str = "adams",
    first_optim: str = "",
    options: dict | None = None,
    bf16_states: bool = False,
    **build: Any,
) -> dict:
    """Go on in this number of processes, which may be another than the one that saved."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    folder = saved or str(shared_folder())
    before: list = []
    if not saved:
        before = fsdp2_save(folder=folder, optim=first_optim or optim, options=options, **build)["decays"]
    model = engines.build_fsdp2(**build)
    optimizer = build_optimizer(model, optim)  # reference_steps comes with the checkpoint
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    # AdamW's checkpoint has nothing of the schedule.
    partial = (first_optim or optim) == "adamw"
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=partial))
    if bf16_states:
        for p_state in state["optimizer"]["state"].values():
            for key in ("exp_avg", "exp_avg_sq"):
                p_state[key] = p_state[key].to(torch.bfloat16).to(torch.float32)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    probe = Probe(optimizer)
    engines.train(model, optimizer, clipper(model, optimizer), probe=probe, first=HALF)
    return probe.report(whole_weights(model.named_parameters()), decays_before=before)


# Models that transformers divides, with torch.distributed.checkpoint: a Trainer writes none of their optimizer


def divided_run(*, kind: str, sizes: dict[str, Any], load: str = "", save: str = "") -> dict:
    """The first half of the run, saved, or the second half of what was saved, in this number of processes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = divided.build(kind, sizes)
    optimizer = hf_swd.AdamS(task.groups(model, task.KINDS[kind].weight_decay), lr=task.LR)
    if load:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=load)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    probe = Probe(optimizer)
    world = divided.data_world(sizes)
    rank = dist.get_rank() * world // dist.get_world_size()
    for batch in task.batches(*((HALF, STEPS) if load else (0, HALF)), kind=kind):
        model(**task.share(batch, rank, world)).loss.backward()
        optimizer.clip_grad_norm_(task.KINDS[kind].max_norm)
        optimizer.step()
        optimizer.zero_grad()
        probe.end_of_step()
    if save:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=save)
    return probe.report(whole_weights(model.named_parameters()))


def divided_resume(*, kind: str, sizes: dict[str, Any], then: dict[str, Any]) -> dict:
    """Go on in a model that is divided by the sizes `then`."""
    folder = str(shared_folder())
    before = divided_run(kind=kind, sizes=sizes, save=folder)["decays"]
    after = divided_run(kind=kind, sizes=then, load=folder)
    return {**after, "decays": before + after["decays"]}


# FSDP1


def fsdp1_resume(*, optim: str = "adams", state_type: str = "full", **build: Any) -> dict:
    """With FSDP1's own optimizer state dicts."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
    from torch.distributed.fsdp.api import (
        FullOptimStateDictConfig,
        ShardedOptimStateDictConfig,
        ShardedStateDictConfig,
    )

    sharded = (StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig())
    optimizer_configs = {
        "full": FullOptimStateDictConfig(offload_to_cpu=False),
        "sharded": ShardedOptimStateDictConfig(),
    }
    # With torch's default offload_to_cpu=True a CPU run loses moments, of AdamW as well; a full model state crashes
    # there.
    model_type = partial(
        FullyShardedDataParallel.state_dict_type, state_dict_type=sharded[0], state_dict_config=sharded[1]
    )
    optimizer_type = partial(
        FullyShardedDataParallel.state_dict_type,
        state_dict_type=StateDictType.FULL_STATE_DICT if state_type == "full" else sharded[0],
        optim_state_dict_config=optimizer_configs[state_type],
    )

    def start() -> tuple[Any, Any, Any]:
        model, _ = engines.build_fsdp1(**build)
        optimizer = build_optimizer(model, optim)
        if optim == "adams":
            hf_swd.attach(optimizer, model)
        return model, optimizer, lambda: model.clip_grad_norm_(engines.MAX_NORM)

    model, optimizer, clip = start()
    engines.train(model, optimizer, clip, last=HALF)
    with model_type(model):
        saved_model = model.state_dict()
    with optimizer_type(model):
        saved_optimizer = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    model, optimizer, clip = start()
    with model_type(model):
        model.load_state_dict(saved_model)
    with optimizer_type(model):
        optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, saved_optimizer))
    probe = Probe(optimizer)
    engines.train(model, optimizer, clip, probe=probe, first=HALF)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return probe.report(whole_weights(model.named_parameters()))


# DDP


def ddp_resume(*, bf16_states: bool = False, options: dict | None = None) -> dict:
    """`state_dict()` on every rank; with `bf16_states` the moments are stored in bfloat16."""
    model = nn.parallel.DistributedDataParallel(engines.build_model())
    optimizer = build_optimizer(model.module, **(options or {}))
    first = Probe(optimizer)
    engines.train(model, optimizer, clipper(model, optimizer, "torch"), probe=first, last=HALF)
    saved = optimizer.state_dict()
    if bf16_states:
        for state in saved["state"].values():
            state.update({key: state[key].bfloat16().float() for key in ("exp_avg", "exp_avg_sq")})
    optimizer = build_optimizer(model.module)
    optimizer.load_state_dict(saved)
    probe = Probe(optimizer)
    engines.train(model, optimizer, clipper(model, optimizer, "torch"), probe=probe, first=HALF)
    return probe.report(whole_weights(model.module.named_parameters()), decays_before=first.decays)


# DeepSpeed


def zero_save(
    stage: int, *, folder: str, optim: str = "adams", options: dict | None = None, **engine_options: Any
) -> dict:
    engine = ds.initialize(ds.config(stage, **engine_options), optim=optim, **(options or {}))
    probe = Probe(ds.base_optimizer(engine))
    ds.train(engine, probe, last=HALF)
    engine.save_checkpoint(folder, tag="half")
    dist.barrier()
    return probe.report(ds.weights(engine))


def zero_resume(
    stage: int,
    *,
    saved: str = "",
    universal: bool = False,
    optim: str = "adams",
    first_optim: str = "",
    attach: str = "before",
    options: dict | None = None,
    **engine_options: Any,
) -> dict:
    """`attach` before or after the checkpoint is loaded."""
    folder = saved or str(shared_folder())
    first: dict = {"decays": []}
    if not saved:
        first = zero_save(stage, folder=folder, optim=first_optim or optim, options=options, **engine_options)
    ds_config = ds.config(stage, **engine_options)
    if universal:
        ds_config["checkpoint"] = {"load_universal": True}
    groups = {"split": True} if (options or {}).get("split") else {}  # reference_steps comes with the checkpoint
    engine = ds.initialize(ds_config, optim=optim, attach=attach == "before", **groups)
    engine.load_checkpoint(folder, tag="half_universal" if universal else "half")
    if attach == "after":
        hf_swd.attach(engine)
    probe = Probe(ds.base_optimizer(engine))
    ds.train(engine, probe, first=HALF)
    return probe.report(ds.weights(engine), decays_before=first["decays"])


def zero_resume_and_uninterrupted(stage: int, **options: Any) -> dict:
    return {"resumed": zero_resume(stage, **options), "whole": ds.zero(stage, **options)}
