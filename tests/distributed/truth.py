"""Tasks of test_checkpoint_truth.py: what an engine writes into the optimizer between two steps is what counts.

A small model, one of whose layers misses gradients at some steps, without clipping; some runs have gradients scaled by
`OTHER`, so that their second moments are plainly another run's. Every function is called on all ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines_deepspeed as ds
import torch
import torch.distributed as dist
from checkpoints import shared_folder
from engines import whole_weights
from torch import Tensor, nn

import hf_swd


STEPS = 12
LR = 1e-2
WEIGHT_DECAY = 0.3
CONSTANT_DECAY = 1.0
"""AdamW's, where it starts the run: 1 % per step."""
OTHER = 3.0
GLOBAL_BATCH = 8

Batch = dict[str, Any]


class Model(nn.Module):
    """A loss; parts of it are too small for four ranks, and `side` is not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 32)
        self.second = nn.Linear(32, 3)
        self.side = nn.Linear(7, 3)

    def forward(self, x: Tensor, y: Tensor, side: bool) -> Tensor:
        out = self.second(torch.tanh(self.first(x)))
        if side:
            out = out + self.side(x)
        return (out - y).square().mean()


def build(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(3)
    return Model().to(dtype)


def batch_of(step: int, always: bool) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(GLOBAL_BATCH, 7, generator=generator)
    y = 3 * torch.randn(GLOBAL_BATCH, 3, generator=generator)
    return {"x": x, "y": y, "side": always or step % 3 != 1}


def share(batch: Batch) -> Batch:
    size = GLOBAL_BATCH // dist.get_world_size()
    own = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    return {**batch, "x": batch["x"][own], "y": batch["y"][own]}


def groups(model: nn.Module, decay: float, one_group: bool = False) -> list[dict[str, Any]]:
    params = list(model.parameters())
    if one_group:
        return [{"params": params, "weight_decay": decay}]
    matrices, vectors = ([p for p in params if (p.ndim > 1) == wanted] for wanted in (True, False))
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def optimizer_of(model: nn.Module, optim: str, *, one_group: bool = False, **options: Any) -> torch.optim.Optimizer:
    """ "adams", or "adamw" with a constant decay of its own."""
    if optim == "adams":
        return hf_swd.AdamS(groups(model, WEIGHT_DECAY, one_group), lr=LR, **options)
    return torch.optim.AdamW(groups(model, CONSTANT_DECAY, one_group), lr=LR)


class Trace:
    """After each step: (gradient rms, effective decay) of AdamS, the weights of all."""

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Callable[[], dict[str, Tensor]]) -> None:
        self.optimizer, self.weights = optimizer, weights
        self.steps: list[dict[str, Any]] = []

    def note(self) -> None:
        step: dict[str, Any] = {"weights": self.weights()}
        if isinstance(self.optimizer, hf_swd.AdamS):
            schedule = hf_swd.attach(self.optimizer)
            decay = float(self.optimizer.param_groups[0]["weight_decay"])
            step.update(grad_rms=self.optimizer.grad_rms, decay=decay, step_count=schedule.step_count)
        self.steps.append(step)


def train(
    run: Callable[[Batch], None], trace: Trace, first: int, last: int, *, always: bool = False
) -> list[dict[str, Any]]:
    """What `trace` noted of these steps; `run` does one."""
    begin = len(trace.steps)
    for step in range(first, last):
        run(batch_of(step, always))
        trace.note()
    return trace.steps[begin:]


def lambdas(groups: Sequence[dict[str, Any]]) -> list[float]:
    return [float(group["weight_decay"]) for group in groups]


# DDP and FSDP2


class Torch:
    """Model and optimizer under an engine of torch."""

    def __init__(self, engine: str, optim: str, **options: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        self.model = build()
        if engine == "fsdp2":
            mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
            self.wrapped = fully_shard(self.model, mesh=mesh)
        else:
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, find_unused_parameters=True)
        self.optimizer = optimizer_of(self.model, optim, **options)
        self.trace = Trace(self.optimizer, lambda: whole_weights(self.model.named_parameters()))

    def train(self, first: int, last: int, scale: float = 1.0) -> list[dict[str, Any]]:
        return train(partial(self.step, scale), self.trace, first, last)

    def step(self, scale: float, batch: Batch) -> None:
        (scale * self.wrapped(**share(batch))).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self, **options: Any) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer, options=StateDictOptions(**options))
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: Any, **options: Any) -> dict[str, Any]:
        import torch.distributed.checkpoint as dcp

        state = self.state(**options)
        dcp.save(state, checkpoint_id=str(folder))
        return state

    def load(self, folder: Any, *, partial_load: bool = False, **options: Any) -> None:
        import torch.distributed.checkpoint as dcp

        state = self.state(**options)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=partial_load)
        dcp.load(state, checkpoint_id=str(folder), planner=planner)
        self.set_state(state, **options)

    def set_state(self, state: dict[str, Any], **options: Any) -> None:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        # Not set_state_dict, which hangs where one rank alone has a state.
        set_model_state_dict(self.model, state["model"], options=StateDictOptions(**options))
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=StateDictOptions(**options))


def fsdp2_part(
    *, first: int, last: int, load: str = "", save: str = "", options: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Some steps of a run that goes through checkpoints, in this number of processes."""
    run = Torch("fsdp2", "adams", **(options or {}))
    if load:
        run.load(load)
    noted = run.train(first, last)
    if save:
        run.save(save)
    return noted


def fsdp2_saved_before_the_first_step(*, options: dict[str, Any], optim: str = "adams") -> dict[str, Any]:
    folder = shared_folder()
    live = Torch("fsdp2", optim, **options)
    live.save(folder)
    whole = live.train(0, STEPS)
    resumed = Torch("fsdp2", optim)
    resumed.load(folder)
    return {"whole": whole, "resumed": resumed.train(0, STEPS)}


def fsdp2_flattened() -> dict[str, Any]:
    """`flatten_optimizer_state_dict`, of which the loader looks for every key of the live groups."""
    folder = shared_folder()
    live = Torch("fsdp2", "adams")
    live.train(0, 6)
    live.save(folder, flatten_optimizer_state_dict=True)
    whole = live.train(6, 9)
    resumed = Torch("fsdp2", "adams")
    resumed.load(folder, flatten_optimizer_state_dict=True)
    return {"whole": whole, "resumed": resumed.train(6, 9)}


def fsdp2_full(*, broadcast: bool) -> dict[str, Any]:
    """By whole tensors, which every rank has or only the first."""
    live = Torch("fsdp2", "adams")
    live.train(0, 6)
    saved = copy.deepcopy(live.state(full_state_dict=True, cpu_offload=broadcast))
    whole = live.train(6, 9)
    resumed = Torch("fsdp2", "adams")
    if broadcast and dist.get_rank() > 0:
        saved = {"model": {}, "optimizer": {}}
    resumed.set_state(saved, full_state_dict=True, broadcast_from_rank0=broadcast)
    return {"whole": whole, "resumed": resumed.train(6, 9)}


def fsdp2_state_dict_on_one_rank() -> list[dict[str, Any]]:
    """Someone has replaced the moments, and one rank alone looks at the state."""
    run = Torch("fsdp2", "adams")
    noted = run.train(0, 3)
    for state in run.optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].clone()
    if dist.get_rank() == 0:
        run.optimizer.state_dict()
    return noted + run.train(3, 6)


def torch_resumed(engine: str, *, optim: str = "adams", options: dict[str, Any] | None = None) -> dict[str, Any]:
    """A whole run, and a second one that goes on from its checkpoint of step 6."""
    live = Torch(engine, optim, **(options or {}))
    folder = shared_folder()
    live.train(0, 6)
    if engine == "fsdp2":
        live.save(folder)
    else:
        saved = copy.deepcopy([live.model.state_dict(), live.optimizer.state_dict()])
    whole = live.train(6, STEPS)
    again = Torch(engine, optim)
    if engine == "fsdp2":
        again.load(folder)
    else:
        again.model.load_state_dict(saved[0])
        again.optimizer.load_state_dict(saved[1])
    return {"whole": whole, "resumed": again.train(6, STEPS)}


def torch_rolled_back() -> dict[str, Any]:
    """DCP into a live optimizer: back to step 3, and to the same step number of another run."""
    live = Torch("fsdp2", "adams")
    folder = shared_folder()
    live.train(0, 3)
    live.save(folder / "3")
    live.train(3, 6)
    live.save(folder / "6")
    live.load(folder / "3")
    back = live.train(3, 6)
    other = Torch("fsdp2", "adams")
    other.train(0, 6, scale=OTHER)
    other.load(folder / "6")
    return {"back": back, "same_step": other.train(6, 9)}


# ZeroRedundancyOptimizer


class Redundant:
    """torch's ZeroRedundancyOptimizer, which writes a checkpoint into state and groups of the AdamS inside by
    itself."""

    def __init__(self, optim: str, **options: Any) -> None:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        self.model = build()
        self.wrapped = nn.parallel.DistributedDataParallel(self.model)
        kind, decay = (hf_swd.AdamS, WEIGHT_DECAY) if optim == "adams" else (torch.optim.AdamW, CONSTANT_DECAY)
        self.optimizer = ZeroRedundancyOptimizer(groups(self.model, decay), kind, lr=LR, weight_decay=decay, **options)
        self.trace = Trace(self.optimizer.optim, lambda: whole_weights(self.model.named_parameters()))

    def train(self, first: int, last: int, scale: float = 1.0) -> list[dict[str, Any]]:
        return train(partial(self.step, scale), self.trace, first, last, always=True)

    def step(self, scale: float, batch: Batch) -> None:
        (scale * self.wrapped(**share(batch))).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> list[Any]:
        self.optimizer.consolidate_state_dict(to=0)
        state = [self.optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(state)
        return copy.deepcopy([self.model.state_dict(), *state])

    def load(self, state: list[Any]) -> None:
        model, optimizer = copy.deepcopy(state)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


def redundant(*, optim: str = "adams", **options: Any) -> dict[str, Any]:
    """As [`zero_universal`]."""
    live = Redundant(optim, **options)
    whole = live.train(0, 3)
    third = live.state()
    whole += live.train(3, 6)
    sixth = live.state()
    whole += live.train(6, 9)
    live.load(third)
    result = {"whole": whole, "back": live.train(3, 6), "lambdas": lambdas(sixth[1]["param_groups"])}
    for part, steps in (("same_step", 6), ("fresh", 0)):
        other = Redundant(optim, **options)
        other.train(0, steps, scale=OTHER)
        other.load(sixth)
        result[part] = other.train(6, 9)
    return result


# FSDP1


class Fsdp1:
    """Model and optimizer under FSDP1, all parameters in one group."""

    def __init__(self, optim: str, use_orig_params: bool, **options: Any) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        self.model = FullyShardedDataParallel(
            build(), use_orig_params=use_orig_params, device_id=torch.device("cpu"), sync_module_states=False
        )
        self.optimizer = optimizer_of(self.model, optim, one_group=True, **options)
        if optim == "adams":
            hf_swd.attach(self.optimizer, self.model)
        self.trace = Trace(self.optimizer, self.weights)

    def weights(self) -> dict[str, Tensor]:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
            return whole_weights(self.model.named_parameters())

    def train(self, first: int, last: int) -> list[dict[str, Any]]:
        return train(self.step, self.trace, first, last, always=True)

    def step(self, batch: Batch) -> None:
        self.model(**share(batch)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def types(self, state_type: str) -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
        from torch.distributed.fsdp.api import (
            FullOptimStateDictConfig,
            ShardedOptimStateDictConfig,
            ShardedStateDictConfig,
        )

        full = state_type == "full"
        return FullyShardedDataParallel.state_dict_type(
            self.model,
            StateDictType.FULL_STATE_DICT if full else StateDictType.SHARDED_STATE_DICT,
            None if full else ShardedStateDictConfig(),
            # torch's default offload_to_cpu=True loses moments of AdamW on a CPU.
            FullOptimStateDictConfig(offload_to_cpu=False)
            if full
            else ShardedOptimStateDictConfig(offload_to_cpu=False),
        )

    def optimizer_state(self, state_type: str) -> dict[str, Any]:
        with self.types(state_type):
            return copy.deepcopy(type(self.model).optim_state_dict(self.model, self.optimizer))

    def load(self, weights: dict[str, Tensor], state: dict[str, Any], state_type: str) -> None:
        fsdp = type(self.model)
        with fsdp.summon_full_params(self.model), torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name.replace("_fsdp_wrapped_module.", "")])
        with self.types(state_type):
            self.optimizer.load_state_dict(fsdp.optim_state_dict_to_load(self.model, self.optimizer, state))


def fsdp1_resumed(
    *, before: bool, after: bool, state_type: str, optim: str = "adams", options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """From one setting of `use_orig_params` to one."""
    live = Fsdp1(optim, before, **(options or {}))
    live.train(0, 6)
    weights, state = live.weights(), live.optimizer_state(state_type)
    whole = live.train(6, STEPS)
    again = Fsdp1(optim, after)
    again.load(weights, state, state_type)
    return {"whole": whole, "resumed": again.train(6, STEPS)}


def fsdp1_between_ddp(*, use_orig_params: bool, to_ddp: bool, optim: str = "adams") -> dict[str, Any]:
    """From DDP to FSDP1, or back, by a full optimizer state dict with the names of parameters."""
    from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

    def plain() -> SimpleNamespace:
        model = build()
        optimizer = optimizer_of(model, optim, one_group=True)
        trace = Trace(optimizer, lambda: whole_weights(model.named_parameters()))
        wrapped = nn.parallel.DistributedDataParallel(model)

        def step(batch: Batch) -> None:
            wrapped(**share(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return SimpleNamespace(model=model, optimizer=optimizer, train=partial(train, step, trace, always=True))

    sharded, whole = Fsdp1(optim, use_orig_params), plain()
    rekey = FullyShardedDataParallel.rekey_optim_state_dict
    if to_ddp:
        sharded.train(0, 6)
        state = rekey(sharded.optimizer_state("full"), OptimStateKeyType.PARAM_ID, whole.model)
        with torch.no_grad():
            for name, p in whole.model.named_parameters():
                p.copy_(sharded.weights()[name])
        whole.optimizer.load_state_dict(state)
        return {"whole": sharded.train(6, STEPS), "resumed": whole.train(6, STEPS)}
    whole.train(0, 6)
    weights = whole_weights(whole.model.named_parameters())
    state = copy.deepcopy(whole.optimizer.state_dict())
    state = rekey(state, OptimStateKeyType.PARAM_NAME, whole.model)
    sharded.load(weights, state, "full")
    return {"whole": whole.train(6, STEPS), "resumed": sharded.train(6, STEPS)}


# DeepSpeed


class Zero:
    """Model and optimizer under DeepSpeed; checkpoints are loaded as universal ones if `universal`."""

    def __init__(
        self, stage: int, optim: str, *, universal: bool = False, config: dict[str, Any] | None = None, **options: Any
    ) -> None:
        import deepspeed

        ds_config = ds.config(stage, clip=False, **(config or {}))
        if universal:
            ds_config["checkpoint"] = {"load_universal": True}
        model = build()
        self.engine, wrapped, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer_of(model, optim, **options), config=ds_config
        )
        if optim == "adams":
            hf_swd.attach(wrapped)
        self.optimizer = ds.base_optimizer(self.engine)
        self.trace = Trace(self.optimizer, lambda: ds.weights(self.engine))

    def train(self, first: int, last: int, scale: float = 1.0) -> list[dict[str, Any]]:
        return train(partial(self.step, scale), self.trace, first, last, always=True)

    def step(self, scale: float, batch: Batch) -> None:
        batch = share(batch)
        if self.engine.bfloat16_enabled():
            batch.update({key: batch[key].bfloat16() for key in "xy"})
        self.engine.backward(scale * self.engine(**batch))
        self.engine.step()

    def save(self, folder: Path, tag: str) -> None:
        self.engine.save_checkpoint(str(folder), tag=tag)
        dist.barrier()

    def save_universal(self, folder: Path, tag: str) -> None:
        from deepspeed.checkpoint import ds_to_universal

        self.save(folder, f"{tag}_saved")
        if dist.get_rank() == 0:
            arguments = {"input_folder": f"{folder}/{tag}_saved", "output_folder": f"{folder}/{tag}"}
            workers = {"num_extract_workers": 1, "num_merge_workers": 1}
            flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
            ds_to_universal.main(SimpleNamespace(**arguments, **workers, **flags))
        dist.barrier()

    def load(self, folder: Path, tag: str) -> None:
        self.engine.load_checkpoint(str(folder), tag=tag)


def zero_universal(stage: int, *, optim: str = "adams", **more: Any) -> dict[str, Any]:
    """
    Universal checkpoints of steps 3 and 6 loaded into live engines.

    `back`: the same engine at step 9, back to 3. `same_step`: another run's engine at step 6. `fresh`: a new engine.
    """
    folder = shared_folder()
    live = Zero(stage, optim, universal=True, **more)
    whole = live.train(0, 3)
    live.save_universal(folder, "3")
    whole += live.train(3, 6)
    live.save_universal(folder, "6")
    whole += live.train(6, 9)
    live.load(folder, "3")
    result = {"whole": whole, "back": live.train(3, 6)}
    other = Zero(stage, optim, universal=True, **more)
    other.train(0, 6, scale=OTHER)
    other.load(folder, "6")
    result["same_step"] = other.train(6, 9)
    fresh = Zero(stage, optim, universal=True, config=more.get("config"))
    fresh.load(folder, "6")
    result["fresh"] = fresh.train(6, 9)
    return result


def zero_universal_of_adamw(stage: int, *, live: bool) -> list[dict[str, Any]]:
    """AdamW's universal checkpoint of step 6, into a fresh engine or into one that has trained on other gradients."""
    folder = shared_folder()
    adamw = Zero(stage, "adamw")
    adamw.train(0, 6)
    adamw.save_universal(folder, "6")
    adams = Zero(stage, "adams", universal=True)
    if live:
        adams.train(0, 6, scale=OTHER)
    adams.load(folder, "6")
    # DeepSpeed has assigned AdamW's weight_decay to the groups: to AdamS it is lambda, until told otherwise.
    for group in adams.optimizer.param_groups:
        assert group["weight_decay"] in (CONSTANT_DECAY, 0.0)
        group["weight_decay"] = WEIGHT_DECAY if group["weight_decay"] else 0.0
    return adams.train(6, STEPS)


def zero_resumed(stage: int, *, optim: str = "adams", options: dict[str, Any] | None = None) -> dict[str, Any]:
    """A whole run, and a second engine that goes on from its checkpoint of step 6."""
    live = Zero(stage, optim, **(options or {}))
    folder = shared_folder()
    live.train(0, 6)
    live.save(folder, "6")
    whole = live.train(6, STEPS)
    again = Zero(stage, optim)
    again.load(folder, "6")
    return {"whole": whole, "resumed": again.train(6, STEPS)}


# AdamS -> AdamW -> AdamS


def file_there_and_back() -> dict[str, Any]:
    """By files of `torch.save`, under DDP."""
    folder = shared_folder()
    result: dict[str, Any] = {"lambdas": [], "loaded": []}
    noted: list[dict[str, Any]] = []
    for part, optim in enumerate(("adams", "adamw", "adams")):
        run = Torch("ddp", optim)
        file = folder / f"{part - 1}.pt"
        if part:
            saved = torch.load(file, weights_only=True)
            result["lambdas"].append(lambdas(saved["optimizer"]["param_groups"]))
            run.model.load_state_dict(saved["model"])
            run.optimizer.load_state_dict(saved["optimizer"])
            if optim == "adamw":
                result["loaded"] = lambdas(run.optimizer.param_groups)
        noted += run.train(4 * part, 4 * part + 4)
        saved = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
        if dist.get_rank() == 0:
            torch.save(saved, folder / f"{part}.pt")
        dist.barrier()
    return {**result, "steps": noted}


def dcp_there_and_back() -> dict[str, Any]:
    folder = shared_folder()
    result: dict[str, Any] = {"lambdas": [], "loaded": [], "strict": ""}
    noted: list[dict[str, Any]] = []
    for part, optim in enumerate(("adams", "adamw", "adams")):
        run = Torch("fsdp2", optim)
        if part == 2:
            try:
                Torch("fsdp2", optim).load(folder / "1")
            except BaseException as error:  # as torch's CheckpointException is
                result["strict"] = f"{type(error).__name__}: {error}"
        if part:
            run.load(folder / str(part - 1), partial_load=part == 2)
            if optim == "adamw":
                result["loaded"] = lambdas(run.optimizer.param_groups)
        noted += run.train(4 * part, 4 * part + 4)
        result["lambdas"].append(lambdas(run.save(folder / str(part))["optimizer"]["param_groups"]))
    return {**result, "steps": noted}


def dcp_from_adamw(*, reference_steps: int = 0) -> list[dict[str, Any]]:
    """An AdamW with a decay of its own for 6 steps, then AdamS by a partial load."""
    folder = shared_folder()
    adamw = Torch("fsdp2", "adamw")
    adamw.train(0, 6)
    adamw.save(folder)
    adams = Torch("fsdp2", "adams", reference_steps=reference_steps)
    adams.load(folder, partial_load=True)
    return adams.train(6, STEPS)


def zero_there_and_back(stage: int) -> dict[str, Any]:
    folder = shared_folder()
    result: dict[str, Any] = {"lambdas": [], "loaded": []}
    noted: list[dict[str, Any]] = []
    for part, optim in enumerate(("adams", "adamw", "adams")):
        run = Zero(stage, optim)
        if part:
            run.load(folder, str(part - 1))
            if optim == "adamw":
                result["loaded"] = lambdas(run.optimizer.param_groups)
        noted += run.train(4 * part, 4 * part + 4)
        run.save(folder, str(part))
        (file, *_) = sorted((folder / str(part)).glob("*optim_states.pt"))
        saved = torch.load(file, weights_only=False)["optimizer_state_dict"]
        key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
        result["lambdas"].append(lambdas(saved[key]["param_groups"]))
    return {**result, "steps": noted}
