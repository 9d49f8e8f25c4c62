"""The Trainer with `optim="adams"` under every engine: weights, logs and resumed runs of the reference."""

from __future__ import annotations

import pytest
import task
from harness import value_of, variant
from test_accelerate import same_on_all_ranks

from hf_swd.trainer.optim_args import parse_optim_args


pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def trained(engine: str, id: str = "", **options):
    return variant(id or engine, "run", module="engines_trainer", engine=engine, **options)


def swd(engine: str, **options):
    return trained(engine, f"{engine}-SWDTrainer", trainer="SWDTrainer", **options)


def resumed(engine: str, **options):
    return trained(engine, f"{engine}-resumed", resume_at=6, **options)


def unclipped(engine: str, trainer: str, id: str = "", **options):
    options = {"optim_args": "unclipped_norm=true", **options}
    return trained(engine, f"{id or engine}-{trainer}-unclipped-norm", trainer=trainer, **options)


def calibrated(engine: str, reference_steps: int, **options):
    """Resumed at step 6, after or before step K."""
    options = {"resume_at": 6, "optim_args": f"reference_steps={reference_steps}", **options}
    return trained(engine, f"{engine}-resumed-reference-steps-{reference_steps}", **options)


@pytest.mark.parametrize(
    "variant",
    [
        trained("ddp"),
        trained("fsdp1"),
        trained("fsdp2"),
        trained("zero0"),
        trained("zero1"),
        trained("zero2"),
        trained("zero3"),
        trained("zero2_offload", slow=True),
        trained("zero3_offload"),
        swd("ddp"),
        swd("fsdp1", slow=True),
        swd("fsdp2"),
        swd("zero2"),
        swd("zero3", slow=True),
        swd("zero1", slow=True),
        swd("zero3_offload", slow=True),
        trained("ddp", "ddp-accumulation", micros=2),
        trained("zero2", "zero2-accumulation", micros=2),
        trained("zero2", "zero2-config-file", config_file="deepspeed_zero2.json", slow=True),
        trained("zero3", "zero3-config-file", config_file="deepspeed_zero3.json"),
        trained("zero3_offload", "zero3_offload-config-file", config_file="deepspeed_zero3_offload.json", slow=True),
        trained("fsdp1", "fsdp1-flat", use_orig_params=False, slow=True),
        resumed("ddp"),
        resumed("fsdp2"),
        resumed("zero2"),
        resumed("zero3"),
        resumed("zero3_offload", slow=True),
        calibrated("ddp", 4, slow=True),
        calibrated("ddp", 8, slow=True),
        calibrated("fsdp2", 4),
        calibrated("fsdp2", 8, slow=True),
        calibrated("zero2", 4, slow=True),
        calibrated("zero2", 8),
        calibrated("zero3_offload", 4, slow=True),
        unclipped("ddp", "SWDTrainer"),
        unclipped("fsdp1", "SWDTrainer", slow=True),
        unclipped("fsdp1", "SWDTrainer", "fsdp1-flat", use_orig_params=False, slow=True),
        unclipped("fsdp2", "SWDTrainer"),
        unclipped("fsdp2", "SWDTrainer", "fsdp2-resumed", resume_at=6),
        unclipped("zero2", "Trainer"),
        unclipped("zero3", "SWDTrainer", "zero3-resumed", resume_at=6, slow=True),
        unclipped("zero3_offload", "Trainer", slow=True),
        trained("fsdp1", "fsdp1-of-4", world=4, slow=True),
        trained("fsdp2", "fsdp2-of-4", world=4, slow=True),
        trained("zero3", "zero3-of-4", world=4, slow=True),
    ],
)
def test_trainer_repeats_the_reference(variant, results):
    answers = value_of(results)
    weights = same_on_all_ranks([answer["weights"] for answer in answers])
    # Flat parameters mix biases and matrices: the Trainer decays all of them.
    options = parse_optim_args(variant.kwargs.get("optim_args"))
    reference = task.reference(one_group=variant.kwargs.get("use_orig_params") is False, **options)
    distance = task.distance(weights, reference.weights)
    print(f"distance {distance:.2g}")
    assert distance < 1e-4

    logs = answers[0]["logs"]
    assert [entry["step"] for entry in logs] == list(range(1, task.STEPS + 1))
    for entry, decay in zip(logs, reference.decays, strict=True):
        assert entry["swd/weight_decay"] == pytest.approx(decay, rel=1e-4)
        if not options.get("reference_steps"):
            assert entry["swd/grad_rms"] == pytest.approx(task.WEIGHT_DECAY / decay, rel=1e-4)
