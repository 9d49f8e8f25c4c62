"""What scheduled weight decay cannot be right under: each function raises a `RuntimeError`, which says what to change,
before a weight changes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.wrappers import unwrapped


if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


# Before 0.19.6 accumulated gradients are wrong below stage 3, with any optimizer (0.19.5 divides those that come
# through a model's logits by the number of micro-batches twice); 0.19.6 loads stage 2 universal checkpoints wrongly;
# 0.19.7 goes wrong now and then under ZeRO-3 with the optimizer on CPU, with any optimizer.
_OLDEST_DEEPSPEED = "0.19.8"

_Reason = tuple[object, str]
"""Whether it holds, and what it is and what to do instead."""


def refuse_old_version(*prepared: Any) -> None:
    """One of these objects is DeepSpeed's, or accelerate's wrapper for it, and this DeepSpeed trains wrongly."""
    if not any("deepspeed" in type(each).__module__.split(".") for each in prepared):
        return
    from packaging.version import Version  # comes with DeepSpeed

    version = importlib.metadata.version("deepspeed")
    if Version(version) < Version(_OLDEST_DEEPSPEED):
        raise RuntimeError(
            f"hf_swd needs deepspeed {_OLDEST_DEEPSPEED} or later; this is {version}, which trains wrong weights in "
            "some configurations, with any optimizer (docs/distributed.md): pip install "
            f"'deepspeed>={_OLDEST_DEEPSPEED}'"
        )


def refuse_step_in_backward() -> None:
    """The optimizer steps while gradients are still being computed."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the optimizer steps during the backward pass (torch's _apply_optimizer_in_backward, or a hook on a "
            "parameter), before the gradient of the whole model is known, and scheduled weight decay needs that: call "
            "step() once, after backward()"
        )


def refuse_other_parameters(optimizer: Any, held: Iterable[Tensor], model: nn.Module) -> None:
    """The optimizer, which holds `held`, trains nothing of the prepared model. Under DeepSpeed it trains copies."""
    if any(type(each).__module__.startswith("deepspeed.") for each in (model, *unwrapped(optimizer))):
        return
    ids = set(map(id, held))
    trainable = [p for p in model.parameters() if p.requires_grad]
    if trainable and not any(id(p) in ids for p in trainable):
        raise RuntimeError(
            "the optimizer holds none of the model's trainable parameters, so it would train nothing: it was built "
            "before the model was sharded (or moved), which has put new parameters in their place. Build it after "
            "fully_shard, or pass model and optimizer to accelerator.prepare together"
        )


def refuse_unscaled_fp16(optimizer: Any) -> None:
    """DeepSpeed's stage 0 in fp16 (0.19.8) divides gradients by a loss scale that the loss was never multiplied by:
    Adam hardly notices gradients that are all 2^16 times too small, a decay relative to them does."""
    for each in unwrapped(optimizer):
        config = getattr(each, "loss_scale_config", each)  # on the optimizer itself in older versions
        is_wrapper = type(each).__module__.startswith("deepspeed.runtime.fp16.")
        _stop(
            (
                is_wrapper and getattr(config, "cur_scale", 1) != 1,
                "fp16 under DeepSpeed's ZeRO stage 0, where gradients are divided by a loss scale that the loss was "
                "not multiplied by: use stage 1 or bf16",
            )
        )


def refuse_replacement(optimizer: Optimizer) -> None:
    """DeepSpeed's own Adam steps on the groups of an AdamS that accelerate has dropped, before `attach`."""
    if not type(optimizer).__module__.startswith("deepspeed."):
        return
    grads = (p.grad for group in optimizer.param_groups if "initial_weight_decay" in group for p in group["params"])
    if any(grad is not None and grad.any() for grad in grads):
        raise RuntimeError(
            f"{type(optimizer).__name__} has replaced AdamS (ZeRO-Offload does that), and nothing schedules its "
            "weight decay: call hf_swd.attach(optimizer) once, with what accelerator.prepare returned; a Trainer does "
            "it by itself after `import hf_swd`"
        )


def refuse_divided_model(params: Iterable[Tensor], mpu: Any = None) -> None:
    """Ranks hold different parts of the model, of which neither its parameters nor the optimizer tell. DeepSpeed's
    `mpu` knows of them under model parallelism."""
    _stop(*_division(params, mpu))


def refuse_zero(zero_optimizer: Any, params: Iterable[Tensor]) -> None:
    """ZeRO leaves the schedule without the norm, or the size, of the whole model, whose parameters are `params`."""
    groups = zero_optimizer.optimizer.param_groups

    def read(name: str, default: Any = None) -> Any:
        return getattr(zero_optimizer, name, default)

    _stop(
        *_division(params, read("mpu")),
        (
            len({tuple(map(float, group["betas"])) for group in groups if "betas" in group}) > 1,
            "different betas in the parameter groups; ZeRO knows one norm for all: give all groups the same",
        ),
        (read("has_moe_layers"), "expert-parallel layers of DeepSpeed, whose norm is another on each rank: use FSDP2"),
        (read("compute_grad_norm", True) is False, "zero_optimization.compute_grad_norm=false: leave it at true"),
        (read("zenflow"), "ZenFlow, which steps outside the optimizer: leave zero_optimization.zenflow out"),
        (
            hasattr(zero_optimizer, "superoffload_cpu_optimizer"),
            "SuperOffload, whose optimizer is in another process: leave offload_optimizer.super_offload out",
        ),
        (read("backup_optimizer") is not None, "offload_optimizer.ratio below 1 (two optimizers): set it to 1"),
        (any(group.get("amsgrad") for group in groups), "AMSGrad, which needs every gradient: set amsgrad=False"),
    )


def _division(params: Iterable[Tensor], mpu: Any) -> list[_Reason]:
    params = list(params)
    return [
        (
            any(getattr(p, "ds_is_replaced_module", False) for p in params),
            "DeepSpeed's AutoTP (tensor_parallel.autotp_size), of whose parameters each rank counts its own parts: "
            "use the tensor parallelism of transformers (DistributedConfig) or of torch",
        ),
        (
            any(
                getattr(p, "allreduce", True) is False and getattr(p, "group_name", "ep_size_1") != "ep_size_1"
                for p in params
            ),
            "DeepSpeed's expert parallelism (ep_size above 1), where each rank counts its own experts: use the expert "
            "parallelism of transformers (DistributedConfig), or FSDP2",
        ),
        (
            _ranks(mpu, "pipe", "pipeline_model") > 1,
            "DeepSpeed's PipelineModule, of which each rank counts its own stage: under ZeRO stage 0 build the "
            "optimizer with process_group=module.mpu().get_pipe_parallel_group(), where no layer is tied; under "
            "stage 1 there is no way",
        ),
        (
            _ranks(mpu, "tensor_model", "slice", "model") > 1,
            "tensor parallelism by an mpu, where each rank counts its own parts: use the tensor parallelism of "
            "transformers (DistributedConfig) or of torch",
        ),
    ]


def _ranks(mpu: Any, *kinds: str) -> int:
    """How many ranks share a model in one of these ways; each convention for an mpu has other names for them."""
    asks = (getattr(mpu, f"get_{kind}_parallel_world_size", None) for kind in kinds)
    return max((ask() for ask in asks if ask is not None), default=1)


def _stop(*reasons: _Reason) -> None:
    found = [reason for holds, reason in reasons if holds]
    if found:
        raise RuntimeError("scheduled weight decay cannot run with " + "; nor with ".join(found))
