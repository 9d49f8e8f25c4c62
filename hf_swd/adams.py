"""AdamS: Adam with scheduled weight decay, on torch's own Adam kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.adamw import adamw
from torch.optim.optimizer import (
    _default_to_fused_or_foreach,
    _device_dtype_check_for_fused,
)

from .core.grad_norm import HALF, by_kind, is_dense, local_parts, scale_
from .core.gradients import GroupGradients
from .core.group_state import OPTIONS
from .core.schedule import WeightDecaySchedule
from .core.validation import check_options
from .engines import attach as _attach  # noqa: F401 - its hook stops steps of which the schedule sees a part only


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim.optimizer import ParamsT


_KIND = attrgetter("__class__", "device", "dtype")
_DTYPE = attrgetter("dtype")


class AdamS(torch.optim.AdamW):
    r"""
    Adam with Scheduled Weight Decay.

        m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
        v_bar = mean of v / (1 - beta2^t) over every element of every parameter that has a gradient
        theta <- (1 - lr * weight_decay / sqrt(v_bar)) theta - lr * m_hat / (sqrt(v_hat) + eps)

    `v_bar` is one number for the whole model, whatever the parameter groups. `group["weight_decay"]` shows the
    effective decay (`weight_decay / sqrt(v_bar)`) of the last step, `group["initial_weight_decay"]` the user's value;
    a value that is assigned to `group["weight_decay"]` between steps becomes the user's value. The decay never exceeds
    1/lr. Groups with `weight_decay=0` are plain Adam, bit for bit.

    Args:
        params (iterable): parameters, named parameters or dicts of parameter groups; real or complex, any floating
            dtype.
        lr (`float` or 1-element `Tensor`, defaults to 1e-3): learning rate, at least 0.
        betas (`tuple[float, float]`, defaults to (0.9, 0.999)): decay rates of the moments, in [0, 1).
        eps (`float`, defaults to 1e-8): term added to the denominator, at least 0.
        weight_decay (`float`, defaults to 5e-4): lambda, at least 0. Without `reference_steps` it is in units of
            sqrt(v_bar), which depends on the model: AdamW's value does not carry over.
        amsgrad (`bool`, defaults to `False`): use the maximum of v instead of v (also in v_bar; a slower path).
        reference_steps (`int`, defaults to 0): K > 0 gives `weight_decay` its meaning in AdamW: it is the effective
            decay up to step K, and `weight_decay * sqrt(v_bar_K / v_bar_t)` from then on.
        max_grad_norm (`float`, defaults to 0.0): clip the whole gradient to this 2-norm in every step, which reads it
            once for both, before Adam sees it; 0 clips nothing, `inf` only measures. `grad_norm` is the norm before
            clipping. Not together with a Trainer's or an engine's own clipping.
        unclipped_norm (`bool`, defaults to `False`): take v_bar from the gradients as they were before clipping, by
            the same moving average (with `betas[1]` of the first group), instead of from Adam's moments. For training
            in which most steps are clipped, whose v_bar would otherwise be constant. The step must know that norm: by
            `max_grad_norm`, a Trainer's clipping, or DeepSpeed ZeRO's.
        process_group (`ProcessGroup`, *optional*): ranks whose optimizers hold disjoint parts of one model; v_bar is
            then the mean over all of them (one all-reduce a step). Not for replicas (DDP), which need nothing.
        maximize (`bool`, defaults to `False`): go along the gradient instead of against it.
        foreach (`bool`, *optional*): multi-tensor implementation of torch.
        capturable (`bool`, defaults to `False`): allow capture of `step()` in a CUDA graph.
        fused (`bool`, *optional*): torch's fused kernel. By default it is used wherever it exists (floating-point
            parameters on CPU, CUDA, MPS, XPU), else torch's own default.

    Raises:
        TypeError, ValueError: an argument, or an option of a parameter group, has a wrong type or is out of range.
        RuntimeError: from `step()`, before any weight changes: a gradient is sparse; with `unclipped_norm` the norm
            before clipping is not known.

    Example:

    ```python
    # The paper's setting, from scratch; and fine-tuning, in AdamW's units.
    optimizer = AdamS(model.parameters(), lr=1e-3, weight_decay=5e-4)
    optimizer = AdamS(model.parameters(), lr=2e-5, weight_decay=0.01, reference_steps=100)
    ```

    References: Xie, Xu, Zhang, Sato, Sugiyama, *On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them: A
    Gradient-Norm Perspective*, NeurIPS 2023, arXiv 2011.11152. (Not the AdamS of 2025, another optimizer.)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 5e-4,
        amsgrad: bool = False,
        *,
        reference_steps: int = 0,
        unclipped_norm: bool = False,
        max_grad_norm: float = 0.0,
        process_group: ProcessGroup | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        check_options(options)
        super().__init__(params, **options)
        self._decay_schedule = WeightDecaySchedule(
            self,
            reference_steps=reference_steps,
            unclipped_norm=unclipped_norm,
            max_grad_norm=max_grad_norm,
            process_group=process_group,
        )

    @property
    def schedule(self) -> WeightDecaySchedule:
        """The schedule of this optimizer's weight decay."""
        return self._decay_schedule

    @property
    def grad_rms(self) -> float:
        """sqrt(v_bar) of the last step, 0.0 before the first. Reading it makes the host wait for an accelerator."""
        return self._decay_schedule.grad_rms

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient before clipping at the last step that clipped; see [`WeightDecaySchedule`]."""
        return self._decay_schedule.grad_norm

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """[`WeightDecaySchedule.clip_grad_norm_`]: clip the gradients in place, now, to a total 2-norm."""
        return self._decay_schedule.clip_grad_norm_(max_norm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_options(param_group)
        super().add_param_group(param_group)

    @_disable_dynamo  # a compiled function runs the step as it is: torch's kernels have nothing to gain
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """
        Perform one optimization step.

        Args:
            closure (`Callable`, *optional*): reevaluates the model, computes gradients and returns the loss.

        Returns:
            The closure's value, or `None`.
        """
        # Not super().step(): torch wraps `step` of every class for hooks, which would then run twice.
        _graph_capture_check(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step = self._decay_schedule.begin_step()
        if not self.state:  # torch looks group by group, when others have been stepped
            for p in (p for gradients in step.groups if gradients.group["fused"] for p in gradients.params):
                _device_dtype_check_for_fused(p)
        for gradients, decay in zip(step.groups, step.decays, strict=True):
            self._step_group(gradients, decay, step.clip)
        self._decay_schedule.end_step()
        return loss

    def _step_group(self, gradients: GroupGradients, decay: float | Tensor, clip: Tensor | None) -> None:
        """Adam's kernel on one group, with gradients multiplied by `clip` on the way."""
        group, with_grad, grads, states = gradients
        kinds = dict(zip(map(_KIND, with_grad), with_grad, strict=True))
        fused = group["fused"]
        if fused is None and group["foreach"] is None:
            examples = local_parts([*kinds.values()])
            fused, _ = _default_to_fused_or_foreach(examples, False, use_fused=True)
        if not all(states) or (fused and any(device.type != "cpu" for _, device, _ in kinds)):
            states = self._complete_states(gradients, fused)
        params, grads = local_parts(with_grad), local_parts(grads)
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = (
            local_parts([state[key] for state in states]) if group["amsgrad"] or key != "max_exp_avg_sq" else []
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
        )
        alike = [tensors for tensors in (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs) if tensors]
        fused = fused and _have_one_layout(alike)
        grad_scale = getattr(self, "grad_scale", None)
        if clip is not None:
            # The kernels divide by it, and take it as a float32.
            if fused and torch.float64 not in map(_DTYPE, grads):
                inverse = clip.reciprocal().float()
                grad_scale = inverse if grad_scale is None else grad_scale * inverse.to(grad_scale.device)
            else:
                scale_(grads, clip)
        if isinstance(decay, Tensor):
            self._decay_on_device(params, group["lr"], decay)
            decay = 0.0
        beta1, beta2 = group["betas"]
        options: dict[str, Any] = {
            "weight_decay": decay,
            "beta1": beta1,
            "beta2": beta2,
            "grad_scale": grad_scale,
            "found_inf": getattr(self, "found_inf", None),
            **{key: group[key] for key in ("lr", "eps", "amsgrad", "maximize")},
        }
        kernel: Callable[..., None] = _fused_adamw_on_cpu
        if not (fused and len(kinds) == 1 and params[0].is_cpu):
            kernel = adamw
            options.update(fused=fused, has_complex=any(dtype.is_complex for _, _, dtype in kinds))
            options.update({key: group[key] for key in ("foreach", "capturable", "differentiable")})
        kernel(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, **options)

    def _complete_states(self, gradients: GroupGradients, fused: bool | None) -> list[dict[str, Any]]:
        """States for parameters that have none, and step counts where the kernel wants them."""
        with_grad, states = gradients.params, gradients.states
        without_state = [p for p, state in zip(with_grad, states, strict=True) if not state]
        if without_state:
            new = {**gradients.group, "params": without_state, "fused": fused}
            # Adam's: AdamW inherits it since torch 2.7, and had its own, with another signature, before.
            torch.optim.Adam._init_group(self, new, *([] for _ in range(6)))  # type: ignore[no-untyped-call]
            states = [self.state[p] for p in with_grad]
        for p, state in zip(with_grad, states, strict=True):
            if fused and state["step"].device != p.device:  # a loaded step count may be on the host
                state["step"] = state["step"].to(p.device)
        return states

    def _decay_on_device(self, params: list[Tensor], lr: float | Tensor, decay: Tensor) -> None:
        """Decay by a number that stays on the accelerator: torch's kernels take theirs from the host."""
        product = lr * decay
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            product = torch.where(found_inf.to(product.device) > 0, 0.0, product)
        for (device, dtype), indices in by_kind(params).items():
            tensors = [params[i] for i in indices]
            product = product.to(device, non_blocking=True)
            if dtype in HALF:
                # 1 - product would be rounded to 1.
                for tensor in tensors:
                    tensor.addcmul_(tensor, product.to(dtype), value=-1)
            else:
                torch._foreach_mul_(tensors, (1 - product).to(dtype))  # pyright: ignore[reportPrivateImportUsage]

    def __getstate__(self) -> dict[str, Any]:
        if self._decay_schedule.process_group is not None:
            raise RuntimeError(
                "an AdamS with a process_group cannot be copied or pickled: build another one and load this one's "
                "state_dict()"
            )
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_decay_schedule" not in self.__dict__:
            self._decay_schedule = WeightDecaySchedule(self, **{key: self.defaults[key] for key in OPTIONS})


_graph_capture_check = (
    getattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", None)
    or torch.optim.Optimizer._cuda_graph_capture_health_check
)


def _have_one_layout(lists: Sequence[list[Tensor]]) -> bool:
    """Whether tensors at the same place of all lists correspond in memory: these kernels walk through it, and on CPU
    they do not look at strides."""
    return all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists) or all(map(_same_layout, *lists))


def _fused_adamw_on_cpu(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    beta1: float | Tensor,
    beta2: float | Tensor,
    found_inf: Tensor | None,
    **options: Any,
) -> None:
    """
    [`torch.optim.adamw.adamw`] with `fused=True` for parameters of one dtype, the same numbers.

    Per tensor that function takes longer than the kernel does for a thousand elements: it groups the lists by device
    and dtype, and adds the number 1 to each step count by itself, which must be made a tensor each time.

    Args:
        options: `lr`, `weight_decay`, `eps`, `amsgrad`, `maximize` and `grad_scale` of that function.
    """
    torch._foreach_add_(steps, [torch.tensor(1.0, device="cpu")] * len(steps))  # pyright: ignore[reportPrivateImportUsage]
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        beta1=float(beta1),
        beta2=float(beta2),
        found_inf=found_inf,
        **options,
    )
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))  # pyright: ignore[reportPrivateImportUsage]


def _same_layout(p: Tensor, *others: Tensor) -> bool:
    """Whether the elements of all correspond in memory, in which there are no gaps."""
    stride = p.stride()
    if any(other.stride() != stride for other in others):
        return False
    return is_dense(p)
