"""DDP, FSDP1, FSDP2, tensor parallelism, process groups: the weights of the single-process float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Variant, value_of, variant
from judge import check_as_good_as_adamw, check_collectives, check_refusal, check_run
from task import MAX_NORM, reference


pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

Results = list[dict[str, Any]]
IN_THE_STEP = {"clip": "none", "adam_options": {"max_grad_norm": MAX_NORM}}


@pytest.mark.parametrize(
    "variant",
    [
        variant("ddp", "ddp"),
        variant("ddp-shared-clip", "ddp", clip="shared"),
        variant("ddp-accumulation", "ddp", micros=2),
        variant("ddp-scheduled-adamw", "ddp", optim="scheduled"),
        variant("ddp-4", "ddp", world=4),
        variant("ddp-4-accumulation", "ddp", world=4, micros=2, slow=True),
    ],
)
def test_ddp(results: Results) -> None:
    check_run(results, reference())
    check_collectives(results, 0)


@pytest.mark.parametrize(
    "variant",
    [
        variant("ddp-unused", "ddp", unused=True, find_unused_parameters=True),
        variant("ddp-unused-shared-clip", "ddp", unused=True, find_unused_parameters=True, clip="shared"),
    ],
)
def test_ddp_with_parameters_that_no_loss_depends_on(results: Results) -> None:
    check_run(results, reference(unused=True))


@pytest.mark.parametrize("variant", [variant("ddp-no-clip", "ddp", clip="none")])
def test_without_clipping(results: Results) -> None:
    check_run(results, reference(clip=False))


@pytest.mark.parametrize(
    "variant",
    [
        variant("fsdp1-full-shard", "fsdp1"),
        variant("fsdp1-shard-grad-op", "fsdp1", strategy="SHARD_GRAD_OP"),
        variant("fsdp1-no-shard", "fsdp1", strategy="NO_SHARD"),
        variant("fsdp1-not-wrapped", "fsdp1", wrap=False, slow=True),
        variant("fsdp1-ignored", "fsdp1", ignore=True),
        variant("fsdp1-shared-clip", "fsdp1", clip="shared", slow=True),
        variant("fsdp1-ignored-shared-clip", "fsdp1", ignore=True, clip="shared"),
        variant("fsdp1-scheduled-adamw", "fsdp1", optim="scheduled", slow=True),
        variant("fsdp1-hybrid-shard", "fsdp1", world=4, strategy="HYBRID_SHARD"),
        variant("fsdp1-hybrid-shard-zero2", "fsdp1", world=4, strategy="_HYBRID_SHARD_ZERO2", slow=True),
        variant("fsdp1-full-shard-4", "fsdp1", world=4, slow=True),
    ],
)
def test_fsdp1(results: Results) -> None:
    check_run(results, reference())


@pytest.mark.parametrize(
    "variant",
    [
        variant("fsdp1-flat-full-shard", "fsdp1", use_orig_params=False),
        variant("fsdp1-flat-shard-grad-op", "fsdp1", use_orig_params=False, strategy="SHARD_GRAD_OP", slow=True),
        variant("fsdp1-flat-no-shard", "fsdp1", use_orig_params=False, strategy="NO_SHARD"),
        variant("fsdp1-flat-ignored", "fsdp1", use_orig_params=False, ignore=True),
        variant("fsdp1-flat-hybrid-shard", "fsdp1", world=4, use_orig_params=False, strategy="HYBRID_SHARD"),
    ],
)
def test_fsdp1_with_flat_parameters(results: Results) -> None:
    check_run(results, reference(one_group=True))


@pytest.mark.parametrize(
    "variant",
    [
        variant("fsdp1-unattached", "fsdp1_refused"),
        variant("fsdp1-unattached-flat", "fsdp1_refused", use_orig_params=False),
        variant("fsdp1-unattached-grad-op", "fsdp1_refused", strategy="SHARD_GRAD_OP", slow=True),
    ],
)
def test_fsdp1_without_attach_stops_before_a_weight_changes(results: Results) -> None:
    check_refusal(results, "FSDP", "hf_swd.attach(optimizer, model)")


@pytest.mark.parametrize(
    "variant",
    [
        variant("fsdp2", "fsdp2"),
        variant("fsdp2-torch-clip", "fsdp2", clip="torch"),
        variant("fsdp2-shared-clip", "fsdp2", clip="shared"),
        variant("fsdp2-clips-in-the-step", "fsdp2", **IN_THE_STEP),
        variant("fsdp2-clips-in-the-step-adamw", "fsdp2", optim="scheduled", **IN_THE_STEP),
        variant("fsdp2-scheduled-adamw", "fsdp2", optim="scheduled", slow=True),
        variant("fsdp2-cpu-offload", "fsdp2", offload=True),
        variant("fsdp2-unsharded", "fsdp2", unsharded=["classifier", "bert.embeddings"], slow=True),
        variant("fsdp2-unsharded-shared-clip", "fsdp2", unsharded=["classifier", "bert.embeddings"], clip="shared"),
        variant("hsdp-2x1", "fsdp2", mesh=[2, 1]),
        variant("hsdp-2x2", "fsdp2", world=4, mesh=[2, 2]),
        variant("hsdp-2x2-shared-clip", "fsdp2", world=4, mesh=[2, 2], clip="shared"),
        variant("fsdp2-4", "fsdp2", world=4, slow=True),
    ],
)
def test_fsdp2(results: Results, variant: Variant) -> None:
    check_run(results, reference())
    sharded = variant.kwargs.get("mesh") != [2, 1]
    check_collectives(results, int(sharded))


@pytest.mark.parametrize(
    "variant",
    [
        variant("tp", "tensor_parallel"),
        variant("tp-shared-clip", "tensor_parallel", clip="shared"),
        variant("tp-clips-in-the-step", "tensor_parallel", **IN_THE_STEP),
        variant("fsdp2-x-tp", "tensor_parallel", world=4, data=2),
        variant("fsdp2-x-tp-shared-clip", "tensor_parallel", world=4, data=2, clip="shared"),
    ],
)
def test_tensor_parallel(results: Results, variant: Variant) -> None:
    check_run(results, reference())
    check_collectives(results, 2 if variant.world == 4 else 1)


@pytest.mark.parametrize(
    "variant",
    [
        variant("zero-redundancy", "zero_redundancy"),
        variant("zero-redundancy-buckets", "zero_redundancy", parameters_as_bucket_view=True, slow=True),
        variant("pipeline", "pipeline_stages"),
        variant("pipeline-shared-clip", "pipeline_stages", clip="shared"),
        variant("pipeline-4", "pipeline_stages", world=4, slow=True),
    ],
)
def test_disjoint_parts_of_a_model(results: Results) -> None:
    check_run(results, reference())


@pytest.mark.parametrize(
    "variant",
    [variant("fsdp2-mixed", "mixed_fsdp2"), variant("hsdp-mixed", "mixed_fsdp2", world=4, mesh=[2, 2], slow=True)],
)
def test_mixed_precision_is_as_good_as_adamw(results: Results) -> None:
    values = value_of(results)
    adams, adamw = ([{"value": value[optim]} for value in values] for optim in ("adams", "adamw"))
    check_as_good_as_adamw(adams, reference(), adamw, reference(optim="adamw"))


@pytest.mark.parametrize(
    "variant",
    [
        variant(f"{engine}-reference-steps", engine, adam_options={"reference_steps": 4})
        for engine in ("ddp", "fsdp1", "fsdp2", "tensor_parallel")
    ],
)
def test_reference_steps(results: Results) -> None:
    check_run(results, reference(reference_steps=4))


def unclipped(engine: str, id: str = "", **options):
    options = {"clip": "none", "adam_options": {"unclipped_norm": True, "max_grad_norm": MAX_NORM}, **options}
    return variant(f"{id or engine}-unclipped-norm", engine, **options)


@pytest.mark.parametrize(
    "variant",
    [
        unclipped("ddp"),
        unclipped("fsdp1"),
        unclipped("fsdp2"),
        unclipped("fsdp2", "scheduled-adamw", optim="scheduled"),
        unclipped("tensor_parallel"),
        unclipped("tensor_parallel", "fsdp2-x-tp", world=4, data=2, slow=True),
    ],
)
def test_schedule_by_the_norm_before_clipping(results: Results) -> None:
    check_run(results, reference(unclipped_norm=True))


@pytest.mark.parametrize(
    "variant", [variant(f"left-alone-in-{call}", "left_alone", call=call) for call in ("step", "clip")]
)
def test_a_rank_that_is_left_alone_is_told_of_what(results: Results) -> None:
    *messages, _ = value_of(results)
    for message in messages:
        assert "imed out" in message, "what the backend says"
        assert "clip_grad_norm_() of AdamS" in message and "every rank" in message


@pytest.mark.parametrize(
    "variant",
    [
        variant(
            f"gradient-placements{'-clipped' if clip else ''}-{kernel}", "gradient_placements", clip=clip, **options
        )
        for kernel, options in (("default", {}), ("foreach", {"foreach": True}))
        for clip in (False, True)
    ],
)
def test_gradients_that_are_not_divided_as_their_parameter(results: Results) -> None:
    for errors in value_of(results):
        assert set(errors) == {"replicate", "partial"}
        assert max(errors.values()) < 1e-6
