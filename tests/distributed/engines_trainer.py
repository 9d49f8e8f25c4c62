"""The run of `task.py` in a Trainer, under each engine: `import hf_swd`, `optim="adams"`, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines_accelerate
import pretend_gpus
import torch.distributed as dist
from engines_accelerate import check_engine, shared_folder, weights, zero_config
from task import GLOBAL_BATCH, LR, MAX_NORM, STEPS, WEIGHT_DECAY, batches, build_model

import hf_swd


CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"


def _arguments(engine: str, config_file: str | None, use_orig_params: bool) -> dict[str, Any]:
    if engine == "ddp":
        return {"ddp_find_unused_parameters": False}
    if engine.startswith("fsdp"):
        config = {"version": int(engine[4]), "transformer_layer_cls_to_wrap": ["BertLayer"]}
        if engine == "fsdp1":
            config |= {"use_orig_params": use_orig_params, "sync_module_states": False}
        return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
    if config_file is not None:
        return {"deepspeed": str(CONFIGS / config_file)}
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = zero_config(int(engine[4]), engine.endswith("_offload"))
    return {"deepspeed": {**config, **dict.fromkeys(automatic, "auto")}}


def _trainer(
    engine: str,
    folder: str,
    *,
    trainer: str,
    micros: int,
    config_file: str | None,
    use_orig_params: bool,
    **changes: Any,
) -> Any:
    import transformers

    pretend_gpus.install()
    engines_accelerate.reset()
    arguments = transformers.TrainingArguments(
        folder,
        **{
            "optim": "adams",
            "weight_decay": WEIGHT_DECAY,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "max_grad_norm": MAX_NORM,
            "max_steps": STEPS,
            "per_device_train_batch_size": GLOBAL_BATCH // (dist.get_world_size() * micros),
            "gradient_accumulation_steps": micros,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **_arguments(engine, config_file, use_orig_params),
            **changes,
        },
    )
    model = build_model()
    # It swallows `num_items_in_batch` and averages all the same; the Trainer would take the mean for a sum.
    model.accepts_loss_kwargs = False
    dataset = [{key: value[i] for key, value in batch.items()} for batch in batches() for i in range(GLOBAL_BATCH)]
    cls = {"Trainer": transformers.Trainer, "SWDTrainer": hf_swd.SWDTrainer}[trainer]
    return cls(model, arguments, train_dataset=dataset)


def run(
    engine: str,
    *,
    trainer: str = "Trainer",
    micros: int = 1,
    config_file: str | None = None,
    use_orig_params: bool = True,
    resume_at: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """Weights and logs; with `resume_at` those of a second Trainer that goes on from the first one's checkpoint."""
    options: dict[str, Any] = {
        "trainer": trainer,
        "micros": micros,
        "config_file": config_file,
        "use_orig_params": use_orig_params,
        **changes,
    }
    with shared_folder() as folder:
        checkpoint = None
        if resume_at:
            first = _trainer(engine, folder, save_strategy="steps", save_steps=resume_at, **options)
            first.train()
            dist.barrier()
            checkpoint = f"{folder}/checkpoint-{resume_at}"
        last = _trainer(engine, folder, **options)
        last.train(resume_from_checkpoint=checkpoint)
    assert type(last).__name__ == trainer
    check_engine(engine, last.model_wrapped, last.optimizer)
    logs = [entry for entry in last.state.log_history if "loss" in entry]
    return {"weights": weights(last.model_wrapped), "logs": logs}
