"""Save at step 6 and go on in a fresh model and optimizer: the uninterrupted run.

Under each engine, and from one to another number of processes.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import Variant, run_variants, value_of
from judge import check_equal_weights
from task import STEPS, Run, distance, reference


pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

Results = list[dict[str, Any]]
variant = partial(harness.variant, module="checkpoints")
TOLERANCE = 1e-5


def check_resumed(
    results: Results, expected: Run, *, tolerance: float = TOLERANCE, decay_tolerance: float = TOLERANCE
) -> None:
    """The weights of the uninterrupted run, and its decays from the first resumed step on: there is no jump."""
    values = value_of(results)
    for value in values:
        assert distance(value["weights"], expected.weights) < tolerance
        assert value["decays"] == values[0]["decays"]
        assert value["step_count"] == STEPS
    decays = values[0]["decays"]
    assert [len(step) for step in decays] == [1] * (STEPS // 2)
    for (decay,), uninterrupted in zip(decays, expected.decays[-len(decays) :], strict=True):
        assert math.isclose(decay, uninterrupted, rel_tol=decay_tolerance)
    check_equal_weights(values)


@pytest.mark.parametrize(
    "variant",
    [
        variant("ddp", "ddp_resume"),
        variant("fsdp2", "fsdp2_resume"),
        variant("fsdp2-cpu-offload", "fsdp2_resume", offload=True, slow=True),
        variant("fsdp2-unsharded", "fsdp2_resume", unsharded=["classifier"]),
        variant("hsdp", "fsdp2_resume", world=4, mesh=[2, 2], slow=True),
        variant("fsdp1-full", "fsdp1_resume"),
        variant("fsdp1-sharded", "fsdp1_resume", state_type="sharded", slow=True),
    ],
)
def test_torch_engines(results: Results) -> None:
    check_resumed(results, reference())


@needs_deepspeed
@pytest.mark.parametrize(
    "variant",
    [
        variant("zero0", "zero_resume", stage=0, slow=True),
        variant("zero1", "zero_resume", stage=1, slow=True),
        variant("zero2", "zero_resume", stage=2),
        variant("zero2-attach-after-load", "zero_resume", stage=2, attach="after"),
        variant("zero3", "zero_resume", stage=3),
        variant("zero3-attach-after-load", "zero_resume", stage=3, attach="after", slow=True),
        variant("zero3-sub-groups", "zero_resume", stage=3, sub_group=3000, slow=True),
        variant("zero2-three-groups", "zero_resume", stage=2, options={"split": True}, slow=True),
        variant("zero2-offload", "zero_resume", stage=2, optim="cpu_adams", offload="cpu"),
        variant(
            "zero2-offload-attach-after-load",
            "zero_resume",
            stage=2,
            optim="cpu_adams",
            offload="cpu",
            attach="after",
            slow=True,
        ),
        variant("zero3-offload", "zero_resume", stage=3, optim="cpu_adams", offload="cpu", slow=True),
    ],
)
def test_deepspeed(results: Results) -> None:
    check_resumed(results, reference())


@needs_deepspeed
@pytest.mark.parametrize(
    "variant",
    [
        variant("bf16-optimizer", "zero_resume_and_uninterrupted", stage=1, dtype="bf16", grad_accum_dtype="fp32"),
        variant("zero2-bf16", "zero_resume_and_uninterrupted", stage=2, dtype="bf16"),
        variant("zero3-bf16", "zero_resume_and_uninterrupted", stage=3, dtype="bf16", slow=True),
    ],
)
def test_deepspeed_in_bf16_against_its_own_uninterrupted_run(results: Results) -> None:
    values = value_of(results)
    whole = values[0]["whole"]
    expected = Run({n: w.double() for n, w in whole["weights"].items()}, [decay for (decay,) in whole["decays"]])
    check_resumed([{"value": value["resumed"]} for value in values], expected)


@pytest.mark.parametrize(
    "variant",
    [
        variant("ddp-bf16-states", "ddp_resume", bf16_states=True),
        variant("fsdp2-bf16-states", "fsdp2_resume", bf16_states=True),
    ],
)
def test_moments_of_low_precision_make_no_jump(results: Results) -> None:
    # The moments lose 3 digits, and with them the weights and the mean that is read from them.
    check_resumed(results, reference(), tolerance=2e-3, decay_tolerance=1e-3)


@pytest.mark.parametrize(
    "variant",
    [
        variant("fsdp2-from-adamw", "fsdp2_resume", first_optim="adamw"),
        variant("zero2-from-adamw", "zero_resume", stage=2, first_optim="adamw", marks=[needs_deepspeed]),
    ],
)
def test_from_adamw_to_adams(results: Results) -> None:
    check_resumed(results, reference(adamw_steps=STEPS // 2))


@pytest.mark.parametrize(
    "variant",
    [
        variant("fsdp2-reference-4", "fsdp2_resume", options={"reference_steps": 4}, slow=True),
        variant("fsdp2-reference-9", "fsdp2_resume", options={"reference_steps": 9}),
        variant("zero2-reference-4", "zero_resume", stage=2, options={"reference_steps": 4}, marks=[needs_deepspeed]),
        variant(
            "zero3-reference-9",
            "zero_resume",
            stage=3,
            options={"reference_steps": 9},
            slow=True,
            marks=[needs_deepspeed],
        ),
    ],
)
def test_reference_steps_go_on(results: Results, variant: Variant) -> None:
    check_resumed(results, reference(**variant.kwargs["options"]))


# From 2 processes to 1 and to 4


ZERO = {"zero1": {"stage": 1}, "zero2": {"stage": 2}, "zero3": {"stage": 3}}


def spec(id: str, function: str, **kwargs: Any) -> dict[str, Any]:
    return Variant(id, "checkpoints", function, 0, kwargs).spec()


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of checkpoints of 2 processes: of FSDP2, and universal ones of ZeRO."""
    root = tmp_path_factory.mktemp("saved")
    names = ["fsdp2", *(ZERO if importlib.util.find_spec("deepspeed") else ())]
    folders = {name: str(root / name) for name in names}
    specs = [spec("fsdp2", "fsdp2_save", folder=folders["fsdp2"])]
    specs += [spec(name, "zero_save", folder=folders[name], **ZERO[name]) for name in names[1:]]
    for results in run_variants(specs, 2, root / "run").values():
        value_of(results)
    for name in names[1:]:
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", f"{folders[name]}/half", "--output_folder", f"{folders[name]}/half_universal"]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.fixture(scope="module")
def resumed_by(
    saved_by_two: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[str, Results]]:
    """What each of them answers when it is gone on from in so many processes."""
    folders = dict(saved_by_two)
    specs = [spec("fsdp2", "fsdp2_resume", saved=folders.pop("fsdp2"))]
    specs += [
        spec(name, "zero_resume", saved=folder, universal=True, **ZERO[name]) for name, folder in folders.items()
    ]
    return functools.cache(lambda world: run_variants(specs, world, tmp_path_factory.mktemp(f"resumed-{world}")))


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    ["fsdp2", *(pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2))],
)
def test_saved_by_two_processes(resumed_by: Callable[[int], dict[str, Results]], name: str, world: int) -> None:
    check_resumed(resumed_by(world)[name], reference())


@needs_deepspeed
def test_universal_checkpoint_of_stage_3_keeps_the_schedule(resumed_by: Callable[[int], dict[str, Results]]) -> None:
    # The weights are not the uninterrupted run's, of AdamW neither (0.7 of the distance, deepspeed 0.19.8, also from 2
    # to 2 processes): what the universal checkpoint of stage 3 restores is not what was saved. The schedule is.
    for value in value_of(resumed_by(1)["zero3"]):
        assert value["step_count"] == STEPS
        (decay,) = value["decays"][0]
        assert math.isclose(decay, reference().decays[STEPS // 2], rel_tol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_trainer_on_another_number_of_processes(engine: str, tmp_path: Path) -> None:
    folder, at = str(tmp_path / "saved"), STEPS // 2
    parts = {2: ("save", {"folder": folder, "at": at}), 4: ("run", {"saved": folder, "resume_at": at})}
    for world, (function, kwargs) in parts.items():
        spec = Variant("part", "engines_trainer", function, world, {"engine": engine, **kwargs}).spec()
        answers = value_of(run_variants([spec], world, tmp_path / f"run-{world}")["part"])
    for answer in answers:
        assert distance(answer["weights"], reference().weights) < TOLERANCE
        assert [entry["step"] for entry in answer["logs"]] == list(range(1, STEPS + 1))
    check_equal_weights(answers)
