"""A Trainer that resumes is the uninterrupted run to the last bit: weights, and everything in its log."""

from __future__ import annotations

import pytest
import torch
from hf_utils import arguments, sentences, tiny_bert
from transformers import Trainer

from hf_swd import SWDTrainer


TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


def with_two_adapters() -> torch.nn.Module:
    """Two LoRA adapters, of which one is trained."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_bert(), config, "first")
    model.add_adapter("second", config)
    model.set_adapter("second")
    return model


def whole_and_resumed(tmp_path, trainer_class, build, **changes) -> tuple[Trainer, Trainer]:
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12, "logging_steps": 2, **changes}
    trainers = []
    for checkpoint in (None, tmp_path / "whole" / "checkpoint-8"):
        output_dir = tmp_path / ("resumed" if checkpoint else "whole")
        torch.manual_seed(3)
        trainer = trainer_class(build(), arguments(output_dir, **settings), train_dataset=sentences(96))
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        trainers.append(trainer)
    return trainers[0], trainers[1]


@pytest.mark.parametrize("optim", ["adams", "adamw_torch_fused"])
@pytest.mark.parametrize("build", [tiny_bert, with_two_adapters], ids=["bert", "two_adapters"])
@pytest.mark.parametrize("trainer_class", [Trainer, SWDTrainer])
def test_weights_and_logs_are_those_of_the_whole_run(tmp_path, trainer_class, build, optim):
    optim_args = "reference_steps=3" if optim == "adams" else None
    whole, resumed = whole_and_resumed(tmp_path, trainer_class, build, optim=optim, optim_args=optim_args)

    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    logs = [
        [{key: value for key, value in log.items() if key not in TIMES} for log in trainer.state.log_history]
        for trainer in (whole, resumed)
    ]
    assert logs[0][:-1] == logs[1][:-1]  # the last is of the training as a whole, and of the time it took
    assert len(logs[0]) == 7
    assert all(("swd/grad_rms" in log) == (optim == "adams") for log in logs[0][:-1])
    state, other = (trainer.optimizer.state_dict() for trainer in (whole, resumed))
    assert state["param_groups"] == other["param_groups"]
    torch.testing.assert_close(other["state"], state["state"], rtol=0, atol=0)
