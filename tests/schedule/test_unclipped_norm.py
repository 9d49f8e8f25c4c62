"""`unclipped_norm=True`: the schedule follows the gradients before clipping, Adam's moments those after it."""

from __future__ import annotations

import copy

import pytest
import torch
from lockstep import HYPER, parameters

from hf_swd import AdamS, ScheduledWeightDecay


MAX_NORM = 0.5  # of gradients whose norm lies between 0.3 and 1.5
OPTIONS = {"unclipped_norm": True, "max_grad_norm": MAX_NORM}


def train_one(optimizer, params, seed):
    torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()


def test_it_matters():
    """The very same clipped steps give another decay than the schedule of the clipped gradients."""
    decays = []
    for unclipped_norm in (False, True):
        torch.manual_seed(0)
        params = parameters()
        optimizer = AdamS(params, **HYPER, **{**OPTIONS, "unclipped_norm": unclipped_norm})
        for seed in range(10):
            train_one(optimizer, params, seed)
        decays.append(optimizer.param_groups[0]["weight_decay"])
    assert decays[1] < 0.7 * decays[0]


class TestCheckpoints:
    def test_checkpoint_brings_its_own_setting(self):
        params = parameters()
        saved = AdamS(params, **HYPER, **OPTIONS)
        train_one(saved, params, 0)
        fresh = AdamS(copy.deepcopy(params), **HYPER)
        fresh.load_state_dict(saved.state_dict())
        assert fresh.schedule.unclipped_norm and fresh.schedule.max_grad_norm == MAX_NORM

    def test_adamws_checkpoint_does_not(self):
        params = parameters()
        adamw = torch.optim.AdamW(params)
        for p in params:
            p.grad = torch.ones_like(p)
        adamw.step()
        fresh = AdamS(copy.deepcopy(params), unclipped_norm=True, **HYPER)
        fresh.load_state_dict(adamw.state_dict())
        assert fresh.schedule.unclipped_norm


@pytest.mark.parametrize("owner", ["adams", "adamw"])
def test_zero_gradients_are_known(owner):
    """By such steps torch.distributed.checkpoint makes an optimizer allocate its state."""
    params = parameters()
    optimizer = (AdamS if owner == "adams" else torch.optim.AdamW)(
        params, lr=0.0, **({} if owner == "adamw" else {"unclipped_norm": True})
    )
    if owner == "adamw":
        ScheduledWeightDecay(optimizer, unclipped_norm=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()


@pytest.mark.parametrize("build", [AdamS, lambda p, **kw: ScheduledWeightDecay(torch.optim.AdamW(p), **kw)])
def test_not_a_flag(build):
    with pytest.raises(TypeError, match="unclipped_norm='yes': expected"):
        build(parameters(), unclipped_norm="yes")
