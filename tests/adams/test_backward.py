"""An optimizer that steps during the backward pass stops; what only looks like it goes on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn import Parameter

from hf_swd import AdamS, ScheduledWeightDecay


def scheduled_adamw(params, **options):
    optimizer = torch.optim.AdamW(params, **options)
    ScheduledWeightDecay(optimizer)
    return optimizer


both = pytest.mark.parametrize("build", [AdamS, scheduled_adamw])


@both
def test_optimizer_in_backward(build):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    before = [p.detach().clone() for p in model.parameters()]
    _apply_optimizer_in_backward(build, model.parameters(), {"lr": 0.1, "weight_decay": 0.01})
    with pytest.raises(RuntimeError, match=r"during the backward pass.*call step\(\) once, after backward"):
        model(torch.ones(2, 3)).sum().backward()
    assert all(map(torch.equal, before, model.parameters()))


@both
def test_hook_that_steps_after_a_gradient_was_accumulated(build):
    p = Parameter(torch.ones(3))
    optimizer = build([p], lr=0.1)
    p.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(RuntimeError, match="during the backward pass"):
        p.square().sum().backward()
    assert torch.equal(p, torch.ones(3))


def test_other_optimizers_step_in_backward_as_ever():
    p = Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    p.square().sum().backward()
    assert not torch.equal(p, torch.ones(3))


@both
def test_backward_within_the_step(build):
    """In a closure, the other way round."""
    p = Parameter(torch.ones(3))
    optimizer = build([p], lr=0.1)
    optimizer.step(lambda: p.square().sum().backward())
    assert not torch.equal(p, torch.ones(3))


@both
@pytest.mark.filterwarnings("ignore")
def test_compiled_step_after_a_compiled_backward(build):
    p = Parameter(torch.ones(3))
    optimizer = build([p], lr=0.1)

    @torch.compile(backend="eager")
    def loss():
        return p.square().sum()

    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        loss().backward()
        step()
        optimizer.zero_grad()
    assert not torch.equal(p, torch.ones(3))
