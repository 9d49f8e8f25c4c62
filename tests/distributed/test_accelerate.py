"""The bare accelerate loop: the reference's weights under every engine; an error where `hf_swd.attach` is missing."""

from __future__ import annotations

import pytest
import task
import torch
from harness import value_of, variant


pytest.importorskip("accelerate")


def bare(engine: str, id: str = "", function: str = "run", **options):
    return variant(id or f"{engine}-{function}", function, module="engines_accelerate", engine=engine, **options)


def same_on_all_ranks(weights: list[dict]) -> dict:
    for other in weights[1:]:
        assert all(torch.equal(other[name], value) for name, value in weights[0].items())
    return weights[0]


@pytest.mark.parametrize(
    "variant",
    [
        bare("ddp", attach=False),
        bare("ddp", "ddp-accumulation", micros=2, attach=False),
        bare("fsdp1"),
        bare("fsdp2", attach=False),
        bare("fsdp2", "fsdp2-accumulation", micros=2, attach=False, slow=True),
        bare("zero0"),
        bare("zero1"),
        bare("zero2"),
        bare("zero2", "zero2-accumulation", micros=2),
        bare("zero3"),
        bare("zero2_offload"),
        bare("zero3_offload"),
        bare("hsdp", world=4, attach=False, slow=True),
        bare("fsdp1", "fsdp1-of-4", world=4, slow=True),
        bare("zero3", "zero3-of-4", world=4, slow=True),
    ],
)
def test_weights_are_those_of_the_reference(variant, results):
    weights = same_on_all_ranks(value_of(results))
    distance = task.distance(weights, task.reference().weights)
    print(f"distance {distance:.2g}")
    assert distance < 1e-4


@pytest.mark.parametrize(
    "variant",
    [bare(e, function="refused") for e in ("fsdp1", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")],
)
def test_without_attach_the_first_step_stops_and_changes_nothing(variant, results):
    for answer in value_of(results):
        assert "hf_swd.attach(optimizer" in answer["message"]
        assert answer["unchanged"]


@pytest.mark.parametrize(
    "variant",
    [
        bare("ddp", function="resumed"),
        bare("fsdp2", function="resumed"),
        bare("zero2", function="resumed"),
        bare("zero3", function="resumed"),
        bare("zero1", function="resumed", slow=True),
        bare("zero3_offload", function="resumed", slow=True),
    ],
)
def test_save_state_and_load_state_are_the_uninterrupted_run(variant, results):
    weights = same_on_all_ranks(value_of(results))
    assert task.distance(weights, task.reference().weights) < 1e-4
