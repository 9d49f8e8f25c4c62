"""What every run must hold to: assertions that the test files share."""

from __future__ import annotations

import math
from typing import Any

import torch
from harness import value_of
from task import STEPS, Run, distance


TOLERANCE = 1e-4  # of the distance travelled, for fp32 engines


def check_run(
    results: list[dict[str, Any]], expected: Run, *, tolerance: float = TOLERANCE, decay_tolerance: float = TOLERANCE
) -> None:
    """The reference's weights; its decay, one per optimizer step; the same bits on every rank (I2, I3, I5)."""
    values = value_of(results)
    for value in values:
        assert distance(value["weights"], expected.weights) < tolerance
    check_decays(values, expected, decay_tolerance)
    check_equal_weights(values)


def check_decays(values: list[dict[str, Any]], expected: Run, tolerance: float = TOLERANCE) -> None:
    for value in values:
        assert value["decays"] == values[0]["decays"], "ranks decay differently"
        assert value["step_count"] == STEPS
    decays = values[0]["decays"]
    assert [len(step) for step in decays] == [1] * len(expected.decays), f"one decay per optimizer step, not {decays}"
    for (decay,), reference in zip(decays, expected.decays, strict=True):
        assert math.isclose(decay, reference, rel_tol=tolerance)


def check_equal_weights(values: list[dict[str, Any]]) -> None:
    for value in values:
        assert all(torch.equal(value["weights"][n], w) for n, w in values[0]["weights"].items()), "ranks drift apart"


def check_as_good_as_adamw(
    results: list[dict[str, Any]], expected: Run, adamw_results: list[dict[str, Any]], adamw_expected: Run
) -> None:
    """In low precision: no further from its reference than AdamW on the same engine is from its own."""
    values, adamw_values = value_of(results), value_of(adamw_results)
    error = distance(values[0]["weights"], expected.weights)
    adamw_error = distance(adamw_values[0]["weights"], adamw_expected.weights)
    assert adamw_error > TOLERANCE, "this engine is not of low precision"
    assert error < 1.1 * adamw_error
    check_equal_weights(values)


def check_refusal(results: list[dict[str, Any]], *words: str) -> None:
    """Every rank stopped with a message that has these words, and no weight has changed (I6)."""
    for value in value_of(results):
        assert all(word in value["message"] for word in words), value["message"]
        assert value["weights"] and all(torch.equal(w, value["before"][n]) for n, w in value["weights"].items())


def check_collectives(results: list[dict[str, Any]], count: int) -> None:
    """How many collectives there are inside every `step()` (I4), of a few numbers each."""
    for value in value_of(results):
        for step in value["collectives"]:
            assert len(step) == count
            assert all(0 < size <= 16 * 8 for size in step)
