"""What others do under FSDP2: to gradients between clipping and step, to the model, and to the state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import engines_trainer
import torch
import torch.distributed as dist
from engines import build_fsdp2, build_optimizer, train, whole_weights
from engines_accelerate import shared_folder
from reference_adams import rms_of_moments
from task import MAX_NORM, STEPS, build_model
from torch import nn
from transformers import TrainerCallback


def _of_word_embeddings(model: nn.Module) -> Any:
    return next(p for name, p in model.named_parameters() if name.endswith("word_embeddings.weight")).grad


def _zero_rows(model: nn.Module) -> None:
    """Whatever of the rows is here."""
    _of_word_embeddings(model).to_local()[2:] = 0


def _zero_data(model: nn.Module) -> None:
    _of_word_embeddings(model).to_local().data[2:] = 0


def _one_rank(model: nn.Module) -> None:
    """Rows that only the first rank has."""
    if dist.get_rank() == 0:
        _of_word_embeddings(model).to_local().mul_(0)


def _smallest(model: nn.Module) -> None:
    min((p for p in model.parameters() if p.grad is not None), key=lambda p: p.numel()).grad.mul_(0.01)


EDITS: dict[str, Callable[[nn.Module], Any]] = {
    "all": lambda model: [p.grad.mul_(0.1) for p in model.parameters()],
    "one": lambda model: _of_word_embeddings(model).mul_(0.0),
    "smallest": _smallest,
    "rows": _zero_rows,
    "data": _zero_data,
    "one_rank": _one_rank,
}


class _Found:
    """After each step: the schedule's rms and decay, and the rms that the moments of all ranks tell."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def note(self, optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        found = {"rms": float(group["second_moment_mean"]) ** 0.5, "decay": float(group["weight_decay"])}
        self.steps.append({**found, "moments": rms_of_moments(optimizer)})


def own_loop(edit: str, *, optim: str = "adams", clip: bool = True) -> dict[str, Any]:
    model = build_fsdp2()
    optimizer = build_optimizer(model, optim)
    clipper = getattr(optimizer, "clip_grad_norm_", None) or optimizer.__dict__["_decay_schedule"].clip_grad_norm_
    found = _Found()

    def clip_and_edit() -> None:
        if clip:
            clipper(MAX_NORM)
        EDITS[edit](model)

    for step in range(STEPS):
        train(model, optimizer, clip_and_edit, first=step, last=step + 1)
        found.note(optimizer)
    return {"steps": found.steps, "weights": whole_weights(model.named_parameters())}


class _Edits(TrainerCallback):
    def __init__(self, edit: str) -> None:
        self.edit, self.found = EDITS[edit], _Found()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.edit(model)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.found.note(optimizer)


def trainer(edit: str) -> dict[str, Any]:
    edits = _Edits(edit)
    with shared_folder() as folder:
        last = engines_trainer._trainer("fsdp2", folder)
        last.add_callback(edits)
        last.train()
    return {"steps": edits.found.steps, "weights": whole_weights(last.model_wrapped.named_parameters())}


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "cpu": lambda model: model.cpu(),
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
}


def moved(move: str, *, stepped: bool) -> list[dict[str, float]]:
    """The model converted after the optimizer was built; then it trains."""
    model = build_fsdp2()
    optimizer = build_optimizer(model)
    if stepped:
        train(model, optimizer, lambda: optimizer.clip_grad_norm_(MAX_NORM), last=2)
    MOVES[move](model)
    found = _Found()
    for step in range(2, 5):
        train(model, optimizer, lambda: None, first=step, last=step + 1)
        found.note(optimizer)
    return found.steps


def from_meta() -> list[dict[str, float]]:
    """Meta-device initialisation, with the optimizer built before there is any storage."""
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = build_model()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().copy_(torch.randn(p.to_local().shape, generator=generator) * 0.02)
    for name, buffer in model.named_buffers():
        with contextlib.suppress(KeyError):
            buffer.copy_(dict(build_model().named_buffers())[name])
    found = _Found()
    for step in range(3):
        train(model, optimizer, lambda: None, first=step, last=step + 1)
        found.note(optimizer)
    return found.steps


def offloaded() -> list[dict[str, float]]:
    """Moments that are somewhere else between the steps, and come back as other DTensors, once as another run's; then
    they are cleared."""
    model = build_fsdp2()
    optimizer = build_optimizer(model)
    found = _Found()
    for step in range(STEPS):
        train(model, optimizer, lambda: optimizer.clip_grad_norm_(MAX_NORM), first=step, last=step + 1)
        found.note(optimizer)
        for state in optimizer.state.values():
            state.update({key: value.clone() for key, value in state.items()})
            if step == 1:
                state["exp_avg_sq"] = state["exp_avg_sq"] * 4.0
        if step == STEPS // 2:
            optimizer.state.clear()
    return found.steps
