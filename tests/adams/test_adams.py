"""AdamS equals the paper's algorithm: weights, decay and grad_rms after every step, on every path."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from lockstep import HYPER, PATHS, SHAPES, LockStep, assert_close, parameters
from reference_adams import ReferenceAdamS
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from hf_swd import AdamS


every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def often_missing(i: int, step: int) -> bool:
    """Parameter 0 never has a gradient; the others miss every third one, not all at the same steps."""
    return i == 0 or (step + i) % 3 == 0


def three_groups(dtype: torch.dtype = torch.float64, **keys: tuple) -> list[dict]:
    keys = keys or {"lr": (1e-2, 3e-2, 1e-3), "weight_decay": (1e-2, 0.0, 5e-2)}
    return [
        {"params": parameters(shapes, dtype), **{key: values[i] for key, values in keys.items()}}
        for i, shapes in enumerate((SHAPES, ((4, 4), (3,)), ((6,), ())))
    ]


def grouped(**keys: tuple) -> Callable[..., LockStep]:
    return lambda **kwargs: LockStep(three_groups(**keys), **kwargs)


CONFIGURATIONS: dict[str, Callable[..., LockStep]] = {
    "one_group": LockStep,
    "groups": grouped(),
    "betas_by_group": grouped(betas=((0.9, 0.999), (0.5, 0.9), (0.0, 0.99)), weight_decay=(1e-2, 2e-2, 0.0)),
    "eps_by_group": grouped(eps=(1e-8, 1e-2, 1.0)),
    "beta2_zero": functools.partial(LockStep, betas=(0.9, 0.0)),
    "amsgrad": functools.partial(LockStep, amsgrad=True),
    "amsgrad_in_one_group": grouped(amsgrad=(False, True, False)),
    "maximize": functools.partial(LockStep, maximize=True),
    "maximize_in_two_groups_amsgrad": functools.partial(grouped(maximize=(True, False, True)), amsgrad=True),
    "reference_steps_1": functools.partial(LockStep, reference_steps=1),
    "reference_steps_20_groups": functools.partial(grouped(), reference_steps=20),
}


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@every_path
def test_fp64_equals_reference_for_200_steps(path, configuration):
    pair = configuration(path=path)

    pair.run(100)
    pair.run(100, often_missing)

    assert pair.optimizer.schedule.step_count == 200


@every_path
def test_fp32_equals_reference_for_200_steps(path):
    LockStep(three_groups(dtype=torch.float32), path=path).run(200, often_missing)


def test_first_step_hand_computed():
    p, q = Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64)), Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer = AdamS([{"params": [p]}, {"params": [q], "weight_decay": 0.0}], lr=0.1, weight_decay=0.5, eps=0.0)
    p.grad, q.grad = torch.tensor([3.0, -4.0], dtype=torch.float64), torch.tensor(math.sqrt(2), dtype=torch.float64)

    optimizer.step()

    # v_hat = g^2 at the first step: mean (9 + 16 + 2) / 3 = 9, so the decay is 0.5 / 3, and Adam's step is -lr *
    # sign(g).
    assert optimizer.grad_rms == pytest.approx(3.0, rel=1e-15)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.5 / 3, 0.0], rel=1e-15)
    factor = 1 - 0.1 * 0.5 / 3
    assert p.tolist() == pytest.approx([3 * factor - 0.1, factor + 0.1], rel=1e-15)
    assert q.item() == pytest.approx(1.9, rel=1e-15)


def test_default_arguments_are_the_papers():
    p = Parameter(torch.ones(2, dtype=torch.float64))
    optimizer, reference = AdamS([p]), ReferenceAdamS([{"params": [p]}])
    p.grad = torch.tensor([1e-3, -2e-3], dtype=torch.float64)

    optimizer.step()
    reference.step([[p.grad]])

    assert optimizer.param_groups[0]["initial_weight_decay"] == 5e-4
    assert p.tolist() == pytest.approx(reference.groups[0]["params"][0].tolist(), rel=1e-14)


class Operators(TorchDispatchMode):
    """Names of the operators that run inside the block."""

    def __enter__(self):
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("path", "fused"), [({}, True), ({"fused": True}, True), ({"foreach": True}, False)])
def test_kernel_is_fused_unless_chosen_otherwise(path, fused):
    pair = LockStep(path=path)
    pair.set_gradients(pair.gradients())

    with Operators() as operators:
        pair.optimizer.step()

    assert ("_fused_adamw_" in operators.names) == fused


# Low precision: rounding to 8 or 11 bits makes every trajectory drift from the float64 one, and a bfloat16 second
# moment stalls (v * 0.999 rounds back to v). So the weights are compared with torch's AdamW, driven by the reference's
# decay (a difference in the last bit of the decay may round one weight differently: one unit in the last place of the
# largest), and grad_rms with the reference that begins every step with the moments that are there.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_path
def test_low_precision_equals_adamw_with_the_reference_decay(path, dtype):
    pair = LockStep([{"params": parameters(dtype=dtype)}], path=path, rtol=math.inf, eps=1e-4)
    twins = [Parameter(p.detach().clone()) for p in pair.params]
    adamw = torch.optim.AdamW(twins, lr=HYPER["lr"], eps=1e-4, **(path or {"fused": True}))

    for _ in range(200):
        gradients = pair.gradients()
        pair.step(gradients)
        assert_close(pair.optimizer.grad_rms, pair.reference.grad_rms, 1e-6, "grad_rms")
        for twin, gradient in zip(twins, gradients[0], strict=True):
            twin.grad = gradient.clone()
        adamw.param_groups[0]["weight_decay"] = pair.reference.groups[0]["decay"]
        adamw.step()
        for p, twin in zip(pair.params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=0, atol=torch.finfo(dtype).eps * twin.detach().abs().max().item())


def test_mixed_dtypes_share_one_mean():
    params = [Parameter(torch.randn(4, 3, dtype=dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    pair = LockStep([{"params": params}], rtol=0.05)

    for _ in range(50):
        pair.step()
        assert_close(pair.optimizer.grad_rms, pair.reference.grad_rms, 1e-6, "grad_rms")


# torch's fused kernel does not take complex parameters; the default must find its way around it.
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=["complex128", "complex64"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize(
    "path", [PATHS[name] for name in ("default", "foreach", "forloop")], ids=["default", "foreach", "forloop"]
)
def test_complex_element_counts_as_two_reals(path, amsgrad, dtype):
    groups = [{"params": parameters(dtype=dtype)}, {"params": parameters(dtype=dtype.to_real()), "weight_decay": 0.0}]

    LockStep(groups, path=path, amsgrad=amsgrad).run(100, often_missing)


TENSOR_LR_PATHS = {
    "default": {},
    "forloop": {"foreach": False, "fused": False},
    "fused": {"fused": True},
    "fused_capturable": {"fused": True, "capturable": True},
}


@pytest.mark.parametrize("path", TENSOR_LR_PATHS.values(), ids=TENSOR_LR_PATHS)
def test_tensor_lr_equals_reference_also_when_changed_in_place(path):
    pair = LockStep(path=path, lr=torch.tensor(1e-2, dtype=torch.float64))
    for _ in range(20):
        pair.run(1)
        pair.optimizer.param_groups[0]["lr"].mul_(0.9)

    assert float(pair.optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2 * 0.9**20)


@every_path
def test_closure_is_called_once_and_its_gradients_count(path):
    pair = LockStep(path=path)
    calls = []

    def closure(gradients):
        assert torch.is_grad_enabled()
        calls.append(1)
        pair.set_gradients(gradients)
        return "the loss"

    for _ in range(5):
        gradients = pair.gradients()
        pair.set_gradients(pair.gradients())  # stale gradients, to be overwritten by the closure
        assert pair.optimizer.step(closure=functools.partial(closure, gradients)) == "the loss"
        pair.step_reference(gradients)

    assert len(calls) == 5
    assert pair.optimizer.step() is None


@pytest.mark.parametrize("reference_steps", [0, 3, 8], ids=lambda k: f"K{k}")
@every_path
def test_group_added_in_the_middle_of_a_run(path, reference_steps):
    pair = LockStep(path=path, reference_steps=reference_steps)
    pair.run(5)

    pair.add_group({"params": parameters(((3, 3), ())), "weight_decay": 3e-2, "lr": 5e-3})

    pair.run(10)


LR_SCHEDULERS = {
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 0.9**t, lambda t: 1 + t]),
    "warmup_from_0": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 100),
    # OneCycleLR also changes betas[0] at every step.
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 2e-2], total_steps=30),
}


@pytest.mark.parametrize("make_scheduler", LR_SCHEDULERS.values(), ids=LR_SCHEDULERS)
@every_path
def test_lr_scheduler(path, make_scheduler):
    pair = LockStep([{"params": parameters()}, {"params": parameters(), "weight_decay": 0.1}], path=path)
    scheduler = make_scheduler(pair.optimizer)
    rates = set()
    for _ in range(25):
        pair.run(1)
        scheduler.step()
        rates.add(pair.optimizer.param_groups[0]["lr"])

    assert len(rates) == 25


@pytest.mark.parametrize("path", [{}, {"foreach": False, "fused": False}], ids=["default", "forloop"])
def test_tensor_betas(path):
    betas = tuple(torch.tensor(beta, dtype=torch.float64) for beta in (0.9, 0.99))
    pair = LockStep(path={**path, "betas": betas})
    pair.run(20)


@pytest.mark.parametrize("steps", [0, 4])
@every_path
def test_parameter_exchanged_in_its_group(path, steps):
    """accelerate does so for FSDP2: what a group holds now is what counts."""
    pair = LockStep(path=path)
    pair.run(steps)
    new = Parameter(torch.randn(9, dtype=torch.float64))
    pair.optimizer.param_groups[0]["params"][1] = new
    group = pair.reference.groups[0]
    fresh = ReferenceAdamS([{"params": [new]}]).groups[0]
    group["params"][1], group["state"][1] = fresh["params"][0], fresh["state"][0]

    pair.run(5)


def test_beta2_changed_between_steps():
    pair = LockStep()
    for beta2 in (0.9, 0.99, 0.5):
        pair.optimizer.param_groups[0]["betas"] = (0.9, beta2)
        pair.run(5)


class TestAssignedWeightDecay:
    """A user who assigns group["weight_decay"] sets a new lambda."""

    @pytest.mark.parametrize("value", [0.0, 5e-3, 1.0])
    @every_path
    def test_becomes_the_new_lambda_of_its_group(self, path, value):
        pair = LockStep(three_groups(), path=path)
        pair.run(5)

        pair.set_weight_decay(0, value)
        pair.run(5)

        lambdas = [group["initial_weight_decay"] for group in pair.optimizer.param_groups]
        assert lambdas == [value, 0.0, 5e-2]

    def test_before_the_first_step(self):
        pair = LockStep()

        pair.set_weight_decay(0, 0.3)

        pair.run(3)

    def test_to_the_present_lambda_changes_nothing(self):
        pair = LockStep()
        pair.run(3)

        pair.optimizer.param_groups[0]["weight_decay"] = HYPER["weight_decay"]

        pair.run(3)

    def test_every_step(self):
        pair = LockStep(reference_steps=5)
        for t in range(10):
            pair.set_weight_decay(0, 1e-3 * (t + 1))
            pair.run(1)

    def test_survives_saving_before_the_next_step(self):
        pair = LockStep()
        pair.run(3)
        pair.set_weight_decay(0, 0.3)

        pair.resumed().run(3)

    def test_reading_state_dict_changes_nothing(self):
        pair = LockStep()
        for _ in range(3):
            pair.run(1)
            pair.optimizer.state_dict()
