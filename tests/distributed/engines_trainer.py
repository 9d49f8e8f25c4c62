"""The run of `task.py` in a Trainer, under each engine: `import hf_swd`, `optim="adams"`, and nothing else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import divided
import engines_accelerate
import pretend_gpus
import torch
import torch.distributed as dist
from engines_accelerate import check_engine, shared_folder, weights, zero_config
from task import GLOBAL_BATCH, KINDS, LR, STEPS, batches, build_model
from torch import nn
from transformers import TrainerCallback

import hf_swd


CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"


_LAYERS = {"bert": "BertLayer", "llama": "LlamaDecoderLayer", "mixtral": "MixtralDecoderLayer"}


def _arguments(engine: str, config_file: str | None, use_orig_params: bool, kind: str) -> dict[str, Any]:
    if engine == "divided":
        return {}
    if engine == "ddp":
        return {"ddp_find_unused_parameters": False}
    if engine.startswith("fsdp"):
        config = {"version": int(engine[4]), "transformer_layer_cls_to_wrap": [_LAYERS[kind]]}
        if engine == "fsdp1":
            config |= {"use_orig_params": use_orig_params, "sync_module_states": False}
        return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
    if config_file is not None:
        return {"deepspeed": str(CONFIGS / config_file)}
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = zero_config(int(engine[4]), engine.endswith("_offload"))
    return {"deepspeed": {**config, **dict.fromkeys(automatic, "auto")}}


class LooksAtGradients(TrainerCallback):
    """Notes the norm of the gradients between clipping and the step, whatever meshes they are on."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grads = [p.grad for p in model.parameters()]
        squares = [(g.full_tensor() if hasattr(g, "full_tensor") else g).double().square().sum() for g in grads]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))


def _trainer(
    engine: str,
    folder: str,
    *,
    trainer: str = "Trainer",
    micros: int = 1,
    config_file: str | None = None,
    use_orig_params: bool = True,
    kind: str = "bert",
    sizes: dict[str, Any] | None = None,
    parallelism: dict[str, int] | None = None,
    environment: dict[str, str] | None = None,
    trainer_kwargs: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """The engine "divided" is a model that `from_pretrained` divides by `sizes`; accelerate may be told so, too, and
    told anything by its `environment`."""
    import accelerate
    import transformers

    sizes = sizes or {}
    pretend_gpus.install()
    engines_accelerate.reset()
    os.environ.update(environment or {})
    data = divided.data_world(sizes) if engine == "divided" else dist.get_world_size()
    arguments = transformers.TrainingArguments(
        folder,
        **{
            "optim": "adams",
            "weight_decay": KINDS[kind].weight_decay,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "max_grad_norm": KINDS[kind].max_norm,
            "max_steps": STEPS,
            "per_device_train_batch_size": GLOBAL_BATCH // (data * micros),
            "gradient_accumulation_steps": micros,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **_arguments(engine, config_file, use_orig_params, kind),
            **({"parallelism_config": accelerate.ParallelismConfig(**parallelism)} if parallelism else {}),
            **changes,
        },
    )
    model = divided.build(kind, sizes) if engine == "divided" else build_model(kind=kind)
    # It swallows `num_items_in_batch` and averages all the same; the Trainer would take the mean for a sum.
    model.accepts_loss_kwargs = False
    rows = range(GLOBAL_BATCH)
    dataset = [{key: value[i] for key, value in batch.items()} for batch in batches(kind=kind) for i in rows]
    cls = {"Trainer": transformers.Trainer, "SWDTrainer": hf_swd.SWDTrainer}[trainer]
    return cls(model, arguments, train_dataset=dataset, **(trainer_kwargs or {}))


def save(engine: str, *, folder: str, at: int, **options: Any) -> None:
    """Train, and write the checkpoint of step `at` to `folder`."""
    _trainer(engine, folder, save_strategy="steps", save_steps=at, **options).train()
    dist.barrier()


def run(engine: str, *, resume_at: int = 0, saved: str = "", look: bool = False, **options: Any) -> dict[str, Any]:
    """
    Weights and logs; with `resume_at` of a Trainer that goes on from the checkpoint of this step of another one.

    Args:
        saved (`str`): folder of the checkpoint, of any number of processes; it is written first unless it is given.
        look (`bool`): someone looks at the gradients between clipping and the step; `norms` are theirs.
    """
    with contextlib.nullcontext(saved) if saved else shared_folder() as folder:
        if resume_at and not saved:
            save(engine, folder=folder, at=resume_at, **options)
        last = _trainer(engine, folder, **options)
        looks = LooksAtGradients()
        if look:
            last.add_callback(looks)
        with _other_clippings() as clippings:
            last.train(resume_from_checkpoint=f"{folder}/checkpoint-{resume_at}" if resume_at else None)
    assert type(last).__name__ == options.get("trainer", "Trainer")
    if engine != "divided":  # otherwise it has been checked when it was built
        check_engine(engine, last.model_wrapped, last.optimizer)
    logs = [entry for entry in last.state.log_history if "loss" in entry]
    return {"weights": weights(last.model_wrapped), "logs": logs, "norms": looks.norms, "clippings": clippings}


@contextlib.contextmanager
def _other_clippings() -> Iterator[list[str]]:
    """Which of torch's functions for clipping transformers or accelerate has called, instead of the schedule's."""
    names = ("clip_grad_norm_", "clip_grads_with_norm_", "get_total_norm")
    called: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in filter(partial(hasattr, nn.utils), names):
            original = getattr(nn.utils, name)

            def noted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                called.append(_name)
                return _original(*args, **kwargs)

            stack.enter_context(mock.patch.object(nn.utils, name, noted))
        yield called
