"""The checks that torch runs on every optimizer of its own (test/test_optim.py), applied to AdamS on the CPU.

The configurations come from torch's own tables, so that a flag that torch learns to combine is combined here too.
"""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.testing._internal import common_optimizers as torch_tables

from hf_swd import AdamS


# Importing torch's tables freezes the flags of torch.backends for the process; other tests set them.
torch.backends.__allow_nonbracketed_mutation_flag = True

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # weight_decay=0.1 on a loss that goes to 0 meets the cap

(ADAMW,) = (info for info in torch_tables.optim_db if info.optim_cls is torch.optim.AdamW)
ADAMS = torch_tables.OptimizerInfo(
    AdamS,
    optim_inputs_func=torch_tables.optim_inputs_func_adamw,
    optim_error_inputs_func=torch_tables.optim_error_inputs_func_adamw,
    scheduler_inputs=ADAMW.scheduler_inputs,
    supported_impls=ADAMW.supported_impls,
    not_og_supported_flags=ADAMW.not_og_supported_flags,
    has_capturable_arg=True,
    supports_fused_on=("cpu",),
)


OWN = ({"reference_steps": 3}, {"max_grad_norm": 0.5})


def configurations(
    skip: tuple[str, ...] = ("differentiable",), dtype: torch.dtype = torch.float32, own: tuple[dict, ...] = OWN
) -> list:
    """A pytest parameter for each of torch's configurations (algorithm times kernel), and for AdamS's own."""
    inputs = torch_tables._get_optim_inputs_including_global_cliquey_kwargs("cpu", dtype, ADAMS, skip=skip)
    inputs += [torch_tables.OptimizerInput(None, kwargs, "AdamS only") for kwargs in own]
    return [pytest.param(i.kwargs, id=i.desc.replace(" ", "_")) for i in inputs]


every_configuration = pytest.mark.parametrize("kwargs", configurations())
# AdamS's own options belong to the optimizer, not to a group.
every_configuration_of_groups = pytest.mark.parametrize("kwargs", configurations(own=()))
every_scheduler = pytest.mark.parametrize("schedulers", range(len(ADAMS.scheduler_inputs)))


class Task:
    """A least-squares problem of one layer."""

    def __init__(self, contiguous: bool = True) -> None:
        weight, bias = torch.randn(10, 5, 2), torch.randn(10, 2)
        self.weight = Parameter(weight[..., 0].contiguous() if contiguous else weight[..., 0])
        self.bias = Parameter(bias[..., 0].contiguous() if contiguous else bias[..., 0])
        self.input = torch.randn(5)

    def backward(self) -> torch.Tensor:
        self.weight.grad = self.bias.grad = None
        loss = (self.weight.mv(self.input) + self.bias).square().sum()
        loss.backward()
        return loss.detach()

    def train(self, optimizer: AdamS, steps: int, schedulers: tuple = ()) -> None:
        for _ in range(steps):
            loss = self.backward()
            optimizer.step()
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([loss] if plateau else []))

    def copy(self) -> Task:
        return copy.deepcopy(self)


def check_direction(task: Task, optimizer: AdamS, maximize: bool, schedulers: tuple = ()) -> None:
    before = task.backward()
    task.train(optimizer, 20, schedulers)
    assert (task.backward() > before) == maximize


def equal(a: AdamS, b: AdamS) -> None:
    """Same state_dict, names of parameters aside."""
    first, second = a.state_dict(), b.state_dict()
    for group in (*first["param_groups"], *second["param_groups"]):
        group.pop("param_names", None)
    assert first["param_groups"] == second["param_groups"]
    assert_close(first["state"], second["state"], rtol=0, atol=0)


# Errors


@pytest.mark.parametrize("number", range(len(ADAMS.optim_error_inputs_func("cpu", torch.float32))))
def test_errors(number):
    """The same exceptions as AdamW; the message names the argument, in our words where the check is ours."""
    error = ADAMS.optim_error_inputs_func("cpu", torch.float32)[number]
    params, kwargs = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
    ours = {
        "Invalid beta parameter at index 0: 1.0": r"betas\[0\]=1",
        "Invalid weight_decay value: -1": "weight_decay=-1",
    }
    ours["Tensor lr must be 1-element"] = "lr.*1 element"
    ours["betas must be either both floats or both Tensors"] = (
        "(?i)betas must be either both (numbers|floats) or both tensors"
    )
    message = ours.get(error.error_regex, error.error_regex)
    params = [Parameter(torch.ones(1))] if params is None else params
    context = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with context(error.error_type, match=message):
        AdamS(params, **kwargs)


def test_fused_on_meta_parameters_is_an_error_and_works_once_they_are_real():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 3)
    optimizer = AdamS(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        optimizer.step()

    optimizer.zero_grad(set_to_none=True)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.ones_(p)
        p.grad = torch.rand_like(p)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


# Direction of the loss


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@every_configuration
def test_loss_goes_the_right_way(kwargs, contiguous):
    task = Task(contiguous)
    check_direction(task, AdamS([task.weight, task.bias], **kwargs), kwargs.get("maximize", False))


@every_scheduler
def test_loss_goes_the_right_way_with_lr_schedulers(schedulers):
    task = Task()
    optimizer = AdamS([{"params": [task.weight]}, {"params": [task.bias], "lr": 0.01}])
    check_direction(task, optimizer, False, [make(optimizer) for make in ADAMS.scheduler_inputs[schedulers]])


@every_configuration_of_groups
def test_groups_with_different_weight_decay(kwargs):
    task = Task()
    groups = [{**kwargs, "params": [task.weight]}, {**kwargs, "params": [task.bias], "weight_decay": 0.0}]
    check_direction(task, AdamS(groups), kwargs.get("maximize", False))


@every_configuration_of_groups
def test_groups_with_different_lr(kwargs):
    task, irrelevant = Task(), Parameter(torch.randn(2))
    before = irrelevant.detach().clone()
    groups = [{"lr": 1e-3, **kwargs, "params": [task.weight, task.bias]}, {"params": [irrelevant]}]
    optimizer = AdamS(groups, lr=1e-28)
    irrelevant.grad = torch.rand_like(irrelevant)
    check_direction(task, optimizer, kwargs.get("maximize", False))
    assert torch.equal(irrelevant, before)


# Equality of implementations


@every_configuration
def test_tensor_lr_equals_float_lr(kwargs):
    kwargs = {**kwargs, "lr": 1e-3}
    task = Task()
    other = task.copy()
    optimizer = AdamS([task.weight, task.bias], **kwargs)
    try:
        tensor_lr = AdamS([other.weight, other.bias], **{**kwargs, "lr": torch.tensor(1e-3)})
    except ValueError as error:
        assert kwargs.get("foreach") and "lr as a Tensor is not supported" in str(error)
        return
    for _ in range(5):
        task.train(optimizer, 1)
        other.train(tensor_lr, 1)
        assert_close([task.weight, task.bias], [other.weight, other.bias])


@pytest.mark.parametrize("kwargs", configurations(skip=("differentiable", "fused")))
def test_complex_equals_its_view_as_real(kwargs):
    complex_params = [torch.randn(shape, dtype=torch.complex64) for shape in ((10, 5), (10,))] + [torch.randn(10, 5)]
    real_params = [torch.view_as_real(p).clone() if p.is_complex() else p.clone() for p in complex_params]
    optimizers = AdamS(complex_params, **kwargs), AdamS(real_params, **kwargs)
    for _ in range(3):
        for c, r in zip(complex_params, real_params, strict=True):
            c.grad = torch.randn_like(c)
            r.grad = torch.view_as_real(c.grad).clone() if c.is_complex() else c.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_close([torch.view_as_real(c) if c.is_complex() else c for c in complex_params], real_params)
    assert optimizers[0].grad_rms == pytest.approx(optimizers[1].grad_rms, rel=1e-6)


@pytest.mark.parametrize("kwargs", configurations(skip=("differentiable", "fused")))
def test_complex_equals_real_and_imaginary_parts(kwargs):
    def rosenbrock(x: torch.Tensor) -> torch.Tensor:
        return ((1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2).abs()

    whole = Parameter(torch.randn(2, dtype=torch.complex64))
    real, imaginary = Parameter(whole.detach().real.clone()), Parameter(whole.detach().imag.clone())
    optimizers = AdamS([whole], **kwargs), AdamS([real, imaginary], **kwargs)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        rosenbrock(whole).backward()
        rosenbrock(torch.complex(real, imaginary)).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_close([whole.detach().real, whole.detach().imag], [real.detach(), imaginary.detach()])


def small_model(dtype: torch.dtype) -> tuple[torch.nn.Sequential, list[torch.Tensor]]:
    """A model, and its parameters with an extra 0-d one at the end."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
    ).to(dtype)
    extra = torch.full((), 0.5, dtype=dtype, requires_grad=True)
    extra.grad = torch.rand_like(extra)
    return model, [*model.parameters(), extra]


def check_equal_steps(kwargs: dict, others: dict, dtype: torch.dtype, tolerance: float | None = None) -> None:
    """Seven steps, one without gradients and two with a frozen layer. After each, weights and state are compared and
    then set to the same values, so that rounding does not add up."""
    inputs = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=dtype)
    runs = []
    for arguments in (kwargs, others):
        model, params = small_model(dtype)
        runs.append((model, params, AdamS(params, **arguments)))
    for i in range(7):
        for model, _, optimizer in runs:
            model.zero_grad()
            model[2].requires_grad_(not 3 <= i < 5)
            if i != 2:
                model(inputs).sum().backward()
            optimizer.step()
        (_, params, optimizer), (_, other_params, other) = runs
        assert_close(torch.tensor(other.grad_rms), torch.tensor(optimizer.grad_rms), rtol=tolerance, atol=tolerance)
        for p, q in zip(params, other_params, strict=True):
            pairs = [(p, q), *((value, other.state[q][key]) for key, value in optimizer.state[p].items())]
            for mine, its in pairs:
                assert_close(its, mine, rtol=tolerance, atol=tolerance)
                with torch.no_grad():
                    its.copy_(mine)


FORLOOP = {"foreach": False, "fused": False, "differentiable": False}
algorithms = pytest.mark.parametrize(
    "kwargs", [pytest.param(i.kwargs, id=i.desc.replace(" ", "_")) for i in ADAMS.optim_inputs_func("cpu")]
)


@algorithms
def test_foreach_equals_forloop(kwargs):
    check_equal_steps({**kwargs, **FORLOOP}, {**kwargs, "foreach": True}, torch.float64)


# The kernels round to low precision at different places; torch's suite allows its own the same.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, None), (torch.float32, None), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)],
    ids=["fp64", "fp32", "bf16", "fp16"],
)
@pytest.mark.parametrize("fused", [{"fused": True}, {}], ids=["fused", "default"])
@algorithms
def test_fused_equals_forloop(kwargs, fused, dtype, tolerance):
    kwargs = {**kwargs, **({"eps": 0.1} if dtype == torch.float16 else {})}  # 1e-8 is 0 in float16
    check_equal_steps({**kwargs, **FORLOOP}, {**kwargs, **fused}, dtype, tolerance)


@pytest.mark.parametrize(
    "path", [{}, {"foreach": True}, {"foreach": False, "fused": False}], ids=["default", "foreach", "forloop"]
)
def test_float64_as_default_dtype(path):
    """torch then counts steps in float64 too."""
    torch.set_default_dtype(torch.float64)
    try:
        task = Task()
        optimizer = AdamS([task.weight, task.bias], **path)
        task.train(optimizer, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    state = optimizer.state[task.weight]
    assert task.weight.dtype == torch.float64
    mean = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in (task.weight, task.bias)]).mean()
    assert int(state["step"]) == 3
    assert optimizer.grad_rms == pytest.approx((mean / (1 - 0.999**3)).sqrt().item(), rel=1e-12)


# Steps that do nothing


@every_configuration
def test_step_without_gradients_does_nothing(kwargs):
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [p.clone() for p in params]
    AdamS(params, **kwargs).step(lambda: torch.tensor([1.0]))
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@every_configuration
def test_step_with_zero_gradients_does_nothing(kwargs):
    """Not even with weight decay: there is no gradient scale to decay by."""
    p = torch.randn(5, 1)
    before = p.clone()
    p.grad = torch.zeros_like(p)
    AdamS([p], **kwargs).step()
    assert torch.equal(p, before)


# State


@every_configuration
def test_can_be_printed(kwargs):
    text = repr(AdamS([Parameter(torch.randn(2, 3))], **kwargs))
    assert text.startswith("AdamS (") and "initial_weight_decay" in text


@every_configuration
def test_state_is_not_empty_after_a_step(kwargs):
    task = Task()
    optimizer = AdamS([task.weight, task.bias], **kwargs)
    task.train(optimizer, 1)
    assert all(len(state) > 0 for state in optimizer.state.values())


def named(task: Task, names: bool) -> list:
    return [("weight", task.weight), ("bias", task.bias)] if names else [task.weight, task.bias]


@pytest.mark.parametrize("first_named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("second_named", [True, False], ids=["into_named", "into_unnamed"])
@every_configuration
def test_state_dict_is_deterministic(kwargs, first_named, second_named):
    task = Task()
    optimizer = AdamS(named(task, first_named), **kwargs)
    task.train(optimizer, 10)
    other = task.copy()
    loaded = AdamS(named(other, second_named), **kwargs)

    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    for _ in range(10):
        task.train(optimizer, 1)
        other.train(loaded, 1)
        assert_close([task.weight, task.bias], [other.weight, other.bias], rtol=1e-6, atol=1e-7)
    assert_close(optimizer.state_dict()["state"], loaded.state_dict()["state"], rtol=1e-6, atol=1e-7)
    if first_named or second_named:
        assert loaded.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    # A parameter that is repeated has one representation.
    before = loaded.state_dict()["param_groups"][-1]
    loaded.param_groups.extend(loaded.param_groups)
    assert loaded.state_dict()["param_groups"][-1] == before


@every_configuration
def test_reloading_restores_the_same_state_dict(kwargs):
    task = Task()
    optimizer = AdamS([task.weight, task.bias], **kwargs)
    task.train(optimizer, 5)
    other = task.copy()
    loaded = AdamS([other.weight, other.bias], **kwargs)

    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    equal(optimizer, loaded)


@every_configuration
def test_older_state_dict_can_be_loaded(kwargs):
    """From a time before most flags."""
    task = Task()
    optimizer = AdamS([task.weight, task.bias], **kwargs)
    task.train(optimizer, 3)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in ADAMS.not_og_supported_flags:
            group.pop(flag, None)

    optimizer.load_state_dict(old)

    task.train(optimizer, 1)
    assert optimizer.schedule.step_count == 4


@pytest.mark.parametrize("weights_only", [True, False])
@every_configuration
def test_saved_state_dict_is_equal(kwargs, weights_only):
    task = Task()
    optimizer = AdamS([task.weight, task.bias], **kwargs)
    task.train(optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)

    loaded = torch.load(file, weights_only=weights_only)

    assert loaded["param_groups"] == optimizer.state_dict()["param_groups"]
    assert_close(loaded["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


@every_configuration
def test_step_count_that_is_no_tensor_can_be_loaded(kwargs):
    task = Task()
    optimizer = AdamS([task.weight, task.bias], **kwargs)
    task.train(optimizer, 3)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = state["step"].item()

    optimizer.load_state_dict(state_dict)

    task.train(optimizer, 1)
    assert int(optimizer.state[task.weight]["step"]) == optimizer.schedule.step_count == 4


@every_configuration
def test_deepcopy_has_all_public_attributes(kwargs):
    task = Task()
    optimizer = AdamS([task.weight, task.bias], **kwargs)
    task.train(optimizer, 3)

    def public(thing: object) -> set[str]:
        return {name for name in vars(thing) if not name.startswith("_")}

    assert public(copy.deepcopy(optimizer)) == public(optimizer)


# Hooks


@every_configuration
def test_state_dict_hooks(kwargs):
    optimizer = AdamS([Parameter(torch.rand(2, 3))], **kwargs)

    def before(optimizer):
        optimizer.state["test"] = 1

    def after(optimizer, state_dict):
        state_dict["ran"] = state_dict["state"].pop("test", None)
        return state_dict

    handle = optimizer.register_state_dict_post_hook(after)
    assert optimizer.state_dict()["ran"] is None
    optimizer.register_state_dict_pre_hook(before)
    assert optimizer.state_dict()["ran"] == 1
    handle.remove()
    assert "ran" not in optimizer.state_dict()


@every_configuration
def test_load_state_dict_hooks(kwargs):
    optimizer = AdamS([Parameter(torch.rand(2, 3))], **kwargs)
    state_dict = optimizer.state_dict()
    seen = []

    def set_lr(lr, optimizer, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = lr
        return state_dict

    optimizer.register_load_state_dict_post_hook(lambda optimizer: seen.append(optimizer.param_groups[0]["lr"]))
    optimizer.register_load_state_dict_pre_hook(functools.partial(set_lr, 0.002))
    optimizer.load_state_dict(state_dict)
    optimizer.register_load_state_dict_pre_hook(functools.partial(set_lr, 0.003), prepend=True)
    optimizer.load_state_dict(state_dict)
    optimizer.register_load_state_dict_pre_hook(functools.partial(set_lr, 0.004))
    optimizer.load_state_dict(state_dict)

    assert seen == [0.002, 0.002, 0.004]


@every_configuration
def test_step_hooks_of_instance_and_process_run_in_order(kwargs):
    params = [torch.tensor([1.0, 1.0])]
    optimizer, other = AdamS(params, **kwargs), torch.optim.SGD(params)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append(0)),
        register_optimizer_step_post_hook(lambda *_: calls.append(5)),
        optimizer.register_step_pre_hook(lambda *_: calls.append(1)),
        optimizer.register_step_post_hook(lambda *_: calls.append(2)),
        other.register_step_pre_hook(lambda *_: calls.append(1)),
        other.register_step_post_hook(lambda *_: calls.append(2)),
    ]
    try:
        for stepped in (optimizer, other, optimizer):
            stepped.step()
            assert calls == [0, 1, 2, 5]
            calls.clear()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert calls == []


@every_configuration
def test_closure_is_called_and_its_loss_returned(kwargs):
    task = Task()
    other = task.copy()
    optimizer, stepped = AdamS([task.weight, task.bias], **kwargs), AdamS([other.weight, other.bias], **kwargs)
    for _ in range(5):
        loss = optimizer.step(task.backward)
        assert torch.equal(loss, other.backward())
        stepped.step()
        assert torch.equal(task.weight, other.weight)
