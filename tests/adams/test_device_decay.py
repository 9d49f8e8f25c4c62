"""The path of accelerators, on the CPU: the effective decay stays a tensor and is applied before torch's kernel."""

import pytest
import torch

from hf_swd import AdamS


def pair(dtype=torch.float64, **options):
    """An optimizer that takes the decay as a number, and one that keeps it as a tensor, on equal parameters."""
    optimizers = []
    for host_decay in (True, False):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 3), (7,), ())]
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
        optimizers.append(AdamS(groups, **{"lr": 1e-2, "weight_decay": 0.5, **options}))
        optimizers[-1].schedule.decay_writer.on_host = host_decay
    return optimizers


def weights(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def run(optimizers, steps=20, scale=1.0):
    for step in range(steps):
        torch.manual_seed(step)
        gradients = [torch.randn_like(p) * scale for p in weights(optimizers[0])]
        for optimizer in optimizers:
            for p, gradient in zip(weights(optimizer), gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()


@pytest.mark.parametrize("foreach", [None, True, False], ids=["fused", "foreach", "forloop"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reference_steps": 5}, {"lr": torch.tensor(1e-2, dtype=torch.float64)}, {"weight_decay": 1e6}],
    ids=["plain", "calibrated", "tensor-lr", "held-at-1/lr"],
)
@pytest.mark.filterwarnings("ignore:the effective weight decay:RuntimeWarning")
def test_tensor_decay_equals_number(options, foreach):
    if foreach and "lr" in options:
        options = {**options, "lr": 1e-2}
    host, device = pair(**options, **({} if foreach is None else {"foreach": foreach, "fused": False}))
    run([host, device])
    for p, q in zip(weights(host), weights(device), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-15)
    assert device.param_groups[0]["weight_decay"] == pytest.approx(host.param_groups[0]["weight_decay"], rel=1e-12)
    assert isinstance(device.state_dict()["param_groups"][0]["weight_decay"], float)


def test_low_precision_weights_lose_the_right_share():
    """A factor 1 - 0.003 rounded to bfloat16 would be 1 - 0.0039."""
    torch.manual_seed(0)
    start = (1 + torch.rand(20_000)).bfloat16()
    gradient = torch.randn(20_000).bfloat16()
    after = []
    for weight_decay in (3.0, 0.0):
        p = torch.nn.Parameter(start.clone())
        optimizer = AdamS(
            [p], lr=1e-3, weight_decay=weight_decay, reference_steps=10
        )  # the effective decay is 3 for 10 steps
        optimizer.schedule.decay_writer.on_host = False
        p.grad = gradient.clone()
        optimizer.step()
        after.append(p.detach().double().sum())
    rounded_once = (start.double() * (1 - 0.003)).bfloat16().double().sum() / start.double().sum()
    assert 1 - (after[0] / after[1]).item() == pytest.approx(1 - rounded_once.item(), rel=0.02)


def test_a_skipped_step_decays_nothing():
    _, device = pair(torch.float32, fused=True)
    run([device], steps=2)
    before = [p.detach().clone() for p in weights(device)]
    device.grad_scale, device.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    run([device], steps=1, scale=float("inf"))
    assert all(torch.equal(p, old) for p, old in zip(weights(device), before, strict=True))
    assert device.schedule.step_count == 2
