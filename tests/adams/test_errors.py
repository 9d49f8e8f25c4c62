"""Wrong values: each error names the argument and the value, and leaves everything as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from hf_swd import AdamS, ScheduledWeightDecay, create_adams


def parameter() -> Parameter:
    return Parameter(torch.ones(2, 2))


# (argument, value, exception, what the message must hold)
GROUP_OPTIONS = [
    ("lr", -1.0, ValueError, r"lr=-1"),
    ("lr", math.nan, ValueError, r"lr=nan"),
    ("lr", math.inf, ValueError, r"lr=inf"),
    ("lr", "fast", TypeError, r"lr='fast'"),
    ("lr", None, TypeError, r"lr=None"),
    ("lr", torch.tensor([0.1, 0.2]), ValueError, r"lr.*1.element"),
    ("lr", torch.tensor(-0.5), ValueError, r"lr=.*-0\.5"),
    ("betas", (1.0, 0.9), ValueError, r"betas\[0\]=1"),
    ("betas", (0.9, 1.0), ValueError, r"betas\[1\]=1"),
    ("betas", (-0.1, 0.9), ValueError, r"betas\[0\]=-0\.1"),
    ("betas", (0.9, math.nan), ValueError, r"betas\[1\]=nan"),
    ("betas", (0.9,), (TypeError, ValueError), r"betas=\(0\.9,\)"),
    ("betas", (0.9, 0.99, 0.999), (TypeError, ValueError), r"betas=\(0\.9, 0\.99, 0\.999\)"),
    ("betas", 0.9, TypeError, r"betas=0\.9"),
    ("betas", "xy", (TypeError, ValueError), r"betas='xy'"),
    ("betas", (0.9, "0.99"), TypeError, r"betas\[1\]='0\.99'"),
    ("betas", (0.9, torch.tensor(0.99)), ValueError, r"betas.*both"),
    ("eps", -1e-8, ValueError, r"eps=-1e-08"),
    ("eps", math.nan, ValueError, r"eps=nan"),
    ("eps", "tiny", TypeError, r"eps='tiny'"),
    ("weight_decay", -1, ValueError, r"weight_decay=-1"),
    ("weight_decay", math.nan, ValueError, r"weight_decay=nan"),
    ("weight_decay", math.inf, ValueError, r"weight_decay=inf"),
    ("weight_decay", "0.1", TypeError, r"weight_decay='0\.1'"),
    ("weight_decay", None, TypeError, r"weight_decay=None"),
    ("amsgrad", "false", TypeError, r"amsgrad='false'"),
    ("maximize", "no", TypeError, r"maximize='no'"),
    ("foreach", "auto", TypeError, r"foreach='auto'"),
    ("fused", "yes", TypeError, r"fused='yes'"),
    ("capturable", 2.5, TypeError, r"capturable=2\.5"),
    ("differentiable", True, ValueError, r"differentiable=True"),
]
CONSTRUCTOR_ONLY = [
    ("reference_steps", -1, ValueError, r"reference_steps=-1"),
    ("reference_steps", 1.5, TypeError, r"reference_steps=1\.5"),
    ("reference_steps", "100", TypeError, r"reference_steps='100'"),
    ("reference_steps", True, TypeError, r"reference_steps=True"),
    ("reference_steps", None, TypeError, r"reference_steps=None"),
    ("process_group", "world", TypeError, r"process_group='world'"),
]


def table(rows):
    return pytest.mark.parametrize(
        ("name", "value", "exception", "message"), rows, ids=[f"{name}={value!r}" for name, value, *_ in rows]
    )


@table(GROUP_OPTIONS + CONSTRUCTOR_ONLY)
def test_argument_of_adams(name, value, exception, message):
    with pytest.raises(exception, match=message):
        AdamS([parameter()], **{name: value})


@table(GROUP_OPTIONS + CONSTRUCTOR_ONLY)
def test_argument_of_create_adams(name, value, exception, message):
    with pytest.raises(exception, match=message):
        create_adams(nn.Linear(2, 2), **{name: value})


@table(GROUP_OPTIONS)
def test_option_of_a_parameter_group(name, value, exception, message):
    with pytest.raises(exception, match=message):
        AdamS([{"params": [parameter()]}, {"params": [parameter()], name: value}])


@table(GROUP_OPTIONS)
def test_option_of_an_added_group_leaves_the_optimizer_alone(name, value, exception, message):
    optimizer = AdamS([parameter()])
    with pytest.raises(exception, match=message):
        optimizer.add_param_group({"params": [parameter()], name: value})
    assert len(optimizer.param_groups) == 1


@table(CONSTRUCTOR_ONLY)
def test_argument_of_scheduled_weight_decay(name, value, exception, message):
    with pytest.raises(exception, match=message):
        ScheduledWeightDecay(torch.optim.AdamW([parameter()]), **{name: value})


@table(
    [
        ("beta2", 1.0, ValueError, r"beta2=1"),
        ("beta2", -0.1, ValueError, r"beta2=-0\.1"),
        ("beta2", math.nan, ValueError, r"beta2=nan"),
        ("beta2", "0.9", TypeError, r"beta2='0\.9'"),
    ]
)
def test_beta2_of_scheduled_weight_decay(name, value, exception, message):
    with pytest.raises(exception, match=message):
        ScheduledWeightDecay(torch.optim.AdamW([parameter()]), **{name: value})


@pytest.mark.parametrize("optimizer", [None, nn.Linear(2, 2), "adamw"], ids=repr)
def test_scheduled_weight_decay_on_what_is_no_optimizer(optimizer):
    with pytest.raises(TypeError, match="(?i)optimizer"):
        ScheduledWeightDecay(optimizer)


@pytest.mark.parametrize(
    ("params", "exception", "message"),
    [
        (parameter(), TypeError, "iterable"),
        ([], ValueError, "empty parameter list"),
        (["weight"], TypeError, "Tensor"),
        ([{"params": [parameter()], "lr": -1}], ValueError, "lr=-1"),
    ],
    ids=["tensor", "empty", "strings", "group"],
)
def test_params(params, exception, message):
    with pytest.raises(exception, match=message):
        AdamS(params)


@pytest.mark.parametrize(
    ("flags", "exception", "message"),
    [
        ({"fused": True, "foreach": True}, RuntimeError, "fused.*foreach"),
        ({"lr": torch.tensor(0.1), "foreach": True}, ValueError, "lr as a Tensor.*foreach=True"),
    ],
    ids=["fused_foreach", "tensor_lr_foreach"],
)
def test_contradicting_arguments(flags, exception, message):
    with pytest.raises(exception, match=message):
        AdamS([parameter()], **flags)


def test_positional_arguments_end_with_amsgrad():
    AdamS([parameter()], 1e-3, (0.9, 0.999), 1e-8, 5e-4, False)
    with pytest.raises(TypeError, match="positional"):
        AdamS([parameter()], 1e-3, (0.9, 0.999), 1e-8, 5e-4, False, 100)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan], ids=str)
def test_max_norm_of_clip_grad_norm_out_of_range(value):
    p = parameter()
    optimizer = AdamS([p])
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=rf"max_norm={value}".replace(".", r"\.")):
        optimizer.clip_grad_norm_(value)
    assert torch.equal(p.grad, torch.ones_like(p))


@pytest.mark.parametrize("value", ["1.0", None], ids=repr)
def test_max_norm_of_clip_grad_norm_of_wrong_type(value):
    with pytest.raises(TypeError, match="max_norm"):
        AdamS([parameter()]).clip_grad_norm_(value)


@pytest.mark.parametrize("value", [-1.0, math.inf], ids=str)
def test_assigned_weight_decay_out_of_range_is_refused_before_any_weight_changes(value):
    p = parameter()
    optimizer = AdamS([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["weight_decay"] = value

    with pytest.raises(ValueError, match=f"weight_decay={value}"):
        optimizer.step()

    assert torch.equal(p, before)


def test_create_adams_without_trainable_parameters():
    with pytest.raises(ValueError, match="requires_grad"):
        create_adams(nn.Linear(2, 2).requires_grad_(False))
