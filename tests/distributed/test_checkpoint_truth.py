"""What an engine's checkpoint brings is what counts: rolled back, resharded, by way of AdamW, and bit for bit."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import harness
import pytest
import torch
import truth
from harness import Variant, run_variants, value_of
from reference_adams import ReferenceAdamS


pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

LAMBDAS = [truth.WEIGHT_DECAY, 0.0]
Results = list[dict[str, Any]]
Steps = Sequence[dict[str, Any]]
variant = partial(harness.variant, module="truth")


class Reference(ReferenceAdamS):
    """With `constant`, AdamW with lambda as its decay."""

    constant = False

    def _decay(self, group: dict) -> float:
        return group["weight_decay"] if self.constant else super()._decay(group)


@functools.cache
def reference(
    *,
    adamw: Sequence[int] = (),
    decay_of_adamw: float = truth.WEIGHT_DECAY,
    always: bool = False,
    one_group: bool = False,
    dummy_steps: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """
    The run in float64, noted as by [`truth.Trace`].

    Args:
        adamw (`Sequence[int]`): the steps that AdamW makes, with `decay_of_adamw` where the group decays.
        always (`bool`): `side` never misses a gradient.
        one_group (`bool`): every parameter decays.
        dummy_steps (`int`): steps that Adam has counted before the first (with zero gradients and lr 0).
    """
    model = truth.build(torch.float64)
    param_groups = truth.groups(model, truth.WEIGHT_DECAY, one_group)
    names = {p: name for name, p in model.named_parameters()}
    adams = Reference(param_groups, lr=truth.LR, **options)
    for group in adams.groups:
        for state in group["state"]:
            state["t"] = dummy_steps
    noted = []
    for step in range(truth.STEPS):
        batch = truth.batch_of(step, always)
        model.zero_grad()
        model(batch["x"].double(), batch["y"].double(), batch["side"]).backward()
        adams.constant = step in adamw
        for group in adams.groups:
            group["weight_decay"] = truth.WEIGHT_DECAY if group["weight_decay"] else 0.0
            if adams.constant and group["weight_decay"]:
                group["weight_decay"] = decay_of_adamw
        adams.step([[p.grad for p in group["params"]] for group in param_groups])
        if adams.constant:
            adams.reference_rms = 0.0
        with torch.no_grad():
            for group, new in zip(param_groups, adams.groups, strict=True):
                for p, value in zip(group["params"], new["params"], strict=True):
                    p.copy_(value)
        weights = {names[p]: p.detach().clone() for p in model.parameters()}
        noted.append({"weights": weights, "grad_rms": adams.grad_rms, "decay": adams.groups[0]["decay"]})
    return noted


def distance(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """In units of the distance travelled."""
    start = {name: p.detach().double() for name, p in truth.build().named_parameters()}
    assert set(weights) == set(expected)
    error = sum((weights[name].double() - w.double()).square().sum() for name, w in expected.items())
    travelled = sum((w.double() - start[name]).square().sum() for name, w in expected.items())
    return float((error / travelled).sqrt())


def check_schedule(steps: Steps, expected: Steps, tolerance: float, *, of: str = "") -> None:
    assert len(steps) == len(expected)
    for i, (step, right) in enumerate(zip(steps, expected, strict=True)):
        for key in ("grad_rms", "decay"):
            got = step[key]
            assert math.isclose(got, right[key], rel_tol=tolerance), f"{of} step {i}: {key} {got} / {right[key]}"


def check_steps(steps: Steps, expected: Steps, tolerance: float = 1e-5, *, of: str = "") -> None:
    """Schedule and weights of each step."""
    check_schedule(steps, expected, tolerance, of=of)
    for i, (step, right) in enumerate(zip(steps, expected, strict=True)):
        error = distance(step["weights"], right["weights"])
        assert error < tolerance, f"{of} step {i}: distance {error}"


def check_ranks(values: Sequence[Steps]) -> None:
    """The same bits on every rank (I3)."""
    for steps in values[1:]:
        check_bits(steps, values[0])


def check_bits(steps: Steps, expected: Steps) -> None:
    for i, (step, right) in enumerate(zip(steps, expected, strict=True)):
        for key in ("grad_rms", "decay", "step_count"):
            found = step.get(key), right.get(key)
            assert found[0] == found[1] or math.isclose(*found, rel_tol=1e-14), f"step {i}: {key} {found}"
        for name, weights in right["weights"].items():
            assert torch.equal(step["weights"][name], weights), f"step {i}: {name}"


# Universal checkpoints of DeepSpeed, which calls no load_state_dict for them


@needs_deepspeed
@pytest.mark.parametrize(
    "variant",
    [
        variant("universal-1", "zero_universal", stage=1, slow=True),
        variant("universal-2", "zero_universal", stage=2),
        variant("universal-2-calibrated", "zero_universal", stage=2, reference_steps=4),
        variant("universal-2-calibrated-later", "zero_universal", stage=2, reference_steps=8, slow=True),
    ],
)
def test_universal_checkpoint_in_a_live_engine(results: Results, variant: Variant) -> None:
    expected = reference(always=True, reference_steps=variant.kwargs.get("reference_steps", 0))
    for value in value_of(results):
        check_steps(value["whole"], expected[:9], of="whole")
        check_steps(value["back"], expected[3:6], of="back")
        check_steps(value["same_step"], expected[6:9], of="same_step")
        check_steps(value["fresh"], expected[6:9], of="fresh")
        assert [step["step_count"] for step in value["back"]] == [4, 5, 6]
        assert [step["step_count"] for step in value["same_step"]] == [7, 8, 9]


@needs_deepspeed
@pytest.mark.parametrize(
    "variant",
    [
        variant(
            "universal-bf16-optimizer",
            "zero_universal",
            stage=1,
            config={"dtype": "bf16", "grad_accum_dtype": "fp32"},
        )
    ],
)
def test_universal_checkpoint_of_bf16_optimizer(results: Results) -> None:
    for value in value_of(results):
        for part, first in (("back", 3), ("same_step", 6), ("fresh", 6)):
            check_steps(value[part], value["whole"][first : first + 3], of=part)


@needs_deepspeed
@pytest.mark.parametrize("variant", [variant("universal-3", "zero_universal", stage=3)])
def test_universal_checkpoint_of_stage_3(results: Results) -> None:
    # DeepSpeed (0.19.8) lets all groups share the first one's weight_decay and all partitions one `step`, which then
    # counts each of them: weights go wrong at once, of AdamW as well. The schedule of the first step is right, and it
    # counts steps, not partitions.
    for value in value_of(results):
        for part, first in (("back", 3), ("same_step", 6), ("fresh", 6)):
            check_schedule(value[part][:1], value["whole"][first : first + 1], 1e-6, of=part)
            assert [step["step_count"] for step in value[part]] == [first + 1, first + 2, first + 3]
            assert all(0.2 < step["grad_rms"] < 0.4 for step in value[part])


@needs_deepspeed
@pytest.mark.parametrize(
    "variant",
    [
        variant(f"universal-of-adamw-{stage}-{'live' if live else 'fresh'}", "zero_universal_of_adamw", **kwargs)
        for stage, live, slow in ((2, False, False), (2, True, False), (1, True, True))
        for kwargs in [{"stage": stage, "live": live, "slow": slow}]
    ],
)
def test_universal_checkpoint_of_adamw(results: Results) -> None:
    expected = reference(adamw=range(6), decay_of_adamw=truth.CONSTANT_DECAY, always=True)
    for value in value_of(results):
        check_steps(value, expected[6:])
        assert [step["step_count"] for step in value] == [7, 8, 9, 10, 11, 12]


# torch's ZeroRedundancyOptimizer, which calls no load_state_dict of the optimizer inside


@pytest.mark.parametrize(
    "variant",
    [
        variant(f"redundant-{steps}", "redundant", reference_steps=steps, slow=slow)
        for steps, slow in ((4, False), (0, True))
    ],
)
def test_zero_redundancy_optimizer(results: Results, variant: Variant) -> None:
    expected = reference(always=True, reference_steps=variant.kwargs["reference_steps"])
    for value in value_of(results):
        for part, first in (("back", 3), ("same_step", 6), ("fresh", 6)):
            check_steps(value[part], expected[first : first + 3], of=part)


@pytest.mark.parametrize("variant", [variant("redundant-lambda", "redundant")])
def test_lambda_in_a_checkpoint_of_zero_redundancy_optimizer(results: Results) -> None:
    # It saves groups that it has copied from the optimizer inside.
    for value in value_of(results):
        assert value["lambdas"] == LAMBDAS


# FSDP2 through torch.distributed.checkpoint


@pytest.fixture(scope="module")
def resharded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, list[Results]]]:
    """Runs of which 3 steps each are made by 2, 1, 2 and (as the fourth of so many parts) 4 processes."""
    root = tmp_path_factory.mktemp("resharded")
    kinds = {"plain": {}, "calibrated-5": {"reference_steps": 5}}

    @functools.cache
    def run(parts: int) -> dict[str, list[Results]]:
        before = run(parts - 1) if parts > 1 else {kind: [] for kind in kinds}
        specs = []
        for kind, options in kinds.items():
            folders = {
                "load": str(root / f"{kind}-{parts - 1}") if parts > 1 else "",
                "save": str(root / f"{kind}-{parts}"),
            }
            kwargs = {**folders, "first": 3 * parts - 3, "last": 3 * parts, "options": options if parts == 1 else {}}
            specs.append(Variant(kind, "truth", "fsdp2_part", 0, kwargs).spec())
        found = run_variants(specs, (2, 1, 2, 4)[parts - 1], root / f"run-{parts}")
        return {kind: [*before[kind], found[kind]] for kind in kinds}

    return run


@pytest.mark.parametrize("parts", [3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["plain", "calibrated-5"])
def test_resharded(resharded: Callable[[int], dict[str, list[Results]]], kind: str, parts: int) -> None:
    expected = reference(reference_steps=5 if kind == "calibrated-5" else 0)
    for part, results in enumerate(resharded(parts)[kind]):
        values = value_of(results)
        check_ranks(values)
        check_steps(values[0], expected[3 * part : 3 * part + 3], of=f"part {part}")


@pytest.mark.parametrize("variant", [variant("rolled-back", "torch_rolled_back")])
def test_dcp_into_a_live_optimizer(results: Results) -> None:
    for value in value_of(results):
        check_steps(value["back"], reference()[3:6], of="back")
        check_steps(value["same_step"], reference()[6:9], of="same_step")


@pytest.mark.parametrize(
    "variant",
    [
        variant(f"saved-first-{steps}", "fsdp2_saved_before_the_first_step", options={"reference_steps": steps})
        for steps in (0, 4)
    ],
)
def test_saved_before_the_first_step(results: Results, variant: Variant) -> None:
    # torch's get_state_dict makes a dummy step, which Adam counts.
    expected = reference(dummy_steps=1, **variant.kwargs["options"])
    for value in value_of(results):
        check_steps(value["whole"], expected, of="whole")
        check_steps(value["resumed"], expected, of="resumed")
        check_bits(value["resumed"], value["whole"])


@pytest.mark.parametrize(
    "variant",
    [
        variant("flattened", "fsdp2_flattened"),
        variant("full", "fsdp2_full", broadcast=False),
        variant("full-broadcast", "fsdp2_full", broadcast=True),
    ],
)
def test_options_of_get_state_dict(results: Results) -> None:
    for value in value_of(results):
        check_bits(value["resumed"], value["whole"])


@pytest.mark.parametrize("variant", [variant("state-dict-on-one-rank", "fsdp2_state_dict_on_one_rank")])
def test_state_dict_on_one_rank_is_no_collective(results: Results) -> None:
    for value in value_of(results):
        check_steps(value, reference()[:6])


# FSDP1's own optimizer state dicts


def check_fsdp1(results: Results, *, adamw_is_right: bool) -> None:
    """
    The uninterrupted run; where `adamw_is_right` is `False`, no jump of the decay.

    What torch (2.13) saves of flat parameters is wrong for parameters that are not flat: AdamW is 3e-3 of the distance
    off after one step.
    """
    values = value_of(results)
    check_ranks([value["resumed"] for value in values])
    expected = reference(always=True, one_group=True)[6:]
    check_steps(values[0]["whole"], expected, of="whole")
    if adamw_is_right:
        check_steps(values[0]["resumed"], expected, of="resumed")
    else:
        check_schedule(values[0]["resumed"][:1], expected[:1], 1e-6, of="resumed")
        check_schedule(values[0]["resumed"], expected, 1e-4, of="resumed")


@pytest.mark.parametrize(
    "variant",
    [
        variant(
            f"fsdp1-{name}-{state_type}", "fsdp1_resumed", before=before, after=after, state_type=state_type, slow=slow
        )
        for name, before, after, state_type, slow in (
            ("flat", False, False, "sharded", False),
            ("orig", True, True, "sharded", False),
            ("flat", False, False, "full", True),
            ("orig", True, True, "full", True),
            ("flat-to-orig", False, True, "full", False),
            ("orig-to-flat", True, False, "full", False),
        )
    ],
)
def test_fsdp1(results: Results, variant: Variant) -> None:
    check_fsdp1(results, adamw_is_right="flat-to-orig" not in variant.id)


@pytest.mark.parametrize(
    "variant",
    [
        variant(
            f"fsdp1-{'to' if to_ddp else 'from'}-ddp-{'orig' if orig else 'flat'}",
            "fsdp1_between_ddp",
            use_orig_params=orig,
            to_ddp=to_ddp,
        )
        for to_ddp in (False, True)
        for orig in (False, True)
    ],
)
def test_between_ddp_and_fsdp1(results: Results, variant: Variant) -> None:
    check_fsdp1(results, adamw_is_right=variant.id != "fsdp1-to-ddp-flat")


# AdamS -> AdamW -> AdamS


@pytest.mark.parametrize(
    "variant",
    [
        variant("there-and-back-file", "file_there_and_back"),
        variant("there-and-back-dcp", "dcp_there_and_back"),
        variant("there-and-back-zero2", "zero_there_and_back", stage=2, marks=[needs_deepspeed]),
        variant("there-and-back-zero3", "zero_there_and_back", stage=3, marks=[needs_deepspeed]),
    ],
)
def test_by_way_of_adamw(results: Results, variant: Variant) -> None:
    expected = reference(adamw=range(4, 8), always="zero" in variant.id)
    for value in value_of(results):
        assert all(lambdas == LAMBDAS for lambdas in value["lambdas"]), value["lambdas"]
        assert value["loaded"] == LAMBDAS
        for i, step in enumerate(value["steps"]):
            error = distance(step["weights"], expected[i]["weights"])
            assert error < 1e-5, f"step {i}: distance {error}"
        for part in (slice(0, 4), slice(8, 12)):
            check_steps(value["steps"][part], expected[part])
        if "dcp" in variant.id:
            assert any(key in value["strict"] for key in ("schedule_step", "reference_steps")), value["strict"]


@pytest.mark.parametrize(
    "variant",
    [
        variant("dcp-from-adamw", "dcp_from_adamw"),
        variant("dcp-from-adamw-calibrated", "dcp_from_adamw", reference_steps=8),
    ],
)
def test_partial_load_of_another_adamw(results: Results, variant: Variant) -> None:
    # lambda is AdamS's own, as after load_state_dict of AdamW's.
    steps = variant.kwargs.get("reference_steps", 0)
    expected = reference(adamw=range(6), decay_of_adamw=truth.CONSTANT_DECAY, reference_steps=steps)
    for value in value_of(results):
        check_steps(value, expected[6:])


# Bit for bit


BITS = [
    ("ddp", "torch_resumed", {"engine": "ddp"}, []),
    ("fsdp2", "torch_resumed", {"engine": "fsdp2"}, []),
    ("zero2", "zero_resumed", {"stage": 2}, [needs_deepspeed]),
    ("zero3", "zero_resumed", {"stage": 3}, [needs_deepspeed]),
]


@pytest.mark.parametrize(
    "variant",
    [
        variant(f"bits-{name}-{optim}", function, optim=optim, marks=marks, **kwargs)
        for name, function, kwargs, marks in BITS
        for optim in ("adamw", "adams")
    ]
    + [
        variant(f"bits-{name}-calibrated-{steps}", function, marks=marks, slow=slow, **kwargs, options=options)
        for name, function, kwargs, marks in BITS
        for steps, slow in ((4, False), (9, True))
        for options in [{"reference_steps": steps}]
    ],
)
def test_resume_is_the_uninterrupted_run_bit_for_bit(results: Results) -> None:
    for value in value_of(results):
        check_bits(value["resumed"], value["whole"])
