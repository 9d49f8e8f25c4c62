"""Wrappers of optimizers, of others, too: every step of the process goes by the look for a schedule."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from hf_swd import AdamS, ScheduledWeightDecay, attach
from hf_swd.core.wrappers import schedule_of, unwrapped


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


class CallsItselfItsOptimizer(torch.optim.AdamW):
    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.optimizer = self


def stepped(optimizer, p):
    p.grad = torch.ones_like(p)
    optimizer.step()
    return p.detach()


def test_optimizer_that_is_its_own_optimizer():
    """It used to hang in its first step, as soon as hf_swd was imported."""
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    foreign = CallsItselfItsOptimizer([p], lr=0.1)
    assert schedule_of(foreign) is None and list(unwrapped(foreign)) == [foreign]
    assert torch.equal(stepped(foreign, p), stepped(torch.optim.AdamW([q], lr=0.1), q))
    with pytest.raises(ValueError, match="no weight decay schedule"):
        attach(foreign)
    schedule = ScheduledWeightDecay(foreign)
    assert schedule.optimizer is foreign and schedule_of(Wrapper(foreign)) is schedule
    stepped(foreign, p)
    assert schedule.step_count == 2 and schedule.grad_rms == pytest.approx(1)  # AdamW has made the first


def test_wrappers_in_a_circle():
    outer = Wrapper(None)
    inner = Wrapper(outer)
    outer.optimizer = inner
    assert list(unwrapped(outer)) == [outer, inner] and schedule_of(outer) is None


def test_schedule_is_found_through_wrappers():
    adams = AdamS([Parameter(torch.ones(3))])
    assert schedule_of(Wrapper(Wrapper(adams))) is adams.schedule
    adamw = torch.optim.AdamW([Parameter(torch.ones(3))])
    assert ScheduledWeightDecay(Wrapper(Wrapper(adamw))).optimizer is adamw


@pytest.mark.parametrize("optimizer", [None, object(), Wrapper(None), Wrapper(object())])
def test_what_wraps_no_optimizer(optimizer):
    assert schedule_of(optimizer) is None
    with pytest.raises(TypeError, match="expected a torch.optim.Optimizer"):
        ScheduledWeightDecay(optimizer)


def test_attach_to_an_optimizer_of_another_model():
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = AdamS(model.parameters())
    with pytest.raises(RuntimeError, match="none of the model's trainable parameters"):
        attach(optimizer, other)
    other.requires_grad_(False)  # a model that trains nothing tells nothing
    assert attach(optimizer, other) is attach(optimizer, model) is optimizer.schedule


@pytest.mark.parametrize("kept", ["a list", "a name", "a class"])
def test_what_others_keep_under_that_name_is_no_optimizer(kept):
    p = Parameter(torch.ones(3))
    foreign = torch.optim.AdamW([p], lr=0.1)
    foreign.optimizer = {"a list": [torch.optim.AdamW([p])], "a name": "adamw", "a class": torch.optim.AdamW}[kept]
    assert list(unwrapped(foreign)) == [foreign]
    schedule = ScheduledWeightDecay(foreign)
    stepped(foreign, p)
    assert schedule.step_count == 1
