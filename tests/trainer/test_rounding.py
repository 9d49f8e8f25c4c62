"""trainer.rounding: the share of decay that it says is lost is lost, by what happens to weights in 500 steps."""

from __future__ import annotations

import pytest
import torch

from hf_swd import AdamS
from hf_swd.trainer.rounding import decay_lost_to_rounding, rounding_warning


STEPS = 500


def trained(optimizer_class, weight_decay, dtype, lr):
    """Weights after `STEPS` steps on noise with a little drift, their start, and what was said of every 50th step."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter((0.02 * torch.randn(100, 300)).to(dtype))
    start, said = weight.detach().double(), []
    options = {"reference_steps": 20} if optimizer_class is AdamS else {"fused": True}
    optimizer = optimizer_class([weight], lr=lr, weight_decay=weight_decay, **options)
    for step in range(1, STEPS + 1):
        weight.grad = (torch.randn(100, 300) + 0.1).to(dtype)
        optimizer.step()
        if step % 50 == 0:
            said.append(decay_lost_to_rounding(optimizer))
    return weight.detach().double(), start, said


def decayed(optimizer_class, dtype, lr):
    """By how much decay alone moved the weights towards zero."""
    with_decay, start, said = trained(optimizer_class, 0.1, dtype, lr)
    without, _, _ = trained(optimizer_class, 0.0, dtype, lr)
    return ((without - with_decay) * start).sum().item(), said


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, AdamS])
@pytest.mark.parametrize("lr", [2e-5, 1e-4, 1e-3])
def test_share_that_is_said_to_be_lost_is_lost(optimizer_class, lr):
    exact, _ = decayed(optimizer_class, torch.float32, lr)
    rounded, said = decayed(optimizer_class, torch.bfloat16, lr)
    assert sum(said) / len(said) == pytest.approx(1 - rounded / exact, abs=0.06)


@pytest.mark.parametrize(
    ("lr", "dtype", "warns"),
    [(2e-5, torch.bfloat16, True), (2e-5, torch.float32, False), (5e-3, torch.bfloat16, False)],
)
def test_warning_names_the_share_and_the_remedy(lr, dtype, warns):
    torch.manual_seed(0)
    weight = torch.nn.Parameter((0.02 * torch.randn(300, 300)).to(dtype))
    optimizer = AdamS([weight], lr=lr, weight_decay=0.1, reference_steps=20)
    assert rounding_warning(optimizer) is None  # before the first step
    for _ in range(30):
        weight.grad = torch.randn(300, 300).to(dtype)
        optimizer.step()
    text = rounding_warning(optimizer)
    assert (text is not None) == warns
    if warns:
        assert "rounding swallows 100 % of the weight decay" in text and 'dtype="float32"' in text


def test_nothing_is_said_of_weights_that_are_not_numbers():
    weight = torch.nn.Parameter(torch.full((10, 10), torch.nan, dtype=torch.float16))
    optimizer = AdamS([weight], lr=1e-4, weight_decay=0.1, reference_steps=20)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert rounding_warning(optimizer) is None
