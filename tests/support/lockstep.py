"""An AdamS and the reference on the same gradients, compared after every step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from reference_adams import ReferenceAdamS, as_real64
from torch import Tensor
from torch.nn import Parameter

from hf_swd import AdamS


PATHS = {
    "default": {},
    "foreach": {"foreach": True},
    "forloop": {"foreach": False, "fused": False},
    "fused": {"fused": True},
}
SHAPES = ((5, 3), (7,), (), (2, 3, 4))
# Gradients are of order 0.1, so that a step decays the weights by about 1e-3: an error in the schedule shows in them.
HYPER = {"lr": 1e-2, "weight_decay": 1e-2}
# The bounds of issue 2. float32 leaves room for 200 rounded updates; low precision is tested against torch's own
# kernels.
RTOL = {torch.float64: 1e-12, torch.complex128: 1e-12, torch.float32: 1e-5, torch.complex64: 1e-5}

Gradients = list[list[Tensor | None]]


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[Parameter]:
    return [Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest element; 0 for equal tensors, also where both are NaN or inf."""
    actual = as_real64(actual)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if same.all():
        return 0.0
    return ((actual - expected)[~same].abs().max() / expected.abs().max()).item()


def assert_close(actual: float | Tensor, expected: float, rtol: float, what: str = "value") -> None:
    actual = float(actual)
    assert math.isclose(actual, expected, rel_tol=rtol) or (math.isnan(actual) and math.isnan(expected)), (
        f"{what}: {actual!r} instead of {expected!r}"
    )


class LockStep:
    """
    AdamS and the reference side by side.

    Args:
        groups: parameter groups (default: one group with parameters of several shapes).
        path: what chooses the kernels (a value of `PATHS`); only for AdamS.
        rtol: bound on the error of the weights after every step (default: by dtype).
        kwargs: the other arguments of both.
    """

    def __init__(
        self, groups: list[dict] | None = None, *, path: dict | None = None, rtol: float | None = None, **kwargs
    ):
        groups = groups or [{"params": parameters()}]
        self.overrides = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.kwargs = {**HYPER, **kwargs, **(path or {})}
        self.rtol = rtol or RTOL[groups[0]["params"][0].dtype]
        self.optimizer = AdamS([dict(group) for group in groups], **self.kwargs)
        options = {key: value for key, value in kwargs.items() if key != "max_grad_norm"}
        self.reference = ReferenceAdamS(groups, **{**HYPER, **options})
        self.seed = 0

    @property
    def params(self) -> list[Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def gradients(self, missing: Callable[[int, int], bool] = lambda i, step: False) -> Gradients:
        """New random gradients, whose size changes from step to step; `missing(i, step)`: parameter i has none."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        scale = 0.1 * 2 ** math.sin(self.seed / 5)
        numbers = iter(range(len(self.params)))
        return [
            [
                None
                if missing(next(numbers), self.seed)
                else (torch.randn(p.shape, dtype=p.dtype, generator=generator) * scale)
                for p in group["params"]
            ]
            for group in self.optimizer.param_groups
        ]

    def set_gradients(self, gradients: Gradients, scale: float = 1.0) -> None:
        for group, grads in zip(self.optimizer.param_groups, gradients, strict=True):
            for p, g in zip(group["params"], grads, strict=True):
                p.grad = None if g is None else g.clone() * scale

    def step(
        self, gradients: Gradients | None = None, *, call: Callable[[], object] | None = None, scale: float = 1.0
    ) -> None:
        """One step of both, compared. `call` replaces `optimizer.step()`; the optimizer gets `scale` times them."""
        gradients = self.gradients() if gradients is None else gradients
        self.set_gradients(gradients, scale)
        (call or self.optimizer.step)()
        self.step_reference(gradients)

    def step_reference(self, gradients: Gradients, unclipped: Gradients | None = None) -> None:
        """The reference's step, with the optimizer's present learning rates and betas; then compare. `unclipped`: what
        gradients were before clipping."""
        for group, mine in zip(self.reference.groups, self.optimizer.param_groups, strict=True):
            group.update(lr=float(mine["lr"]), betas=tuple(float(beta) for beta in mine["betas"]))
        self.reference.step(gradients, unclipped)
        self.compare()

    def run(self, steps: int, missing: Callable[[int, int], bool] = lambda i, step: False) -> None:
        for _ in range(steps):
            self.step(self.gradients(missing))

    def add_group(self, group: dict) -> None:
        self.overrides.append({key: value for key, value in group.items() if key != "params"})
        self.reference.add_group(group)
        self.optimizer.add_param_group(dict(group))

    def set_weight_decay(self, index: int, value: float) -> None:
        self.optimizer.param_groups[index]["weight_decay"] = self.reference.groups[index]["weight_decay"] = value

    def compare(self) -> None:
        where = f"after step {self.reference.steps}"
        assert_close(self.optimizer.grad_rms, self.reference.grad_rms, min(self.rtol, 1e-6), f"grad_rms {where}")
        for i, (mine, group) in enumerate(zip(self.optimizer.param_groups, self.reference.groups, strict=True)):
            if group["decay"] is not None:
                decay = float(mine["weight_decay"])
                assert_close(decay, group["decay"], min(self.rtol, 1e-6), f"decay of group {i} {where}")
            for j, (p, expected) in enumerate(zip(mine["params"], group["params"], strict=True)):
                assert error(p, expected) <= self.rtol, f"parameter {j} of group {i} {where}: {error(p, expected):.2e}"

    def resumed(self, through: Callable[[dict], dict] = copy.deepcopy) -> LockStep:
        """A fresh optimizer on copies of the weights, which got this one's state_dict (sent `through` something)."""
        other = copy.copy(self)
        other.optimizer = self.fresh_optimizer()
        other.optimizer.load_state_dict(through(self.optimizer.state_dict()))
        other.reference = copy.deepcopy(self.reference)
        return other

    def fresh_optimizer(self) -> AdamS:
        """Built as this one was, on copies of the weights."""
        groups = [
            {**overrides, "params": [copy.deepcopy(p) for p in group["params"]]}
            for overrides, group in zip(self.overrides, self.optimizer.param_groups, strict=True)
        ]
        return AdamS(groups, **self.kwargs)
