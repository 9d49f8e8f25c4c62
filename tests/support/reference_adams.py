"""AdamS as the paper writes it, in float64 and in two passes: the yardstick of the test suite.

Nothing here is fast, shared with `hf_swd`, or incremental: the mean of the bias-corrected second moments is taken over
every element at every step.

    v_bar  = mean of v_hat over all elements of all parameters that have a gradient
    theta <- (1 - lr * decay) theta - lr * m_hat / (sqrt(v_hat) + eps),    decay = weight_decay / sqrt(v_bar)

Source: Xie et al., "On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them", NeurIPS 2023, algorithm
AdamS.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt

import torch
from torch import Tensor


DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 5e-4, "amsgrad": False, "maximize": False}


def as_real64(tensor: Tensor) -> Tensor:
    """Detached float64 copy; a complex element becomes two reals."""
    tensor = tensor.detach()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double().clone()


def rms_of_moments(optimizer: torch.optim.Optimizer) -> float:
    """sqrt(v_bar) as the moments in an optimizer's state tell it, over every element of every parameter that has any;
    sharded ones are put together first."""
    total, count = 0.0, 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p)
            if state and state["step"]:
                v = state["exp_avg_sq"].detach()
                v = as_real64(v.full_tensor() if hasattr(v, "full_tensor") else v)
                total += v.sum().item() / (1 - float(group["betas"][1]) ** float(state["step"]))
                count += v.numel()
    return sqrt(total / count) if count else 0.0


def fresh_state(p: Tensor) -> dict:
    """State of a parameter before its first step: steps, moments, maximum of the second."""
    return {"t": 0, **{name: torch.zeros_like(p) for name in ("m", "v", "v_max")}}


class ReferenceAdamS:
    """
    The paper's algorithm on its own float64 copies of the parameters.

    Args:
        groups: parameter groups as for a torch optimizer; keys that a group lacks come from `defaults`.
        reference_steps: K; with K > 0 the decay is `weight_decay` before step K and
            `weight_decay * sqrt(v_bar_K / v_bar)` from step K on.
        unclipped_norm: v_bar is the mean of a second moment of its own, of the gradients before clipping (then never
        the maximum).
        defaults: lr, betas, eps, weight_decay, amsgrad, maximize.
    """

    def __init__(
        self, groups: Sequence[dict], *, reference_steps: int = 0, unclipped_norm: bool = False, **defaults
    ) -> None:
        self.defaults = {**DEFAULTS, **defaults}
        self.reference_steps = reference_steps
        self.unclipped_norm = unclipped_norm
        self.steps = 0
        self.v_bar = 0.0
        self.reference_rms = 0.0
        self.groups: list[dict] = []
        for group in groups:
            self.add_group(group)

    def add_group(self, group: dict) -> None:
        params = [as_real64(p) for p in group["params"]]
        state = [fresh_state(p) for p in params]
        self.groups.append({**self.defaults, **group, "params": params, "state": state, "decay": None})

    @property
    def grad_rms(self) -> float:
        return sqrt(self.v_bar)

    def step(
        self,
        gradients: Sequence[Sequence[Tensor | None]],
        unclipped: Sequence[Sequence[Tensor | None]] | None = None,
        *,
        mean: float | None = None,
    ) -> None:
        """One step; `gradients[i][j]` belongs to parameter j of group i, and None means that it has none. `unclipped`:
        what they were before clipping, if it is not the same. `mean`: v_bar, where it is not to be taken of the
        moments."""
        present = self._update_moments(gradients)
        if not present:
            return
        if any(p.numel() for _, p, _ in present):  # there is no mean over nothing
            self._advance(present, unclipped or gradients, mean)
        for group in self.groups:
            group["decay"] = self._decay(group)
        self._update_weights(present, [group["decay"] for group, _, _ in present])

    def _advance(self, present: list[tuple[dict, Tensor, dict]], unclipped: Sequence, mean: float | None) -> None:
        if self.unclipped_norm:
            mean = self._mean_before_clipping(unclipped)
        else:
            self._take_over(present)
            mean = self._mean_of_moments(present) if mean is None else mean
        self.v_bar = mean
        if self.v_bar != 0:  # zero gradients from the start are no step of the schedule
            self.steps += 1
            if self.steps >= self.reference_steps > 0 and self.reference_rms == 0 and isfinite(self.grad_rms):
                self.reference_rms = self.grad_rms

    def adamw_step(self, gradients: Sequence[Sequence[Tensor | None]]) -> None:
        """One step of AdamW with the constant decay `weight_decay`, of which the schedule learns nothing but the
        moments."""
        present = self._update_moments(gradients)
        self._update_weights(present, [group["weight_decay"] for group, _, _ in present])

    def forget(self) -> None:
        """The schedule begins anew, with moments that there are."""
        self.steps, self.v_bar, self.reference_rms = 0, 0.0, 0.0

    def _take_over(self, present: list[tuple[dict, Tensor, dict]]) -> None:
        """Where a schedule without a step finds moments, another optimizer has made them, and its steps count: those
        of the parameters that step now, in the mean over their elements."""
        if self.steps == 0 and any(s["before"] for _, _, s in present):
            count = sum(s["v"].numel() for _, _, s in present)
            self.steps = round(sum((s["t"] - 1) * s["v"].numel() for _, _, s in present) / count)

    def _update_moments(self, gradients: Sequence) -> list[tuple[dict, Tensor, dict]]:
        """Group, parameter and state of every parameter that has a gradient."""
        present = [
            (group, p, s, as_real64(g))
            for group, grads in zip(self.groups, gradients, strict=True)
            for p, s, g in zip(group["params"], group["state"], grads, strict=True)
            if g is not None
        ]
        for group, _, s, g in present:
            beta1, beta2 = group["betas"]
            g = -g if group["maximize"] else g
            s["before"] = bool(s["v"].any())
            s["t"] += 1
            s["m"] = beta1 * s["m"] + (1 - beta1) * g
            s["v"] = beta2 * s["v"] + (1 - beta2) * g * g
            s["v_max"] = torch.maximum(s["v_max"], s["v"])
        return [entry[:3] for entry in present]

    def _mean_of_moments(self, present: list[tuple[dict, Tensor, dict]]) -> float:
        count = sum(s["v"].numel() for _, _, s in present)
        sums = (
            # Of moments that are rounded to half precision the maximum may be the smaller one.
            max(s["v"].sum().item(), s["v_max"].sum().item() if group["amsgrad"] else 0.0)
            / (1 - group["betas"][1] ** s["t"])
            for group, _, s in present
        )
        return sum(sums) / count

    def _mean_before_clipping(self, unclipped: Sequence) -> float:
        pairs = [
            (group["betas"][1], as_real64(g))
            for group, grads in zip(self.groups, unclipped, strict=True)
            for g in grads
            if g is not None
        ]
        beta2, t = pairs[0][0], self.steps + 1
        new = sum(g.square().sum().item() for _, g in pairs) / sum(g.numel() for _, g in pairs)
        return (beta2 * (1 - beta2 ** (t - 1)) * self.v_bar + (1 - beta2) * new) / (1 - beta2**t)

    def _update_weights(self, present: list[tuple[dict, Tensor, dict]], decays: Sequence[float]) -> None:
        for (group, p, s), decay in zip(present, decays, strict=True):
            beta1, beta2 = group["betas"]
            m_hat = s["m"] / (1 - beta1 ** s["t"])
            v_hat = (s["v_max"] if group["amsgrad"] else s["v"]) / (1 - beta2 ** s["t"])
            p.mul_(1 - group["lr"] * decay)
            p.sub_(group["lr"] * m_hat / (v_hat.sqrt() + group["eps"]))

    def _decay(self, group: dict) -> float:
        if group["weight_decay"] == 0 or self.v_bar == 0:
            return 0.0
        if self.reference_steps and self.reference_rms == 0:
            decay = group["weight_decay"]
        else:
            decay = group["weight_decay"] * (self.reference_rms if self.reference_steps else 1.0) / self.grad_rms
        return min(decay, 1 / group["lr"]) if group["lr"] > 0 else decay
