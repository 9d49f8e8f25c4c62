"""`max_grad_norm` of an optimizer: clip and step are one act, which reads the gradients once."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lockstep import HYPER, PATHS, LockStep, parameters
from reads import Reads
from torch import nn
from torch.nn import Parameter

from hf_swd import AdamS, ScheduledWeightDecay, create_adams


MAX_NORM = 0.5  # of gradients whose norm lies between 0.3 and 1.5
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
owners = pytest.mark.parametrize("owner", ["adams", "adamw"])


def norm_of(gradients) -> float:
    return math.sqrt(math.fsum(g.double().square().sum().item() for g in gradients if g is not None))


def build(owner, params, fused=True, **options):
    """Optimizer and schedule."""
    if owner == "adams":
        optimizer = AdamS(params, **HYPER, fused=fused, **options)
        return optimizer, optimizer.schedule
    optimizer = torch.optim.AdamW(params, **HYPER, fused=fused)
    return optimizer, ScheduledWeightDecay(optimizer, **options)


class Clipped(LockStep):
    """The optimizer clips; the reference gets clipped gradients, and is told what they were before."""

    def __init__(self, groups=None, *, max_norm=MAX_NORM, **kwargs):
        super().__init__(groups, max_grad_norm=max_norm, **kwargs)
        self.max_norm, self.clipped = max_norm, 0

    def step_reference(self, gradients):
        flat = [g for group in gradients for g in group]
        norm = norm_of(flat)
        assert self.optimizer.grad_norm == pytest.approx(norm, rel=1e-6)
        factor = min(1.0, self.max_norm / (norm + 1e-6))
        self.clipped += factor < 1
        expected = [[None if g is None else g * factor for g in group] for group in gradients]
        for group, grads in zip(self.optimizer.param_groups, expected, strict=True):
            for p, g in zip(group["params"], grads, strict=True):
                assert (p.grad is None) == (g is None)
                if g is not None:
                    # Two roundings, and not torch's own operators in the same order.
                    torch.testing.assert_close(p.grad, g, rtol=2.4e-7 if p.dtype == torch.float32 else 1e-6, atol=0)
        super().step_reference(expected, gradients)


def two_groups(dtype=torch.float64):
    return [
        {"params": parameters(((300, 100), (7,), ()), dtype)},
        {"params": parameters(((6,), (2, 2)), dtype), "weight_decay": 3e-2, "lr": 1e-3},
    ]


def sometimes(i, step):
    return (i + step) % 3 == 0


@pytest.mark.parametrize("unclipped_norm", [False, True], ids=["", "unclipped"])
@every_path
class TestAgainstTheReference:
    """Adam's gradients are clipped in both; the schedule's are, or not."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
    def test_two_groups(self, path, unclipped_norm, dtype):
        # The factor is a float32 number.
        pair = Clipped(two_groups(dtype), path=path, unclipped_norm=unclipped_norm, max_norm=17.0, rtol=1e-5)
        pair.run(20)
        assert 5 < pair.clipped < 20

    def test_missing_gradients(self, path, unclipped_norm):
        if unclipped_norm:
            pytest.skip("the mean before clipping is one number, whatever it is over")
        pair = Clipped(path=path, rtol=1e-6)
        pair.run(20, sometimes)
        assert pair.clipped

    def test_reference_steps(self, path, unclipped_norm):
        Clipped(path=path, unclipped_norm=unclipped_norm, reference_steps=5, rtol=1e-6).run(15)

    def test_amsgrad(self, path, unclipped_norm):
        """Of clipped gradients its maximum is; the norm before clipping knows no maximum."""
        Clipped(path=path, unclipped_norm=unclipped_norm, amsgrad=True, rtol=1e-6).run(20)

    @pytest.mark.parametrize("max_norm", [1e-3, math.inf, 1e9], ids=str)
    def test_all_or_nothing_is_clipped(self, path, unclipped_norm, max_norm):
        pair = Clipped(path=path, unclipped_norm=unclipped_norm, max_norm=max_norm, rtol=1e-6)
        pair.run(10)
        assert pair.clipped == (10 if max_norm == 1e-3 else 0)

    def test_resumed(self, path, unclipped_norm):
        pair = Clipped(path=path, unclipped_norm=unclipped_norm, rtol=1e-6)
        pair.run(6)
        other = pair.resumed()
        assert other.optimizer.grad_norm == 0.0  # it has made no step
        other.run(6)


@owners
class TestBothOwners:
    @pytest.mark.parametrize("unclipped_norm", [False, True])
    def test_weights_are_those_of_clipping_by_hand(self, owner, unclipped_norm):
        """Whose schedule must know the norm, so for `unclipped_norm` AdamS itself is the judge."""
        judge_of = "adams" if unclipped_norm else owner
        options = {"unclipped_norm": unclipped_norm}
        mine, theirs = parameters(), parameters()
        for p, q in zip(mine, theirs, strict=True):
            p.data.copy_(q.data)
        optimizer, schedule = build(owner, mine, max_grad_norm=MAX_NORM, **options)
        judge, _ = build(judge_of, theirs, **({"max_grad_norm": MAX_NORM, **options} if unclipped_norm else {}))
        assert schedule.grad_norm == 0.0
        for _ in range(8):
            for p, q in zip(mine, theirs, strict=True):
                p.grad = torch.randn_like(p) * 0.3
                q.grad = p.grad.clone()
            norm = norm_of([p.grad for p in mine])
            if not unclipped_norm:
                torch.nn.utils.clip_grad_norm_(theirs, MAX_NORM)
            optimizer.step()
            judge.step()
            assert type(schedule.grad_norm) is float and schedule.grad_norm == pytest.approx(norm, rel=1e-6)
        assert all(torch.allclose(p, q, rtol=1e-6) for p, q in zip(mine, theirs, strict=True))

    def test_option_stands_in_the_groups_and_in_a_checkpoint(self, owner):
        params = parameters()
        optimizer, schedule = build(owner, params, max_grad_norm=MAX_NORM)
        assert optimizer.param_groups[0]["max_grad_norm"] == schedule.max_grad_norm == MAX_NORM
        optimizer.add_param_group({"params": parameters(((3,),))})
        assert optimizer.param_groups[1]["max_grad_norm"] == MAX_NORM

        other, other_schedule = build(owner, params, max_grad_norm=7.0)
        other.add_param_group({"params": parameters(((3,),))})
        other.load_state_dict(optimizer.state_dict())
        assert other_schedule.max_grad_norm == MAX_NORM

    def test_adamws_checkpoint_leaves_the_option(self, owner):
        params = parameters()
        adamw = torch.optim.AdamW(params)
        for p in params:
            p.grad = torch.ones_like(p)
        adamw.step()
        optimizer, schedule = build(owner, copy.deepcopy(params), max_grad_norm=MAX_NORM)
        optimizer.load_state_dict(adamw.state_dict())
        assert schedule.max_grad_norm == MAX_NORM
        adamw.load_state_dict(optimizer.state_dict())

    def test_option_assigned_in_all_groups_counts_from_the_next_step(self, owner):
        params = parameters()
        optimizer, schedule = build(owner, params)
        for max_norm in (0.0, MAX_NORM, 0.0):
            optimizer.param_groups[0]["max_grad_norm"] = max_norm
            for p in params:
                p.grad = torch.ones_like(p)
            norm = norm_of([p.grad for p in params])
            optimizer.step()
            after = norm_of([p.grad for p in params])
            assert after == pytest.approx(max_norm or norm, rel=1e-5)

    @pytest.mark.parametrize("max_norm", [-1.0, math.nan, -math.inf], ids=str)
    def test_out_of_range(self, owner, max_norm):
        with pytest.raises(ValueError, match=f"max_grad_norm={max_norm}"):
            build(owner, parameters(), max_grad_norm=max_norm)

    @pytest.mark.parametrize("max_norm", ["1", None, True, [1.0]], ids=repr)
    def test_not_a_number(self, owner, max_norm):
        with pytest.raises(TypeError, match="max_grad_norm="):
            build(owner, parameters(), max_grad_norm=max_norm)

    def test_closure(self, owner):
        params = parameters()
        optimizer, schedule = build(owner, params, max_grad_norm=MAX_NORM)

        def closure():
            for p in params:
                p.grad = torch.ones_like(p)
            return 3.0

        assert optimizer.step(closure) == 3.0
        assert schedule.grad_norm == pytest.approx(math.sqrt(sum(p.numel() for p in params)), rel=1e-6)
        assert norm_of([p.grad for p in params]) == pytest.approx(MAX_NORM, rel=1e-5)

    def test_no_gradients(self, owner):
        params = parameters()
        optimizer, schedule = build(owner, params, max_grad_norm=MAX_NORM)
        optimizer.step()
        assert (schedule.grad_norm, schedule.grad_rms, schedule.step_count) == (0.0, 0.0, 0)

    def test_statistics_count_clipped_and_all_steps(self, owner):
        p = Parameter(torch.zeros(4))
        optimizer, schedule = build(owner, [p], max_grad_norm=1.0)
        for size in (10.0, 0.01, 10.0, 0.01, 10.0):
            p.grad = torch.full_like(p, size)
            optimizer.step()
        assert schedule.clip_statistics() == (3, 5)

    @pytest.mark.parametrize("clip", ["torch", "schedule", "not at all"])
    def test_unclipped_norm_without_it_stops_before_a_weight_changes(self, owner, clip):
        params = parameters()
        optimizer, schedule = build(owner, params, unclipped_norm=True)
        for p in params:
            p.grad = torch.randn_like(p)
        if clip == "torch":
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        elif clip == "schedule":
            schedule.clip_grad_norm_(MAX_NORM)
        before = copy.deepcopy(params)
        with pytest.raises(RuntimeError, match=r"unclipped_norm=True.*max_grad_norm"):
            optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        assert schedule.step_count == 0


def test_factory_passes_it_on():
    model = nn.Linear(3, 2)
    optimizer = create_adams(model, lr=1e-3, weight_decay=0.01, max_grad_norm=MAX_NORM)
    assert [group["max_grad_norm"] for group in optimizer.param_groups] == [MAX_NORM] * 2


@pytest.mark.parametrize("unscale", [False, True], ids=["scaler_unscales", "unscaled_before"])
@pytest.mark.parametrize("unclipped_norm", [False, True], ids=["", "unclipped"])
@every_path
def test_with_a_grad_scaler(path, unclipped_norm, unscale):
    """The norm is of unscaled gradients; a step that is skipped leaves everything."""
    pair = Clipped(path=path, unclipped_norm=unclipped_norm, rtol=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    scaler.scale(torch.zeros(()))  # the scale is made lazily

    def step():
        if unscale:
            scaler.unscale_(pair.optimizer)
        scaler.step(pair.optimizer)
        scaler.update()

    for number in range(10):
        gradients, scale = pair.gradients(), scaler.get_scale()
        pair.set_gradients(gradients, scale)
        if number in (0, 4):
            pair.params[0].grad.view(-1)[0] = math.inf
            before = [p.detach().clone() for p in pair.params], pair.optimizer.schedule.step_count
            step()
            assert all(map(torch.equal, pair.params, before[0]))
            assert pair.optimizer.schedule.step_count == before[1]
        else:
            step()
            for p, g in zip(pair.params, gradients[0], strict=True):  # what is left in them is the kernel's business
                p.grad = g * min(1.0, MAX_NORM / (norm_of(gradients[0]) + 1e-6))
            pair.step_reference(gradients)


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_norm_that_is_not_finite_is_what_torchs_clipping_makes_of_it(value):
    def run(by_torch):
        torch.manual_seed(0)
        params = parameters(dtype=torch.float32)
        optimizer = AdamS(params, **HYPER, max_grad_norm=0.0 if by_torch else 1.0)
        for p in params:
            p.grad = torch.randn_like(p)
        params[0].grad[0, 0] = value
        if by_torch:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return [optimizer.state[p]["exp_avg"] for p in params]

    for mine, theirs in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_read_once_for_the_norm_and_written_only_in_the_kernel(dtype):
    params = parameters(((300, 100), (7,), ()), dtype=dtype)
    optimizer = AdamS(params, **HYPER, max_grad_norm=MAX_NORM)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        with Reads(params[0].grad) as reads:
            optimizer.step()
    assert reads.times.pop("_fused_adamw_") == 1
    assert 1 <= reads.times.total() < 1.01
