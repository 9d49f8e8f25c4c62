"""differentiable=True: the same values, and derivatives, the schedule's included, that finite differences confirm."""

from __future__ import annotations

import pytest
import torch
from lockstep import LockStep, assert_close
from torch.autograd import gradcheck

from hf_swd import AdamS


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("reference_steps", [0, 3], ids=lambda k: f"K{k}")
def test_values_equal_reference(reference_steps, amsgrad):
    # torch takes beta ** step from a float32 step count on this path (AdamW's too), hence 1e-6 for the weights.
    pair = LockStep(differentiable=True, reference_steps=reference_steps, amsgrad=amsgrad, rtol=1e-6)
    # What autograd knows as a result may be changed in place by step(); a leaf may not.
    pair.optimizer.param_groups[0]["params"] = [p.clone() for p in pair.params]
    for _ in range(10):
        pair.run(1)
        assert_close(pair.optimizer.grad_rms, pair.reference.grad_rms, 1e-12)


def trained(cls, w, v, g, **kwargs):
    """The weights after three steps, as a function of the first ones: each gradient depends on the weights."""
    p, q = w.clone(), v.clone()
    optimizer = cls([p, q], lr=0.1, weight_decay=0.3, differentiable=True, **kwargs)
    for _ in range(3):
        p.grad, q.grad = g * p.clone() ** 2 + 1, q.clone() * g.sum()
        optimizer.step()
    return p.clone(), q.clone()


def adamw_is_differentiable_through_several_steps():
    """Not in torch 2.6, whose own lerp_ overwrites what its derivative needs."""
    inputs = [torch.full((n,), 0.7, dtype=torch.float64, requires_grad=True) for n in (3, 2, 3)]
    try:
        trained(torch.optim.AdamW, *inputs)[0].sum().backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(
    not adamw_is_differentiable_through_several_steps(), reason="torch's AdamW differentiates one step only"
)
@pytest.mark.parametrize(
    "kwargs", [{}, {"maximize": True}, {"reference_steps": 2}, {"betas": (0.5, 0.9)}],
    ids=["plain", "maximize", "reference_steps", "betas"],
)  # fmt: skip
def test_weights_after_three_steps_with_respect_to_first_weights_and_gradients(kwargs):
    """The derivative runs through the moments and through v_bar.

    Not with amsgrad, of which torch's own AdamW differentiates one step only.
    """

    def train(*inputs):
        return trained(AdamS, *inputs, **kwargs)

    gradcheck(train, [torch.rand(n, dtype=torch.float64, requires_grad=True) + 0.5 for n in (3, 2, 3)])


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_one_step_with_respect_to_weight_gradient_and_moments(amsgrad):
    """As torch's own suite does it: the state is put into the optimizer by hand."""

    def step(w, g, exp_avg, exp_avg_sq, max_exp_avg_sq):
        p = w.clone()
        p.grad = g
        optimizer = AdamS([p], lr=0.9, weight_decay=0.1, differentiable=True, amsgrad=amsgrad)
        state = {"step": torch.tensor(10.0), "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()}
        if amsgrad:
            state["max_exp_avg_sq"] = max_exp_avg_sq.clone()
        optimizer.state[p].update(state)
        optimizer.step()
        return p.clone()

    values = [torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    gradcheck(step, values)
