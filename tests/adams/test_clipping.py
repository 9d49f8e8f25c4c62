"""clip_grad_norm_ of AdamS and of ScheduledWeightDecay: torch's clipping, one reading of the gradients for both."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lockstep import HYPER, PATHS, LockStep, parameters
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Reads(TorchDispatchMode):
    """Names of the operators inside the block that read a given gradient."""

    def __init__(self, gradient: torch.Tensor) -> None:
        super().__init__()
        self.storage = gradient.untyped_storage().data_ptr()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        results = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if any(t.untyped_storage().data_ptr() == self.storage for t in tensors):
            view = func.is_view or (results and all(t.untyped_storage().data_ptr() == self.storage for t in results))
            if not view:
                self.names.append(func.overloadpacket.__name__)
        return result


class TestNormIsShared:
    """clip_grad_norm_ reads the gradients once for clipping and schedule; a norm of other gradients is never used."""

    MAX_NORM = 0.5

    @staticmethod
    def pair() -> LockStep:
        # Above the size up to which norms may be taken many at a time: every read of the gradient is one operator.
        return LockStep([{"params": parameters(((300, 100), (7,), ()))}], rtol=1e-6)

    def clipped(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        factor = min(1.0, self.MAX_NORM / (total_norm(gradients) + 1e-6))
        return [g * factor for g in gradients]

    def test_step_after_clipping_reads_the_gradients_only_in_the_kernel(self):
        pair = self.pair()
        pair.run(1)
        pair.set_gradients(pair.gradients())
        pair.optimizer.clip_grad_norm_(self.MAX_NORM)

        with Reads(pair.params[0].grad) as reads:
            pair.optimizer.step()

        assert reads.names == ["_fused_adamw_"]

    def test_step_without_clipping_reads_them_for_the_norm(self):
        pair = self.pair()
        pair.run(1)
        pair.set_gradients(pair.gradients())

        with Reads(pair.params[0].grad) as reads:
            pair.optimizer.step()

        assert len(reads.names) > 1

    @pytest.mark.parametrize("scale", [0.01, 1.0], ids=["not_clipped", "clipped"])
    def test_schedule_sees_the_clipped_gradients(self, scale):
        pair = self.pair()
        for _ in range(10):
            gradients = [g * scale for g in pair.gradients()[0]]
            pair.set_gradients([gradients])
            norm = pair.optimizer.clip_grad_norm_(self.MAX_NORM)
            assert norm.item() == pytest.approx(total_norm(gradients), rel=1e-6)
            pair.optimizer.step()
            pair.step_reference([self.clipped(gradients)])

    def test_norm_serves_one_step_only(self):
        """A second step() on the same gradients is unusual, and its norm is the same."""
        pair = self.pair()
        gradients = pair.gradients()
        pair.set_gradients(gradients)
        pair.optimizer.clip_grad_norm_(1e9)
        for _ in range(3):
            pair.optimizer.step()
            pair.step_reference(gradients)

    CHANGES = {
        "backward_again": lambda params: sum((p * torch.randn_like(p)).sum() for p in params).backward(),
        "edited_in_place": lambda params: params[0].grad.mul_(3),
        "small_one_edited_in_place": lambda params: params[-1].grad.fill_(100.0),
        "edited_through_a_view": lambda params: params[0].grad[5:7].add_(10),
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
        "dropped_and_backward": lambda params: (
            [setattr(p, "grad", None) for p in params],
            sum((p * torch.randn_like(p)).sum() for p in params).backward(),
        ),
        "exchanged": lambda params: (
            setattr(params[0], "grad", params[0].grad.clone()),
            setattr(params[1], "grad", params[1].grad * 7),
        ),
    }

    @pytest.mark.parametrize("max_norm", [MAX_NORM, 1e9], ids=["clipped", "not_clipped"])
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_norm_is_not_used_for_gradients_changed_after_clipping(self, change, max_norm):
        pair = self.pair()
        pair.run(2)
        pair.set_gradients(pair.gradients())
        pair.optimizer.clip_grad_norm_(max_norm)

        change(pair.params)

        pair.optimizer.step()
        pair.step_reference([[None if p.grad is None else p.grad.clone() for p in pair.params]])

    def test_gradient_that_appears_after_clipping_counts(self):
        pair = self.pair()
        pair.run(2)
        gradients = pair.gradients(lambda i, step: i == 1)
        pair.set_gradients(gradients)
        pair.optimizer.clip_grad_norm_(1e9)
        pair.params[1].grad = gradients[0][1] = torch.randn_like(pair.params[1])

        pair.optimizer.step()
        pair.step_reference(gradients)

    def test_norm_is_not_used_after_a_step_that_the_user_left_out(self):
        """NaN guards: clip, look at the norm, skip the step. The next gradients lie in the same memory."""
        pair = self.pair()
        pair.run(1)
        pair.set_gradients(pair.gradients())
        pair.optimizer.clip_grad_norm_(self.MAX_NORM)
        pair.optimizer.zero_grad(set_to_none=False)
        sum((p * 0.3).sum() for p in pair.params).backward()

        pair.optimizer.step()
        pair.step_reference([[p.grad.clone() for p in pair.params]])

    def test_new_closure_gradients_are_not_the_clipped_ones(self):
        pair = self.pair()
        pair.set_gradients(pair.gradients())
        pair.optimizer.clip_grad_norm_(self.MAX_NORM)
        gradients = pair.gradients()

        pair.optimizer.step(lambda: pair.set_gradients(gradients))
        pair.step_reference(gradients)

    def test_clipping_survives_loading_a_checkpoint(self):
        pair = self.pair()
        pair.run(3)
        state = copy.deepcopy(pair.optimizer.state_dict())
        gradients = pair.gradients()
        pair.set_gradients(gradients)
        pair.optimizer.clip_grad_norm_(self.MAX_NORM)
        pair.optimizer.load_state_dict(state)

        pair.optimizer.step()
        pair.step_reference([self.clipped(gradients[0])])


class TestDeferredClipping:
    """defer=True: the same clipping, inside the step, where the gradients are read and written anyway."""

    MAX_NORM = 0.5

    @staticmethod
    def clipped(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        factor = min(1.0, TestDeferredClipping.MAX_NORM / (total_norm(gradients) + 1e-6))
        return [g * factor for g in gradients]

    @pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
    @pytest.mark.parametrize("scale", [0.01, 1.0], ids=["not_clipped", "clipped"])
    def test_weights_are_those_of_clipped_gradients(self, path, dtype, scale):
        params = parameters(((300, 100), (7,), ()), dtype=dtype)
        groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0, "lr": 1e-3}]
        pair = LockStep(groups, path=path)
        for _ in range(20):
            gradients = [[g * scale for g in group] for group in pair.gradients()]
            flat = [g for group in gradients for g in group]
            expected = self.clipped(flat)
            pair.set_gradients(gradients)
            norm = pair.optimizer.clip_grad_norm_(self.MAX_NORM, defer=True)
            assert norm.item() == pytest.approx(total_norm(flat), rel=1e-6)
            assert all(torch.equal(p.grad, g) for p, g in zip(pair.params, flat, strict=True))
            pair.optimizer.step()
            pair.step_reference([expected[:1], expected[1:]])
            for p, g in zip(pair.params, expected, strict=True):
                # Two roundings, and not torch's own operators in the same order: 2.1e-7 with torch 2.6.
                torch.testing.assert_close(p.grad, g, rtol=2.4e-7 if dtype == torch.float32 else 1e-12, atol=0)

    def test_with_amsgrad(self):
        pair = LockStep([{"params": parameters(dtype=torch.float32)}], amsgrad=True)
        for _ in range(5):
            gradients = pair.gradients()
            pair.set_gradients(gradients)
            pair.optimizer.clip_grad_norm_(0.2, defer=True)
            factor = 0.2 / (total_norm(gradients[0]) + 1e-6)
            pair.optimizer.step()
            pair.step_reference([[g * factor for g in gradients[0]]])

    def test_gradients_are_read_once_for_the_norm_and_written_only_in_the_kernel(self):
        pair = LockStep([{"params": parameters(((300, 100), (7,), ()), dtype=torch.float32)}])
        pair.run(1)
        pair.set_gradients(pair.gradients())

        with Reads(pair.params[0].grad) as reads:
            pair.optimizer.clip_grad_norm_(self.MAX_NORM, defer=True)
            pair.optimizer.step()

        assert reads.names == [
            "linalg_vector_norm",
            "cat",
            "_fused_adamw_",
        ]  # rows, and what is left of them

    @pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
    def test_norm_that_is_not_finite_is_what_clipping_in_place_makes_of_it(self, value):
        def run(defer):
            torch.manual_seed(0)
            params = parameters(dtype=torch.float32)
            optimizer = AdamS(params, **HYPER)
            for p in params:
                p.grad = torch.randn_like(p)
            params[0].grad[0, 0] = value
            optimizer.clip_grad_norm_(1.0, defer=defer)
            optimizer.step()
            return params

        for mine, theirs in zip(run(True), run(False), strict=True):
            torch.testing.assert_close(mine, theirs, equal_nan=True)

    @pytest.mark.parametrize("change", TestNormIsShared.CHANGES.values(), ids=TestNormIsShared.CHANGES)
    def test_changed_gradients_stop_the_step_before_a_weight_changes(self, change):
        """Whether they are to be clipped cannot be known."""
        pair = TestNormIsShared.pair()
        pair.run(2)
        pair.set_gradients(pair.gradients())
        pair.optimizer.clip_grad_norm_(self.MAX_NORM, defer=True)
        change(pair.params)
        weights = [p.detach().clone() for p in pair.params]

        with pytest.raises(RuntimeError, match="without defer"):
            pair.optimizer.step()

        assert all(torch.equal(p, w) for p, w in zip(pair.params, weights, strict=True))

    def test_step_that_is_left_out_leaves_nothing_behind(self):
        """NaN guards: clip, look at the norm, skip the step; the next gradients are clipped by their own norm."""
        pair = TestNormIsShared.pair()
        pair.set_gradients([[g * 100 for g in pair.gradients()[0]]])
        pair.optimizer.clip_grad_norm_(self.MAX_NORM, defer=True)
        pair.optimizer.zero_grad()
        gradients = pair.gradients()
        pair.set_gradients(gradients)
        pair.optimizer.clip_grad_norm_(self.MAX_NORM, defer=True)

        pair.optimizer.step()
        pair.step_reference([self.clipped(gradients[0])])

    @pytest.mark.parametrize("between", ["clip_again", "load_state_dict", "deepcopy"])
    def test_what_needs_clipped_gradients_finds_them(self, between):
        pair = TestNormIsShared.pair()
        pair.run(2)
        state = copy.deepcopy(pair.optimizer.state_dict())
        gradients = pair.gradients()
        pair.set_gradients(gradients)
        pair.optimizer.clip_grad_norm_(self.MAX_NORM, defer=True)
        if between == "clip_again":
            assert pair.optimizer.clip_grad_norm_(1e9).item() == pytest.approx(self.MAX_NORM, rel=1e-5)
        elif between == "load_state_dict":
            pair.optimizer.load_state_dict(state)
        else:
            copy.deepcopy(pair.optimizer)

        for p, g in zip(pair.params, self.clipped(gradients[0]), strict=True):
            torch.testing.assert_close(p.grad, g)
        pair.optimizer.step()
        pair.step_reference([self.clipped(gradients[0])])

    def test_with_a_grad_scaler_that_has_unscaled(self):
        pair = TestNormIsShared.pair()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))  # a scaler is born at its first use
        for _ in range(5):
            gradients = pair.gradients()
            pair.set_gradients(gradients, scale=1024.0)
            scaler.unscale_(pair.optimizer)
            pair.optimizer.clip_grad_norm_(self.MAX_NORM, defer=True)
            scaler.step(pair.optimizer)
            scaler.update()
            pair.step_reference([self.clipped(gradients[0])])
