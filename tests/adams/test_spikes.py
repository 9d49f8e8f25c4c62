"""What docs/algorithm.md says of gradients that are infinite or very large, where nothing skips their step."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Embedding, Linear, Parameter, Sequential, Tanh
from torch.nn.functional import cross_entropy

from hf_swd import AdamS


BETA2 = 0.999


class Run:
    """1,010 weights, gradients of rms 0.01 and so of norm 0.32."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = AdamS, clip: float | None = None, **options):
        generator = torch.Generator().manual_seed(0)
        self.params = [Parameter(torch.randn(shape, generator=generator)) for shape in ((100, 10), (10,))]
        if clip is not None:
            options["max_grad_norm"] = clip
        self.optimizer = optimizer(self.params, lr=1e-4, weight_decay=5e-4, betas=(0.9, BETA2), **options)
        self.generator = generator

    @property
    def decay(self) -> float:
        return self.optimizer.param_groups[0]["weight_decay"]

    def steps(self, count: int, spike: float | None = None) -> float:
        """The decay after some steps, in the first of which one element's gradient may be another."""
        for step in range(count):
            for p in self.params:
                p.grad = 0.01 * torch.randn(p.shape, generator=self.generator)
            if spike is not None and step == 0:
                self.params[0].grad[0, 0] = spike
            self.optimizer.step()
        return self.decay


def test_after_a_spike_the_decay_doubles_every_so_many_steps():
    run = Run()
    before = run.steps(500)
    at = run.steps(1, spike=1e6)
    # The bias correction is still that of step 501.
    assert before / at == pytest.approx(1e6 * math.sqrt((1 - BETA2) / (1 - BETA2**501)) / 0.318, rel=0.05)
    corrected = at / math.sqrt(1 - BETA2**501)
    after = run.steps(round(2 * math.log(2) / (1 - BETA2))) / math.sqrt(1 - BETA2 ** (501 + 1386))
    assert after / corrected == pytest.approx(2, rel=0.01)


def test_spike_whose_square_overflows_ends_the_decay_and_adamw_goes_on():
    run, adamw, adam = Run(), Run(torch.optim.AdamW), Run()
    for each in (run, adamw, adam):
        each.steps(100)
        each.steps(1, spike=1e20)
    adam.optimizer.param_groups[0]["weight_decay"] = 0.0  # Adam from here on
    for each in (run, adamw, adam):
        each.steps(500)
        assert all(p.isfinite().all() for p in each.params)
    assert run.decay < 1e-15
    assert all(torch.equal(p, q) for p, q in zip(run.params, adam.params, strict=True))


def test_clamped_moments_bring_the_decay_back():
    run = Run()
    before = run.steps(500)
    run.steps(20, spike=1e20)
    assert run.decay == 0
    for state in run.optimizer.state.values():
        state["exp_avg"].clamp_(-0.05, 0.05)
        state["exp_avg_sq"].clamp_(max=0.05**2)
    run.optimizer.schedule.refresh()
    weights = [p.detach().clone() for p in run.params]
    assert run.steps(1) == pytest.approx(before, rel=0.03)
    assert max((p - old).abs().max() for p, old in zip(run.params, weights, strict=True)) < 1e-3


@pytest.mark.parametrize("spike", [1e6, 1e18])
def test_clipped_spike_hardly_shows_unless_the_schedule_follows_the_unclipped_norm(spike):
    run, unclipped = Run(clip=1.0), Run(clip=1.0, unclipped_norm=True)
    before = run.steps(500)
    assert run.steps(1, spike) == pytest.approx(before, rel=0.02)
    assert unclipped.steps(500) == pytest.approx(before, rel=0.02)
    assert unclipped.steps(1, spike) < before / 1e4


@pytest.mark.parametrize("clip", [None, 1.0], ids=["not-clipped", "clipped"])
@pytest.mark.parametrize("is_used", [True, False], ids=["weight-in-use", "row-not-in-use"])
def test_infinity_in_a_gradient(is_used, clip):
    """A weight becomes NaN; what becomes of the others depends on whether it is used, and on clipping."""
    embedding = Embedding(10, 4)
    model = Sequential(embedding, Linear(4, 4), Tanh(), Linear(4, 2))
    params = list(model.parameters())
    optimizer = AdamS(params, lr=1e-3, weight_decay=5e-4, max_grad_norm=clip or 0.0)
    decays, not_a_number = [], []
    for step in range(5):
        loss = cross_entropy(model(torch.randint(0, 9, (8,))), torch.randint(0, 2, (8,)))
        optimizer.zero_grad()
        loss.backward()
        if step == 2:
            (model[1].weight.grad if is_used else embedding.weight.grad)[-1, -1] = math.inf
        optimizer.step()
        decays.append(optimizer.param_groups[0]["weight_decay"])
        not_a_number.append(sum(int(p.isnan().sum()) for p in params))

    everything = sum(p.numel() for p in params)
    assert all(decay > 0 for decay in decays[:2]) and not_a_number[:2] == [0, 0]
    assert not_a_number[2:] == ([1, everything, everything] if is_used else [1, 1, 1])
    if is_used:
        assert all(map(math.isnan, decays[3:]))
    assert (decays[2] == 0) == (clip is None)
    if not is_used:
        assert decays[3:] == [0, 0] if clip is None else all(0 < decay < math.inf for decay in decays[3:])


@pytest.mark.parametrize("in_step", [False, True], ids=["clipped-at-once", "in-the-step"])
@pytest.mark.parametrize("spike", [2e19, 1e20, 3e38])
def test_clipped_spike_whose_square_overflows_is_a_step_without_a_gradient(spike, in_step):
    """As with torch's clipping and AdamW: the norm is infinite, so that everything is multiplied by zero."""
    run, adamw = Run(clip=1.0 if in_step else None), Run(torch.optim.AdamW)
    usual = run.steps(100)
    adamw.steps(100)
    for each in (run, adamw):
        for p in each.params:
            p.grad = torch.ones_like(p)
        each.params[0].grad[0, 0] = spike
    if not in_step:
        assert run.optimizer.clip_grad_norm_(1.0) == math.inf
    torch.nn.utils.clip_grad_norm_(adamw.params, 1.0)
    run.optimizer.step()
    adamw.optimizer.step()
    assert run.decay == pytest.approx(usual, rel=0.1)
    for p, q in zip(run.params, adamw.params, strict=True):
        assert p.isfinite().all()
        assert torch.equal(run.optimizer.state[p]["exp_avg"], adamw.optimizer.state[q]["exp_avg"])
