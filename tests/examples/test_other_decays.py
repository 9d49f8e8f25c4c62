"""examples/comparisons/other_decays.py: the forms of decay are what they say."""

from __future__ import annotations

import pytest
import torch
from other_decays import Decay

from hf_swd import AdamS


def trained(
    decay: dict | None, build=torch.optim.AdamW, steps: int = 12, weight_decay: float = 2.0, **options
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(40, 30, dtype=torch.float64)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = build(groups, lr=1e-2, weight_decay=weight_decay, **options)
    if decay is not None:
        Decay(optimizer, **{"power": 0.0, "reference_steps": 3, "elements": "all", "seed": 0, **decay})
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype) * 2.0**-step
        optimizer.step()
    return [p.detach() for p in params]


def test_power_minus_one_is_adams_and_power_zero_adamw():
    for p, expected in zip(trained({"power": -1.0}), trained(None, AdamS, reference_steps=3), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=0)
    assert all(map(torch.equal, trained({}), trained(None)))


def test_power_one_decays_less_as_gradients_fall():
    norms = [trained({"power": power})[0].norm() for power in (1.0, 0.5, 0.0, -0.5)]
    assert norms == sorted(norms, reverse=True)


def test_cautious_decays_what_the_update_moves_towards_zero():
    before = trained({"elements": "cautious"}, steps=5)[0]
    after = trained({"elements": "cautious"}, steps=6)[0]
    plain = before
    torch.manual_seed(0)
    [torch.randn(40, 30, dtype=torch.float64) for _ in range(2)]
    m = v = 0.0
    for step in range(6):
        g = torch.randn(40, 30, dtype=torch.float64) * 2.0**-step
        torch.randn(40, 30, dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    update = m / (1 - 0.9**6) / ((v / (1 - 0.999**6)).sqrt() + 1e-8)
    expected = plain - 1e-2 * update - 1e-2 * 2.0 * plain * (update * plain >= 0)
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-12)


def test_random_decays_as_many_elements_as_cautious():
    plain = trained({"elements": "cautious"}, steps=1, weight_decay=0.0)[0]
    shares = [(trained({"elements": e}, steps=1)[0] != plain).double().mean().item() for e in ("cautious", "random")]
    assert shares[0] == pytest.approx(shares[1], abs=0.05) and 0.3 < shares[0] < 0.7


def test_unknown_elements_are_refused():
    with pytest.raises(ValueError, match="elements='some'"):
        trained({"elements": "some"})
