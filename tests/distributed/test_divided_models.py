"""Models that transformers divides at loading (tensors, experts, FSDP2), in a Trainer: weights of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import task
from harness import Variant, run_variants, value_of, variant
from judge import check_equal_weights
from packaging.version import Version


pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers", minversion="5.20")  # before, a Trainer refuses what it divides
right_experts_under_fsdp = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="transformers 5.20.2: AdamW is wrong, too (0.002)"
)

Results = list[dict[str, Any]]


def divided(kind: str, id: str = "", **options: Any) -> Any:
    sizes = {name: options.pop(name) for name in [*options] if name.endswith("_size") or name == "tp_plan"}
    marks = [right_experts_under_fsdp] if {"ep_size", "fsdp_size"} <= set(sizes) else []
    name = "-".join([kind, *(f"{key.removesuffix('_size')}{value}" for key, value in sizes.items()), id])
    name = name.strip("-")
    return variant(
        name, "run", module="engines_trainer", engine="divided", kind=kind, sizes=sizes, marks=marks, **options
    )


def check(results: Results, variant: Variant, *, unclipped_norm: bool = False) -> list[dict[str, Any]]:
    """Weights and decays of the reference, the same bits on every rank; no clipping but the schedule's."""
    answers = value_of(results)
    expected = task.reference(kind=variant.kwargs["kind"], unclipped_norm=unclipped_norm)
    check_weights(answers, expected, variant.kwargs["kind"])
    for answer in answers:
        decays = [entry["swd/weight_decay"] for entry in answer["logs"]]
        assert decays == pytest.approx(expected.decays, rel=1e-4)
        assert answer["clippings"] == []
    return answers


def check_weights(answers: list[dict[str, Any]], expected: task.Run, kind: str) -> None:
    distance = task.distance(answers[0]["weights"], expected.weights, kind)
    print(f"distance {distance:.2g}")
    assert distance < 1e-4
    check_equal_weights(answers)


@pytest.mark.parametrize(
    "variant",
    [
        divided("llama", tp_size=2),
        divided("llama", "SWDTrainer", tp_size=2, trainer="SWDTrainer"),
        divided("llama", "ParallelismConfig", tp_size=2, parallelism={"tp_size": 2}),
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


@pytest.mark.parametrize(
    "variant",
    [
        variant("llama-accelerate", "accelerate_loop", module="divided", kind="llama", sizes={"tp_size": 2}),
        variant(
            "mixtral-accelerate", "accelerate_loop", module="divided", kind="mixtral", sizes={"tp_size": 2}, slow=True
        ),
    ],
)
def test_accelerate_loop(results: Results, variant: Variant) -> None:
    check_probed(results, variant)


def check_probed(results: Results, variant: Variant) -> None:
    answers = value_of(results)
    expected = task.reference(kind=variant.kwargs["kind"])
    check_weights(answers, expected, variant.kwargs["kind"])
    for answer in answers:
        assert [decay for (decay,) in answer["decays"]] == pytest.approx(expected.decays, rel=1e-4)


# Checkpoints: a Trainer writes none of the optimizer of such a model, torch.distributed.checkpoint does


@pytest.mark.parametrize(
    "variant",
    [
        variant(f"resumed-{id}", "divided_resume", module="checkpoints", slow=slow, marks=marks, **kwargs)
        for id, slow, marks, kwargs in (
            ("tp", False, [], {"kind": "llama", "sizes": {"tp_size": 2}, "then": {"tp_size": 2}}),
            ("tp-then-fsdp", True, [], {"kind": "llama", "sizes": {"tp_size": 2}, "then": {"fsdp_size": 2}}),
            (
                "experts",
                True,
                [right_experts_under_fsdp],
                {"kind": "mixtral", **dict.fromkeys(("sizes", "then"), {"fsdp_size": 2, "ep_size": 2})},
            ),
        )
    ],
)
def test_resumed(results: Results, variant: Variant) -> None:
    check_probed(results, variant)


@pytest.mark.slow
def test_from_two_processes_to_four(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    parts = {
        2: {"sizes": {"tp_size": 2}, "save": folder},
        4: {"sizes": {"tp_size": 2, "fsdp_size": 2}, "load": folder},
    }
    for world, kwargs in parts.items():
        spec = Variant("part", "checkpoints", "divided_run", world, {"kind": "llama", **kwargs}).spec()
        answers = value_of(run_variants([spec], world, tmp_path / f"run-{world}")["part"])
    check_weights(answers, task.reference(kind="llama"), "llama")
