"""clip_grad_norm_ of AdamS and of ScheduledWeightDecay: torch's clipping, for any sharding; it keeps nothing."""

from __future__ import annotations

import math

import pytest
import torch
from lockstep import HYPER, LockStep, parameters
from torch.nn import Parameter

from hf_swd import AdamS, ScheduledWeightDecay


def total_norm(gradients: list[torch.Tensor]) -> float:
    return math.sqrt(math.fsum(g.double().square().sum().item() for g in gradients))


@pytest.mark.parametrize("owner", ["adams", "adamw"])
class TestClipGradNorm:
    """The owner is AdamS itself, or a ScheduledWeightDecay on AdamW: the same method."""

    @staticmethod
    def build(owner, params):
        if owner == "adams":
            optimizer = AdamS(params, **HYPER)
            return optimizer, optimizer
        optimizer = torch.optim.AdamW(params, fused=True, **HYPER)
        return optimizer, ScheduledWeightDecay(optimizer)

    @pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0, math.inf], ids=str)
    @pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
    def test_clips_as_torch_does(self, owner, dtype, rtol, max_norm):
        params = [*parameters(dtype=dtype), *parameters(((100, 300),), dtype=dtype)]
        _, clipper = self.build(owner, params)
        for p in params[1:]:
            p.grad = torch.randn_like(p) * 0.1
        grads = [p.grad for p in params[1:]]
        expected = [Parameter(g.double()) for g in grads]
        for p in expected:
            p.grad = p.detach().clone()
        total = torch.nn.utils.clip_grad_norm_(expected, max_norm)

        norm = clipper.clip_grad_norm_(max_norm)

        assert (norm.shape, norm.dtype) == ((), torch.float32)
        assert norm.item() == pytest.approx(total.item(), rel=1e-6)
        assert params[0].grad is None
        for p, g, q in zip(params[1:], grads, expected, strict=True):
            assert p.grad is g  # in place
            torch.testing.assert_close(g.double(), q.grad, rtol=rtol, atol=0)

    def test_gradients_within_the_norm_keep_their_bits(self, owner):
        params = parameters()
        _, clipper = self.build(owner, params)
        for p in params:
            p.grad = torch.randn_like(p)
        before = [p.grad.clone() for p in params]

        clipper.clip_grad_norm_(1e3)

        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))

    @pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
    def test_norm_that_is_not_finite(self, owner, value):
        params = parameters()
        _, clipper = self.build(owner, params)
        for p in params:
            p.grad = torch.randn_like(p)
        params[0].grad[0, 0] = value
        expected = [Parameter(p.detach().clone()) for p in params]
        for p, q in zip(params, expected, strict=True):
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(expected, 1.0)

        assert not math.isfinite(clipper.clip_grad_norm_(1.0).item())

        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p.grad, q.grad, equal_nan=True)

    def test_no_gradients(self, owner):
        optimizer, clipper = self.build(owner, parameters())
        assert clipper.clip_grad_norm_(1.0).item() == 0.0
        optimizer.step()
        assert clipper.grad_rms == 0.0

    def test_statistics_count_clipped_and_all_steps(self, owner):
        p = Parameter(torch.zeros(4))
        optimizer, clipper = self.build(owner, [p])
        statistics = getattr(clipper, "schedule", clipper).clip_statistics
        assert statistics() == (0, 0)
        for size in (10.0, 0.01, 10.0, 0.01, 10.0):
            p.grad = torch.full_like(p, size)
            clipper.clip_grad_norm_(1.0)
            optimizer.step()
        optimizer.step()  # not clipped by this method, so not counted

        assert statistics() == (3, 5)


class TestWhatCountsAreTheGradientsAtTheStep:
    """Whatever became of them after they were clipped, and whether a version counter shows it or not."""

    MAX_NORM = 0.5

    CHANGES = {
        "none": lambda params: None,
        "backward_again": lambda params: sum((p * torch.randn_like(p)).sum() for p in params).backward(),
        "edited_in_place": lambda params: params[0].grad.mul_(3),
        "smallest_edited_in_place": lambda params: params[-1].grad.fill_(100.0),
        "edited_through_a_view": lambda params: params[0].grad[5:7].add_(10),
        "rows_of_data": lambda params: params[0].grad.data[4:].zero_(),
        "other_data": lambda params: setattr(params[0].grad, "data", params[0].grad.data * (params[0] > 0)),
        "smallest_through_data": lambda params: params[-1].grad.data.mul_(100.0),
        "numpy_view": lambda params: params[0].grad.numpy()[4:].fill(0.0),
        "numpy_view_of_the_smallest": lambda params: params[-1].grad.numpy().fill(100.0),
        "detached": lambda params: params[0].grad.detach().mul_(3),
        "foreach_edit": lambda params: torch._foreach_mul_([p.grad for p in params], 3.0),
        "torchs_own_clipping": lambda params: torch.nn.utils.clip_grad_norm_(params, 0.1),
        "value_clipping": lambda params: torch.nn.utils.clip_grad_value_(params, 0.001),
        "zeroed_and_backward": lambda params: (
            [p.grad.zero_() for p in params],
            sum((p * torch.randn_like(p)).sum() for p in params).backward(),
        ),
        "replaced": lambda params: setattr(params[0], "grad", torch.randn_like(params[0])),
        "replaced_all": lambda params: [setattr(p, "grad", torch.randn_like(p)) for p in params],
        "one_dropped": lambda params: setattr(params[1], "grad", None),
        "exchanged": lambda params: (
            setattr(params[0], "grad", params[0].grad.clone()),
            setattr(params[1], "grad", params[1].grad * 7),
        ),
        # As a GradScaler does, which no version counter shows; of all gradients, and of one.
        "unscaled": lambda params: unscale([p.grad for p in params]),
        "unscaled_but_for_the_smallest": lambda params: unscale([p.grad for p in params[:-1]]),
        "smallest_unscaled": lambda params: unscale([params[-1].grad]),
    }

    @pytest.mark.parametrize("max_norm", [MAX_NORM, 1e9], ids=["clipped", "not_clipped"])
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_changed_after_clipping(self, change, max_norm):
        pair = LockStep([{"params": parameters(((300, 100), (7,), ()))}], rtol=1e-6)
        pair.run(2)
        pair.set_gradients(pair.gradients())
        pair.optimizer.clip_grad_norm_(max_norm)

        change(pair.params)

        gradients = [[None if p.grad is None else p.grad.clone() for p in pair.params]]
        pair.optimizer.step()
        pair.step_reference(gradients)
        pair.run(2)

    def test_new_closure_gradients_are_not_the_clipped_ones(self):
        pair = LockStep(rtol=1e-6)
        pair.set_gradients(pair.gradients())
        pair.optimizer.clip_grad_norm_(self.MAX_NORM)
        gradients = pair.gradients()

        pair.optimizer.step(lambda: pair.set_gradients(gradients))
        pair.step_reference(gradients)

    def test_clipped_twice(self):
        pair = LockStep(rtol=1e-6)
        pair.set_gradients(pair.gradients())
        pair.optimizer.clip_grad_norm_(0.2)
        assert pair.optimizer.clip_grad_norm_(1e9).item() == pytest.approx(0.2, rel=1e-4)
        assert total_norm([p.grad for p in pair.params]) == pytest.approx(0.2, rel=1e-4)

    @pytest.mark.parametrize("step_comes", [True, False])
    def test_what_a_trainer_leaves_to_the_step_is_of_that_step_alone(self, step_comes):
        pair = LockStep(rtol=1e-6)
        gradients = pair.gradients()
        pair.set_gradients(gradients)
        norm = pair.optimizer.schedule.clip_in_step(self.MAX_NORM).item()
        if step_comes:
            pair.optimizer.step()
            pair.step_reference([[g * (self.MAX_NORM / (norm + 1e-6)) for g in group] for group in gradients])
        else:
            pair.optimizer.schedule.forget_clipping()
        pair.run(2)

    def test_nothing_is_deferred(self):
        optimizer = AdamS(parameters())
        with pytest.raises(TypeError, match="defer"):
            optimizer.clip_grad_norm_(1.0, defer=True)


def unscale(grads: list[torch.Tensor]) -> None:
    torch._amp_foreach_non_finite_check_and_unscale_(grads, torch.tensor(0.0), torch.tensor(1 / 64))
