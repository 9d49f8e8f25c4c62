"""Runs that must stop before a weight changes, or be right: pipelines, an mpu, optimizers of other parameters."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from engines import build_fsdp1, build_optimizer, message_of, whole_weights
from engines_accelerate import shared_folder, zero_config
from engines_deepspeed import base_optimizer, config, weights
from engines_trainer import _trainer
from task import LR, MAX_NORM, WEIGHT_DECAY, batches, build_model
from torch import nn

import hf_swd
from hf_swd.core.wrappers import schedule_of
from hf_swd.trainer import watch


def _attach(how: str, optimizer: Any, engine: Any) -> None:
    if how != "no":
        hf_swd.attach(optimizer, *([engine] if how == "both" else []))


@contextlib.contextmanager
def _forgotten_mpu() -> Iterator[None]:
    """DeepSpeed would go on with it in all engines of the process."""
    from deepspeed.utils import groups

    try:
        yield
    finally:
        groups.mpu = None


# DeepSpeed's pipeline


def _layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)]


def _pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator)) for _ in range(6)]


def _pipeline(stage: int, attach: str, process_group: bool) -> tuple[Any, Callable[[], None]]:
    """The engine, whose every rank has one stage, and a training of it."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed(dist_backend="gloo")
    module = PipelineModule(_layers(), num_stages=dist.get_world_size(), loss_fn=nn.MSELoss())
    group = module.mpu().get_pipe_parallel_group() if process_group else None
    optimizer = hf_swd.AdamS(module.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, process_group=group)
    engine, wrapped, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config(stage, clip=False))

    def run() -> None:
        _attach(attach, wrapped, engine)
        data = iter(_pairs())
        for _ in _pairs():
            engine.train_batch(data)

    return engine, run


def refused_pipeline(stage: int, *, attach: str = "both", process_group: bool = False) -> dict[str, Any]:
    engine, run = _pipeline(stage, attach, process_group)
    before = whole_weights(engine.module.named_parameters())
    with _forgotten_mpu():
        message = message_of(run)
    return {"message": message, "before": before, "weights": whole_weights(engine.module.named_parameters())}


def pipeline_of_stage_0(attach: str) -> float:
    """With `process_group`: how far the weights are from those of one process, relative to the distance travelled."""
    engine, run = _pipeline(0, attach, process_group=True)
    with _forgotten_mpu():
        run()
    reference = nn.Sequential(*_layers())
    before = {n: p.detach().clone() for n, p in reference.named_parameters()}
    optimizer = hf_swd.AdamS(reference.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for x, y in _pairs():
        nn.functional.mse_loss(reference(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = dict(reference.named_parameters())
    return max(
        float((p - expected[n]).norm() / (expected[n] - before[n]).norm()) for n, p in engine.module.named_parameters()
    )


# Tensor parallelism by hand


class Mpu:
    """All ranks are one model-parallel group, as Megatron says it."""

    def __init__(self) -> None:
        self.all = dist.new_group(list(range(dist.get_world_size())))
        self.alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_model_parallel_group(self) -> Any:
        return self.all

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> Any:
        return self.alone


def refused_mpu(stage: int, *, attach: str = "both", dtype: str = "fp32") -> dict[str, Any]:
    import deepspeed

    model = build_model()
    optimizer = build_optimizer(model)
    ds_config = config(stage, dtype=dtype)
    engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, mpu=Mpu())
    before = weights(engine)

    def run() -> None:
        _attach(attach, wrapped, engine)
        engine.backward(engine(**batches(last=1)[0]).loss)
        engine.step()

    with _forgotten_mpu():
        message = message_of(run)
    return {"message": message, "before": before, "weights": weights(engine)}


def in_the_forward_of_an_engine() -> float:
    """An optimizer that is not the engine's, and steps while the engine is at work, is none of its business."""
    import deepspeed

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.other = [nn.Parameter(torch.ones(3))]
            self.inner = hf_swd.AdamS(self.other, lr=0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.other[0].grad = torch.ones(3)
            self.inner.step()
            return self.linear(x).square().mean()

    model = Model()
    optimizer = hf_swd.AdamS(model.parameters(), lr=LR)
    engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(2))
    hf_swd.attach(wrapped)
    engine.backward(engine(torch.ones(4, 4)))
    engine.step()
    assert base_optimizer(engine).schedule.step_count == 1
    return model.inner.grad_rms


# An optimizer of other parameters


def refused_parameters(engine: str) -> dict[str, Any]:
    """It was built before the model was sharded: nothing trains."""
    from torch.distributed.fsdp import fully_shard

    if engine == "fsdp2":
        model = build_model()
        optimizer = build_optimizer(model)
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        source = build_model()
        optimizer = build_optimizer(source)
        with mock.patch("engines.build_model", return_value=source):
            model, _ = build_fsdp1(use_orig_params=False)
    before = whole_weights(model.named_parameters())
    message = message_of(lambda: hf_swd.attach(optimizer, model))
    return {"message": message, "before": before, "weights": whole_weights(model.named_parameters())}


# A Trainer under DeepSpeed


def _deepspeed(**changes: Any) -> dict[str, Any]:
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**zero_config(2), **dict.fromkeys(automatic, "auto"), **changes}


def configured_optimizer(
    *, name: str, by: str, optim: str = "adams", trainer: str = "Trainer", give_class: bool = False
) -> str:
    """An "optimizer" section in the configuration, which the arguments or accelerate's environment bring. With
    `give_class` it is the Trainer itself that is told of AdamS."""
    ds_config = _deepspeed(optimizer={"type": name, "params": {"lr": "auto", "weight_decay": "auto"}})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds_config.json"
        path.write_text(json.dumps(ds_config))
        options: dict[str, Any] = {"optim": optim, "trainer": trainer}
        if by == "arguments":
            options["deepspeed"] = ds_config
        else:
            environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
            options["environment"] = environment
        if give_class:
            options["trainer_kwargs"] = {"optimizer_cls_and_kwargs": (hf_swd.AdamS, {"lr": LR})}
        return message_of(lambda: _trainer("zero2" if by == "arguments" else "ddp", folder, **options).train())


def _warnings(run: Callable[[], Any]) -> list[str]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_swd.trainer")
    logger.addHandler(handler)
    try:
        run()
    finally:
        logger.removeHandler(handler)
    return messages


def clipping_that_is_left_out(stage: int) -> dict[str, Any]:
    """`gradient_clipping` stands nowhere in the configuration."""
    ds_config = {**_deepspeed(), "zero_optimization": {"stage": stage}}
    del ds_config["gradient_clipping"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer("zero2", folder, deepspeed=ds_config, max_steps=2)
        messages = _warnings(trainer.train)
        # Whether steps are clipped at all depends on the model: what a warning of it would name.
        named = watch._watches[schedule_of(trainer.optimizer)].clips_to
    return {
        "messages": messages,
        "named": named,
        "clips": trainer.deepspeed.gradient_clipping(),
        "asked": MAX_NORM,
    }


def zero_checkpoint_under_ddp() -> list[str]:
    with shared_folder() as folder:
        _trainer("zero2", folder, save_strategy="steps", save_steps=2, max_steps=2).train()
        dist.barrier()
        trainer = _trainer("ddp", folder, max_steps=4)
        return _warnings(lambda: trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2"))
