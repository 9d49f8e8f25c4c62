"""What must stop before a weight changes, with real engines: see `refused.py`. Where it could be right, that it is."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import harness
import pytest
import torch
from harness import value_of
from judge import check_refusal


pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]

Results = list[dict[str, Any]]
variant = partial(harness.variant, module="refused")


@pytest.mark.parametrize(
    "variant",
    [
        variant(f"pipeline-{stage}-{attach}{'-group' if group else ''}", "refused_pipeline", **kwargs)
        for stage, attach, group in (
            (0, "no", False),
            (0, "optimizer", False),
            (0, "both", False),
            (1, "optimizer", False),
            (1, "both", False),
            (1, "both", True),
        )
        for kwargs in [{"stage": stage, "attach": attach, "process_group": group}]
    ],
)
def test_pipeline(results: Results) -> None:
    check_refusal(results, "PipelineModule", "process_group=module.mpu().get_pipe_parallel_group()")


@pytest.mark.parametrize(
    "variant",
    [variant(f"pipeline-right-{attach}", "pipeline_of_stage_0", attach=attach) for attach in ("no", "both")],
)
def test_pipeline_of_stage_0_with_the_group_that_the_message_names_is_one_process(results: Results) -> None:
    assert max(value_of(results)) < 1e-5


@pytest.mark.parametrize(
    "variant",
    [
        variant(f"mpu-{stage}-{dtype}-{attach}", "refused_mpu", stage=stage, dtype=dtype, attach=attach)
        for stage, dtype, attach in (
            (0, "fp32", "no"),
            (0, "fp32", "both"),
            (0, "bf16", "no"),
            (0, "bf16", "both"),
            (2, "fp32", "optimizer"),
            (3, "fp32", "optimizer"),
            (3, "fp32", "both"),
        )
    ],
)
def test_mpu(results: Results) -> None:
    check_refusal(results, "tensor parallelism by an mpu", "DistributedConfig")


@pytest.mark.parametrize("variant", [variant("inside-forward", "in_the_forward_of_an_engine")])
def test_an_optimizer_that_an_engine_does_not_wrap_is_none_of_its_business(results: Results) -> None:
    assert value_of(results) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    "variant",
    [variant(f"other-parameters-{engine}", "refused_parameters", engine=engine) for engine in ("fsdp1", "fsdp2")],
)
def test_optimizer_that_was_built_before_the_model_was_sharded(results: Results) -> None:
    check_refusal(results, "none of the model's trainable parameters", "fully_shard")


@pytest.mark.parametrize(
    "variant",
    [
        variant("configured-adamw", "configured_optimizer", name="AdamW", by="arguments"),
        variant("configured-adams", "configured_optimizer", name="AdamS", by="arguments"),
        variant("configured-adams-alone", "configured_optimizer", name="AdamS", by="arguments", optim="adamw_torch"),
        variant("configured-SWDTrainer", "configured_optimizer", name="AdamW", by="accelerate", trainer="SWDTrainer"),
        variant("configured-accelerate", "configured_optimizer", name="AdamW", by="accelerate"),
        *(
            variant(f"configured-class-{by}", "configured_optimizer", name="AdamW", by=by, **given)
            for by in ("arguments", "accelerate")
            for given in [{"optim": "adamw_torch", "give_class": True}]
        ),
    ],
)
def test_optimizer_in_the_configuration_of_deepspeed(results: Results) -> None:
    for message in value_of(results):
        assert 'delete "optimizer" from the configuration' in message and 'set optim="adams"' in message


@pytest.mark.parametrize(
    "variant", [variant(f"clipping-{stage}", "clipping_that_is_left_out", stage=stage) for stage in (0, 2)]
)
def test_warning_of_clipping_names_the_norm_to_which_deepspeed_clips(results: Results) -> None:
    first, *others = value_of(results)
    assert first["clips"] == 1.0 != first["asked"]
    assert first["named"].startswith("gradient_clipping=1 of DeepSpeed, whose configuration leaves it out")
    assert f'with "gradient_clipping": "auto" it would be max_grad_norm={first["asked"]:g}' in first["named"]
    assert not any(other["messages"] for other in others)


@pytest.mark.parametrize("variant", [variant("zero-checkpoint-under-ddp", "zero_checkpoint_under_ddp")])
def test_checkpoint_of_zero_under_ddp_says_where_the_schedule_begins(results: Results) -> None:
    first, *others = value_of(results)
    assert sum("goes on at step 2, but its checkpoint has no state for this optimizer" in m for m in first) == 1
    assert not any(others)
