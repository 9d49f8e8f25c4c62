"""FSDP2: whatever others do to gradients, model and state, every rank decays by what Adam's moments tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Variant, value_of, variant
from judge import check_equal_weights


pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

Results = list[dict[str, Any]]


def check_steps(ranks: list[list[dict[str, float]]], tolerance: float = 1e-5) -> None:
    for steps in ranks:
        assert [step["decay"] for step in steps] == [step["decay"] for step in ranks[0]], "ranks decay differently"
        for number, step in enumerate(steps):
            assert step["rms"] == pytest.approx(step["moments"], rel=tolerance), f"step {number + 1}"


EDITS = ("all", "one", "smallest", "rows", "data", "one_rank")


@pytest.mark.parametrize(
    "variant",
    [
        *(variant(f"own-loop-{edit}", "own_loop", module="edits", edit=edit) for edit in EDITS),
        variant("own-loop-all-adamw", "own_loop", module="edits", edit="all", optim="scheduled"),
        *(variant(f"trainer-{edit}", "trainer", module="edits", edit=edit) for edit in EDITS),
    ],
)
def test_gradients_changed_after_clipping_are_what_counts(results: Results) -> None:
    values = value_of(results)
    check_steps([value["steps"] for value in values])
    check_equal_weights(values)


@pytest.mark.parametrize(
    "variant",
    [
        variant(f"{move}-{'stepped' if stepped else 'built'}", "moved", module="edits", move=move, stepped=stepped)
        for move in ("cpu", "double", "bfloat16")
        for stepped in (False, True)
        if not stepped or move == "cpu"
    ],
)
def test_model_converted_after_the_optimizer_was_built(results: Results, variant: Variant) -> None:
    check_steps(value_of(results), tolerance=0.05 if variant.kwargs["move"] == "bfloat16" else 1e-5)


@pytest.mark.parametrize("variant", [variant("from-meta", "from_meta", module="edits")])
def test_optimizer_built_on_the_meta_device(results: Results) -> None:
    check_steps(value_of(results))


@pytest.mark.parametrize("variant", [variant("offloaded", "offloaded", module="edits")])
def test_moments_moved_between_the_steps(results: Results) -> None:
    check_steps(value_of(results))
