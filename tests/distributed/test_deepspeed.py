"""DeepSpeed ZeRO 0 to 3, offload: the weights of the single-process float64 reference, and what must stop."""

from __future__ import annotations

import ctypes.util
import importlib.util
from functools import partial
from typing import Any

import harness
import pytest
import torch
from harness import Variant, value_of
from judge import check_as_good_as_adamw, check_collectives, check_refusal, check_run
from task import STEPS, reference


pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]

Results = list[dict[str, Any]]
variant = partial(harness.variant, module="engines_deepspeed")

ZERO_12, ZERO_3, BF16 = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer"


@pytest.mark.parametrize(
    "variant",
    [
        variant("zero0", "zero", stage=0),
        variant("zero1", "zero", stage=1, expect=ZERO_12),
        variant("zero2", "zero", stage=2, expect=ZERO_12),
        variant("zero3", "zero", stage=3, expect=ZERO_3),
        variant("zero3-sub-groups", "zero", stage=3, expect=ZERO_3, sub_group=3000, slow=True),
        variant("zero1-three-groups", "zero", stage=1, expect=ZERO_12, adam_options={"split": True}, slow=True),
        variant("zero2-three-groups", "zero", stage=2, expect=ZERO_12, adam_options={"split": True}),
        variant("zero3-three-groups", "zero", stage=3, expect=ZERO_3, sub_group=3000, adam_options={"split": True}),
        variant("zero2-accumulation", "zero", stage=2, expect=ZERO_12, micros=2),
        variant("zero3-accumulation", "zero", stage=3, expect=ZERO_3, micros=2, slow=True),
        variant("zero2-config-file", "zero", stage=2, expect=ZERO_12, config_file=True),
        variant("zero2-scheduled-adamw", "zero", stage=2, expect=ZERO_12, optim="scheduled", slow=True),
        variant("zero1-4", "zero", world=4, stage=1, expect=ZERO_12, slow=True),
        variant("zero2-4", "zero", world=4, stage=2, expect=ZERO_12, slow=True),
        variant("zero3-4", "zero", world=4, stage=3, expect=ZERO_3, slow=True),
    ],
)
def test_zero(results: Results) -> None:
    check_run(results, reference())
    check_collectives(results, 0)


@pytest.mark.parametrize(
    "variant",
    [
        variant("zero1-no-clip", "zero", stage=1, clip=False, slow=True),
        variant("zero2-no-clip", "zero", stage=2, clip=False),
        variant("zero3-no-clip", "zero", stage=3, clip=False, slow=True),
    ],
)
def test_without_clipping(results: Results) -> None:
    check_run(results, reference(clip=False))


def each_stage(name: str, **adam_options):
    options = {"adam_options": adam_options}
    return [
        variant(f"zero1-{name}", "zero", stage=1, **options, slow=True),
        variant(f"zero2-{name}", "zero", stage=2, **options),
        variant(f"zero3-{name}", "zero", stage=3, **options, slow=True),
        variant(f"zero3-offload-{name}", "zero", stage=3, optim="cpu_adams", offload="cpu", **options),
    ]


@pytest.mark.parametrize("variant", each_stage("reference-steps", reference_steps=4))
def test_reference_steps(results: Results) -> None:
    check_run(results, reference(reference_steps=4))


@pytest.mark.parametrize("variant", each_stage("unclipped-norm", unclipped_norm=True))
def test_schedule_by_the_norm_before_clipping(results: Results) -> None:
    check_run(results, reference(unclipped_norm=True))


@pytest.mark.parametrize(
    "variant",
    [
        variant("zero2-offload", "zero", stage=2, optim="cpu_adams", offload="cpu"),
        variant("zero3-offload", "zero", stage=3, optim="cpu_adams", offload="cpu"),
        variant(
            "zero2-offload-three-groups",
            "zero",
            stage=2,
            optim="cpu_adams",
            offload="cpu",
            adam_options={"split": True},
            slow=True,
        ),
        variant("zero1-offload", "zero", stage=1, optim="cpu_adams", offload="cpu", slow=True),
        variant("zero3-offload-sub-groups", "zero", stage=3, optim="cpu_adams", offload="cpu", sub_group=3000),
        variant("zero2-offload-adams", "zero", stage=2, offload="cpu", force_cpu_adam=False),
        variant("zero3-offload-adams", "zero", stage=3, offload="cpu", force_cpu_adam=False, slow=True),
        variant(
            "zero3-offload-all",
            "zero",
            stage=3,
            optim="cpu_adams",
            offload="cpu",
            offload_param={"device": "cpu"},
            slow=True,
        ),
        variant("zero3-offload-4", "zero", world=4, stage=3, optim="cpu_adams", offload="cpu", slow=True),
    ],
)
def test_offload(results: Results, variant: Variant) -> None:
    check_run(results, reference())
    expected = "DeepSpeedCPUAdam" if variant.kwargs.get("optim") == "cpu_adams" else "AdamS"
    assert {value["optimizer"] for value in value_of(results)} == {expected}


@pytest.mark.parametrize(
    "variant",
    [
        variant(
            "zero3-nvme",
            "zero",
            stage=3,
            optim="cpu_adams",
            offload="nvme",
            slow=True,
            marks=[
                pytest.mark.skipif(ctypes.util.find_library("aio") is None, reason="needs libaio (Debian: libaio-dev)")
            ],
        )
    ],
)
def test_offload_to_nvme(results: Results) -> None:
    check_run(results, reference())


@pytest.mark.parametrize(
    "variant",
    [
        # Stage 0 keeps no full-precision weights, and begins with a step of zeros at full lr.
        variant("zero0-bf16", "both", stage=0, dtype="bf16", slow=True),
        variant("zero1-bf16", "both", stage=1, dtype="bf16", expect=ZERO_12, slow=True),
        variant("zero2-bf16", "both", stage=2, dtype="bf16", expect=ZERO_12),
        variant("zero3-bf16", "both", stage=3, dtype="bf16", expect=ZERO_3),
        variant("zero1-bf16-fp32-accumulation", "both", stage=1, dtype="bf16", grad_accum_dtype="fp32", expect=BF16),
        variant("zero2-bf16-offload", "both", stage=2, dtype="bf16", offload="cpu", cpu_adam=True, slow=True),
        variant("zero3-bf16-offload", "both", stage=3, dtype="bf16", offload="cpu", cpu_adam=True, slow=True),
    ],
)
def test_low_precision_is_as_good_as_adamw(results: Results) -> None:
    _check_both(results)


@pytest.mark.parametrize(
    "variant",
    [
        variant("zero1-fp16", "zero_fp16", stage=1, slow=True),
        variant("zero2-fp16", "zero_fp16", stage=2),
        variant("zero3-fp16", "zero_fp16", stage=3, slow=True),
    ],
)
def test_fp16_with_skipped_steps_is_as_good_as_adamw(results: Results) -> None:
    for value in value_of(results):
        adams = value["adams"]
        assert adams["skipped"] >= 2
        assert adams["unchanged"], "a skipped step has changed a weight"
        assert adams["step_count_after_skip"] == 0
        assert adams["step_count"] == STEPS
    _check_both(results)


def _check_both(results: Results) -> None:
    values = value_of(results)
    adams, adamw = ([{"value": value[optim]} for value in values] for optim in ("adams", "adamw"))
    check_as_good_as_adamw(adams, reference(), adamw, reference(optim="adamw"))


@pytest.mark.parametrize(
    "variant",
    [
        variant("zero1-unattached", "refused", stage=1, attach=False, slow=True),
        variant("zero2-unattached", "refused", stage=2, attach=False),
        variant("zero3-unattached", "refused", stage=3, attach=False),
        variant("bf16-unattached", "refused", stage=1, attach=False, dtype="bf16", grad_accum_dtype="fp32"),
        variant(
            "zero2-offload-adams-unattached",
            "refused",
            stage=2,
            attach=False,
            offload="cpu",
            force_cpu_adam=False,
            slow=True,
        ),
        variant("zero2-offload-unattached", "refused", stage=2, attach=False, optim="cpu_adams", offload="cpu"),
        variant("zero3-offload-unattached", "refused", stage=3, attach=False, optim="cpu_adams", offload="cpu"),
    ],
)
def test_without_attach_it_stops_before_a_weight_changes(results: Results) -> None:
    check_refusal(results, "hf_swd.attach(optimizer")


REFUSED = {
    "no-norm-2": "compute_grad_norm",
    "no-norm-1": "compute_grad_norm",
    "betas": "different betas",
    "amsgrad": "amsgrad=False",
    "ratio": "offload_optimizer.ratio",
    "zenflow": "zenflow",
    "zenflow-3": "zenflow",
    "super-offload": "super_offload",
    "experts": "expert-parallel",
    "experts-0": "ep_size",
    "experts-0-unattached": "ep_size",
    "zero0-fp16": "stage 0",
    "own-clipping": "gradient_clipping",
    "old-version": "pip install 'deepspeed>=",
}


@pytest.mark.parametrize(
    "variant",
    [
        variant("no-norm-2", "refused", stage=2, clip=False, compute_grad_norm=False),
        variant("no-norm-1", "refused", stage=1, clip=False, compute_grad_norm=False),
        variant("betas", "refused", stage=2, different_betas=True),
        variant("amsgrad", "refused", stage=3, amsgrad=True),
        variant("ratio", "refused", stage=3, optim="cpu_adams", offload="cpu", offload_optimizer={"ratio": 0.5}),
        variant(
            "zenflow",
            "refused",
            stage=2,
            optim="cpu_adams",
            offload="cpu",
            zenflow={"topk_ratio": 0.1, "update_interval": 2},
        ),
        variant("zenflow-3", "refused", stage=3, zenflow={"topk_ratio": 0.1, "update_interval": 2}, slow=True),
        variant(
            "super-offload",
            "refused",
            stage=3,
            optim="cpu_adams",
            offload="cpu",
            offload_optimizer={"super_offload": True, "pin_memory": False},
        ),
        variant("experts", "refused_experts", stage=2),
        variant("experts-0", "refused_experts", stage=0),
        variant("experts-0-unattached", "refused_experts", stage=0, attach=False),
        variant("zero0-fp16", "refused", stage=0, dtype="fp16"),
        variant("own-clipping", "refused", stage=2, own_clipping=True),
        variant("old-version", "refused", stage=2, reported_version="0.19.7"),
    ],
)
def test_what_cannot_be_right_stops_before_a_weight_changes(results: Results, variant: Variant) -> None:
    check_refusal(results, REFUSED[variant.id])


@pytest.mark.parametrize(
    "variant",
    [
        variant(f"autotp-{stage}{'' if attach else '-unattached'}", "refused", autotp=2, kind="llama", **kwargs)
        for stage, attach, slow in ((0, True, True), (0, False, False), (2, True, False), (3, True, True))
        for kwargs in [{"stage": stage, "attach": attach, "slow": slow}]
    ],
)
def test_autotp_stops_before_a_weight_changes(results: Results) -> None:
    # The last test here: DeepSpeed goes on with its tensor-parallel groups in all engines of the processes.
    check_refusal(results, "AutoTP")
