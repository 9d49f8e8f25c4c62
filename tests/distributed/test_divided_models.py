"""Models that transformers divides at loading (tensors, experts, FSDP2), in a Trainer: weights of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import task
from harness import Variant, value_of, variant
from judge import check_equal_weights


pytest.importorskip("accelerate")
pytest.importorskip("transformers", minversion="5.16")  # before, what it divides is no DTensor

Results = list[dict[str, Any]]


def divided(kind: str, id: str = "", **options: Any) -> Any:
    sizes = {name: options.pop(name) for name in [*options] if name.endswith("_size") or name == "tp_plan"}
    name = "-".join([kind, *(f"{key.removesuffix('_size')}{value}" for key, value in sizes.items()), id])
    return variant(
        name.strip("-"), "run", module="engines_trainer", engine="divided", kind=kind, sizes=sizes, **options
    )


def check(results: Results, variant: Variant, *, unclipped_norm: bool = False) -> list[dict[str, Any]]:
    """Weights and decays of the reference, the same bits on every rank; no clipping but the schedule's."""
    answers = value_of(results)
    kind = variant.kwargs["kind"]
    expected = task.reference(kind=kind, unclipped_norm=unclipped_norm)
    distance = task.distance(answers[0]["weights"], expected.weights, kind)
    print(f"distance {distance:.2g}")
    assert distance < 1e-4
    check_equal_weights(answers)
    for answer in answers:
        decays = [entry["swd/weight_decay"] for entry in answer["logs"]]
        assert decays == pytest.approx(expected.decays, rel=1e-4)
        assert answer["clippings"] == []
    return answers


@pytest.mark.parametrize(
    "variant",
    [
        divided("llama", tp_size=2),
        divided("llama", "SWDTrainer", tp_size=2, trainer="SWDTrainer"),
        divided("llama", tp_size=2, fsdp_size=2, world=4, slow=True),
        divided("llama", fsdp_size=2, slow=True),
        divided("llama", dp_replicate_size=2, fsdp_size=2, world=4, slow=True),
    ],
)
def test_tensor_parallel(results: Results, variant: Variant) -> None:
    check(results, variant)


@pytest.mark.parametrize(
    "variant",
    [
        divided("mixtral", tp_size=2, slow=True),  # parts of every expert on each rank
        divided("mixtral", tp_size=2, ep_size=2),
        divided("mixtral", fsdp_size=2, ep_size=2),
        divided("mixtral", "SWDTrainer", fsdp_size=2, ep_size=2, trainer="SWDTrainer", slow=True),
        divided("mixtral", tp_size=2, fsdp_size=2, ep_size=2, world=4, slow=True),
        divided("mixtral", tp_size=2, fsdp_size=2, ep_size=4, world=4, slow=True),
        divided("mixtral", fsdp_size=4, ep_size=2, world=4, slow=True),
    ],
)
def test_experts(results: Results, variant: Variant) -> None:
    check(results, variant)


@pytest.mark.parametrize(
    "variant",
    [
        divided("llama", "looked-at", tp_size=2, look=True),
        divided("mixtral", "looked-at", tp_size=2, fsdp_size=2, ep_size=4, world=4, look=True, slow=True),
    ],
)
def test_gradients_that_someone_looks_at_are_clipped(results: Results, variant: Variant) -> None:
    largest = task.KINDS[variant.kwargs["kind"]].max_norm
    for answer in check(results, variant):
        clipped = [min(entry["grad_norm"], largest) for entry in answer["logs"]]
        assert answer["norms"] == pytest.approx(clipped, rel=1e-5)


@pytest.mark.parametrize("variant", [divided("llama", "unclipped-norm", tp_size=2, optim_args="unclipped_norm=true")])
def test_schedule_by_the_norm_before_clipping(results: Results, variant: Variant) -> None:
    check(results, variant, unclipped_norm=True)


@pytest.mark.parametrize(
    "variant",
    [
        variant(f"{kind}-{engine}", "run", module="engines_trainer", engine=engine, kind=kind, slow=slow)
        for engine, kind, slow in (("ddp", "mixtral", False), ("fsdp2", "mixtral", False), ("fsdp2", "llama", True))
    ],
)
def test_undivided(results: Results, variant: Variant) -> None:
    check(results, variant)
