"""Inputs at the edge: nothing to decay by, too much to decay by, memory in any order, gradients that are refused."""

from __future__ import annotations

import pytest
import torch
from lockstep import PATHS, LockStep, parameters
from torch.nn import Parameter

from hf_swd import AdamS


every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@every_path
def test_sparse_gradient_is_refused_before_any_weight_changes(path):
    pair = LockStep(path=path)
    pair.run(2)
    before = [p.detach().clone() for p in pair.params]
    rms, steps = pair.optimizer.grad_rms, pair.optimizer.schedule.step_count
    pair.set_gradients(pair.gradients())
    pair.params[-1].grad = pair.params[-1].grad.to_sparse()

    with pytest.raises(RuntimeError, match="(?i)sparse"):
        pair.optimizer.step()

    assert all(torch.equal(p, old) for p, old in zip(pair.params, before, strict=True))
    assert (pair.optimizer.grad_rms, pair.optimizer.schedule.step_count) == (rms, steps)
    pair.run(3)


class TestDegenerateInputs:
    @pytest.mark.parametrize("reference_steps", [0, 2, 4], ids=lambda k: f"K{k}")
    @every_path
    def test_zero_gradients_at_first_decay_nothing(self, path, reference_steps):
        pair = LockStep(path=path, reference_steps=reference_steps)
        before = [p.detach().clone() for p in pair.params]
        zeros = [[torch.zeros_like(p) for p in pair.params]]

        for _ in range(3):
            pair.step(zeros)

        assert all(torch.equal(p, old) for p, old in zip(pair.params, before, strict=True))
        assert pair.optimizer.grad_rms == 0.0
        pair.run(5)

    @every_path
    def test_zero_gradients_later(self, path):
        pair = LockStep(path=path)
        pair.run(5)

        for _ in range(20):
            pair.step([[torch.zeros_like(p) for p in pair.params]])

        pair.run(5)

    @pytest.mark.parametrize("shapes", [((1,),), ((),), ((0,), (3,)), ((2, 0), (), (1, 1))], ids=str)
    @pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
    @every_path
    def test_tiny_and_empty_parameters(self, path, amsgrad, shapes):
        LockStep([{"params": parameters(shapes)}], path=path, amsgrad=amsgrad).run(20)

    @pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
    @every_path
    def test_only_empty_parameters(self, path, amsgrad):
        params = parameters(((0,), (0, 3)))
        optimizer = AdamS(params, amsgrad=amsgrad, **path)
        for p in params:
            p.grad = torch.zeros_like(p)

        optimizer.step()

        assert optimizer.grad_rms == 0.0

    @pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
    @every_path
    def test_gradient_of_nothing_but_empty_parameters_is_no_step(self, path, amsgrad):
        pair = LockStep([{"params": parameters(((0,), (3,)))}], path=path, amsgrad=amsgrad, reference_steps=4)
        for _ in range(4):
            pair.run(2)
            before = pair.optimizer.grad_rms, pair.optimizer.schedule.step_count
            pair.run(1, missing=lambda i, step: i == 1)
            assert (pair.optimizer.grad_rms, pair.optimizer.schedule.step_count) == before

    @every_path
    def test_no_gradient_at_all_is_no_step(self, path):
        pair = LockStep(path=path, reference_steps=3)
        for steps in (0, 2, 3):
            pair.run(steps - pair.reference.steps)
            weights, rms = [p.detach().clone() for p in pair.params], pair.optimizer.grad_rms
            groups = [dict(group) for group in pair.optimizer.param_groups]

            pair.optimizer.zero_grad()
            pair.optimizer.step()

            assert all(torch.equal(p, old) for p, old in zip(pair.params, weights, strict=True))
            for group, old in zip(pair.optimizer.param_groups, groups, strict=True):
                assert {key: group[key] for key in old if key != "params"} == {
                    k: v for k, v in old.items() if k != "params"
                }
            assert (pair.optimizer.grad_rms, pair.optimizer.schedule.step_count) == (rms, steps)
        pair.run(5)

    def test_frozen_parameters_do_not_count(self):
        frozen = Parameter(torch.randn(1000, dtype=torch.float64), requires_grad=False)
        pair = LockStep([{"params": [frozen, *parameters()]}])

        pair.run(5, lambda i, step: i == 0)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@every_path
def test_weight_decay_0_is_adam_bit_for_bit(path, dtype, amsgrad):
    params = parameters(dtype=dtype)
    twins = [Parameter(p.detach().clone()) for p in params]
    adams = AdamS(params, lr=1e-2, weight_decay=0.0, amsgrad=amsgrad, **path)
    adam = torch.optim.Adam(twins, lr=1e-2, amsgrad=amsgrad, **(path or {"fused": True}))
    for _ in range(20):
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        adams.step()
        adam.step()
        for p, twin in zip(params, twins, strict=True):
            assert torch.equal(p, twin)
            assert all(torch.equal(adams.state[p][key], value) for key, value in adam.state[twin].items())


class TestDecayCap:
    """1 - lr * decay stays in [0, 1]: a huge lambda decays a weight to zero and not beyond."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
    @pytest.mark.parametrize("lr", [1e-3, 0.49, 3.0], ids=str)
    @every_path
    def test_no_weight_changes_sign(self, path, lr, dtype):
        weight, other = Parameter(torch.randn(1000, dtype=dtype)), Parameter(torch.randn(1, dtype=dtype))
        optimizer = AdamS([weight, other], lr=lr, weight_decay=1e6, **path)
        before = weight.detach().clone()
        weight.grad, other.grad = torch.zeros_like(weight), torch.full_like(other, 1e-3)

        with pytest.warns(RuntimeWarning, match="(?i)decay"):
            optimizer.step()

        assert (weight.detach() * before >= 0).all()
        assert weight.abs().max() <= 1e-6 * before.abs().max()
        assert optimizer.param_groups[0]["weight_decay"] * lr == pytest.approx(1.0, rel=1e-12)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @every_path
    def test_equals_reference(self, path):
        LockStep(
            [
                {"params": parameters(), "weight_decay": 1e3},
                {"params": parameters(((4, 4),)), "weight_decay": 0.0},
                {"params": parameters(((6,), ())), "weight_decay": 10.0, "lr": 1e-3},
            ],
            path=path,
        ).run(20)

    def test_warns_once(self):
        pair = LockStep(weight_decay=1e6)
        with pytest.warns(RuntimeWarning) as records:
            pair.run(5)

        assert len([r for r in records if issubclass(r.category, RuntimeWarning)]) == 1

    @pytest.mark.filterwarnings("error")
    def test_ordinary_decay_and_lr_0_do_not_warn(self):
        LockStep().run(3)
        LockStep(lr=0.0, weight_decay=1e6).run(3)


def spread(p: torch.Tensor) -> torch.Tensor:
    """Equal values in memory with gaps."""
    gaps = torch.zeros(*p.shape, 2, dtype=p.dtype)
    gaps[..., 0] = p
    return gaps[..., 0]


# (layout of the parameter, layout of its gradient); torch's fused kernel on CPU reads both as if they were contiguous.
LAYOUTS = {
    "parameter_transposed": (lambda p: p.t().contiguous().t(), lambda g: g),
    "gradient_transposed": (lambda p: p, lambda g: g.t().contiguous().t()),
    "both_transposed": (lambda p: p.t().contiguous().t(), lambda g: g.t().contiguous().t()),
    "parameter_with_gaps": (spread, lambda g: g),
    "gradient_with_gaps": (lambda p: p, spread),
    "both_with_gaps": (spread, spread),
    "gradient_expanded": (lambda p: p, lambda g: g[:1].expand_as(g)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@every_path
def test_strides_do_not_matter(path, amsgrad, layout):
    of_parameter, of_gradient = layout
    matrix, vector = parameters(((5, 7), (3,)))
    pair = LockStep([{"params": [Parameter(of_parameter(matrix.detach())), vector]}], path=path, amsgrad=amsgrad)
    for _ in range(10):
        ((gradient, other),) = pair.gradients()
        gradients = [[of_gradient(gradient), other]]
        pair.set_gradients(gradients)
        pair.params[0].grad = gradients[0][0]  # a clone would lose the strides
        pair.optimizer.step()
        pair.step_reference(gradients)


@every_path
def test_channels_last_parameter_and_contiguous_gradient(path):
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last)

    LockStep([{"params": [Parameter(weight)]}], path=path).run(10)


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@every_path
def test_loaded_moment_may_have_other_strides_than_the_parameter(path, moment):
    """As when the saved run had its model in channels_last."""
    pair = LockStep([{"params": parameters(((5, 7),))}], path=path, amsgrad=moment == "max_exp_avg_sq")
    pair.run(3)

    def transpose(state_dict):
        for state in state_dict["state"].values():
            state[moment] = state[moment].t().contiguous().t()
        return state_dict

    pair.resumed(transpose).run(5)
