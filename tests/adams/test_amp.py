"""Loss scaling and gradients that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from lockstep import HYPER, PATHS, LockStep, error, parameters
from torch.nn import Parameter

from hf_swd import AdamS


every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
every_unscale = pytest.mark.parametrize("unscale", [False, True], ids=["scaler_unscales", "unscaled_before"])


class Scaled:
    """A pair whose optimizer is stepped by a GradScaler."""

    def __init__(self, pair: LockStep, unscale: bool, clip: float | None = None, in_step: bool = False) -> None:
        self.pair, self.unscale, self.clip = pair, unscale, clip
        schedule = pair.optimizer.schedule
        self.clip_ = schedule.clip_in_step if in_step else schedule.clip_grad_norm_
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        self.scaler.scale(torch.zeros(()))  # the scale is made lazily

    def step(self) -> None:
        if self.unscale:
            self.scaler.unscale_(self.pair.optimizer)
        if self.clip:
            self.clip_(self.clip)
        self.scaler.step(self.pair.optimizer)
        self.scaler.update()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.pair.step(call=self.step, scale=self.scaler.get_scale())

    def overflow(self, value: float, where: int) -> None:
        self.pair.set_gradients(self.pair.gradients(), self.scaler.get_scale())
        self.pair.params[where].grad.view(-1)[0] = value
        self.step()


def snapshot(optimizer: AdamS) -> tuple:
    tensors = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    tensors += [value.clone() for state in optimizer.state.values() for value in state.values()]
    groups = optimizer.state_dict()["param_groups"]
    return tensors, (optimizer.grad_rms, optimizer.schedule.step_count, groups)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@every_unscale
@every_path
def test_scaled_gradients_equal_unscaled_ones(path, unscale, amsgrad):
    Scaled(LockStep(path=path, amsgrad=amsgrad), unscale).run(20)


@pytest.mark.parametrize("clip", [0.1, 100.0], ids=["clipped", "not_clipped"])
@every_path
def test_norm_of_clip_grad_norm_after_unscale(path, clip):
    pair = LockStep(path=path)
    scaled = Scaled(pair, unscale=True, clip=clip)
    for _ in range(10):
        gradients = pair.gradients()
        total = math.sqrt(sum(g.square().sum().item() for g in gradients[0]))
        pair.set_gradients(gradients, scaled.scaler.get_scale())
        scaled.step()
        pair.rtol = 1e-6  # clip_grad_norm_ returns, and may clip by, a float32 norm
        pair.step_reference([[g * min(1.0, clip / (total + 1e-6)) for g in gradients[0]]])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("reference_steps", [0, 3], ids=lambda k: f"K{k}")
@every_unscale
@every_path
def test_overflow_skips_step_and_schedule(path, unscale, reference_steps, value):
    pair = LockStep(path=path, reference_steps=reference_steps)
    scaled = Scaled(pair, unscale)
    scaled.run(2)
    tensors, schedule = snapshot(pair.optimizer)

    scaled.overflow(value, where=1)
    scaled.overflow(value, where=0)

    after, schedule_after = snapshot(pair.optimizer)
    assert schedule_after == schedule
    assert all(torch.equal(a, b) for a, b in zip(after, tensors, strict=True))
    scaled.run(5)


@every_path
def test_overflow_where_the_norm_was_measured_before_the_step(path):
    """As a Trainer does it: of the overflow, the scaler tells the optimizer only in the step."""
    pair = LockStep(path=path)
    scaled = Scaled(pair, unscale=True, clip=1e9, in_step=True)
    scaled.run(2)
    tensors, schedule = snapshot(pair.optimizer)

    scaled.overflow(math.inf, where=1)
    pair.optimizer.schedule.forget_clipping()  # as a Trainer does if the scaler has left the step out

    after, schedule_after = snapshot(pair.optimizer)
    assert schedule_after == schedule
    assert all(torch.equal(a, b) for a, b in zip(after, tensors, strict=True))
    scaled.run(5)


@every_unscale
@every_path
def test_overflow_at_the_first_step(path, unscale):
    pair = LockStep(path=path, reference_steps=2)
    scaled = Scaled(pair, unscale)

    scaled.overflow(math.inf, where=0)

    assert (pair.optimizer.grad_rms, pair.optimizer.schedule.step_count) == (0.0, 0)
    group = pair.optimizer.param_groups[0]
    # The schedule knows no gradient yet. A step that torch's GradScaler leaves out is no step, and shows nothing.
    assert group["weight_decay"] in (0.0, group["initial_weight_decay"])
    assert group["initial_weight_decay"] == HYPER["weight_decay"]
    scaled.run(5)


class TestWithoutScaler:
    """The affected parameter becomes what AdamW makes of it, and grad_rms says so for ever."""

    @pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
    @pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
    @pytest.mark.parametrize("reference_steps", [0, 3, 8], ids=lambda k: f"K{k}")
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @every_path
    def test_schedule_never_returns_to_plausible_values(self, path, reference_steps, value, amsgrad):
        pair = LockStep(path=path, reference_steps=reference_steps, amsgrad=amsgrad)
        pair.run(5)
        gradients = pair.gradients()
        gradients[0][0].view(-1)[0] = value

        pair.set_gradients(gradients)
        pair.optimizer.step()
        pair.reference.step(gradients)

        for _ in range(10):
            assert not math.isfinite(pair.optimizer.grad_rms)
            gradients = pair.gradients()
            pair.set_gradients(gradients)
            pair.optimizer.step()
            pair.reference.step(gradients)
            if math.isinf(value):  # v_bar is inf, and the decay 0
                assert error(pair.params[1], pair.reference.groups[0]["params"][1]) <= 1e-12
        assert pair.params[0].detach().view(-1)[0].isnan()
        assert not math.isfinite(pair.resumed().optimizer.grad_rms)

    @pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
    @every_path
    def test_group_without_decay_is_adam_bit_for_bit(self, path, value):
        params = parameters()
        twins = [Parameter(p.detach().clone()) for p in params]
        adams = AdamS([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}], lr=1e-2, **path)
        adam = torch.optim.Adam(twins, lr=1e-2, **(path or {"fused": True}))
        for step in range(6):
            for p, twin in zip(params, twins, strict=True):
                p.grad = torch.randn_like(p)
                if step == 2 and p is params[0]:
                    p.grad.view(-1)[0] = value
                twin.grad = p.grad.clone()
            adams.step()
            adam.step()

        assert params[0].detach().isnan().any()
        assert all(torch.equal(p, twin) for p, twin in zip(params[2:], twins[2:], strict=True))
        assert all(p.detach().isfinite().all() for p in params[2:])
