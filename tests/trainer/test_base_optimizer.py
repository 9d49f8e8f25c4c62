"""optim="adams" with base=...: the schedule on the Trainer's other optimizers, against the decay set by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import transformers
from hf_utils import arguments, sentences, tiny_bert
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_swd import ScheduledWeightDecay, SWDTrainer
from hf_swd.core.wrappers import schedule_of


STEPS, K, WEIGHT_DECAY = 6, 3, 0.5


class Recorder(TrainerCallback):
    """Gradients and learning rate of each step, as the optimizer sees them."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs) -> None:
        self.gradients.append([p.grad.detach().clone() for p in model.parameters()])
        self.rates.append(float(optimizer.param_groups[0]["lr"]))


# By a part of the name of the base.
PACKAGES = {
    "torch_8bit": "torchao",
    "torch_4bit": "torchao",
    "bnb": "bitsandbytes",
    "paged": "bitsandbytes",
    "lion": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
}


def settings(tmp_path: Path, base: str, extra: str = "", **changes) -> TrainingArguments:
    changes = {
        "optim_args": f"base={base},reference_steps={K}{extra}",
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": 0.7,
        "max_steps": STEPS,
        **changes,
    }
    return arguments(tmp_path, **changes)


def train(
    tmp_path: Path,
    base: str,
    extra: str = "",
    trainer_class=Trainer,
    resume: str | None = None,
    dtype: torch.dtype = torch.float32,
    **changes,
):
    if base not in [name.value for name in OptimizerNames]:
        pytest.skip(f"transformers {transformers.__version__} has no {base}")
    for part, package in PACKAGES.items():
        if part in base:
            pytest.importorskip(package)
    recorder = Recorder()
    args = settings(tmp_path, base, extra, **changes)
    trainer = trainer_class(tiny_bert().to(dtype), args, train_dataset=sentences(), callbacks=[recorder])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def scheduled_decays(gradients: list[list[Tensor]], beta2: float) -> list[float]:
    """Effective decay of each step, from the second moments taken literally, in float64."""
    moments = [torch.zeros_like(grad, dtype=torch.float64) for grad in gradients[0]]
    decays, reference = [], math.nan
    for t, grads in enumerate(gradients, start=1):
        for moment, grad in zip(moments, grads, strict=True):
            moment.mul_(beta2).add_(grad.double().square(), alpha=1 - beta2)
        rms = math.sqrt(torch.cat([m.flatten() for m in moments]).mean() / (1 - beta2**t))
        reference = rms if t == K else reference
        decays.append(WEIGHT_DECAY if t <= K else WEIGHT_DECAY * reference / rms)
    return decays


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def by_hand(tmp_path: Path, base: str, recorder: Recorder, decays: list[float], **changes) -> Tensor:
    """The same gradients through transformers' optimizer of that name, with its decay set before each step."""
    args = settings(tmp_path, base, optim=base, **changes)
    args.optim_args = None
    trainer = Trainer(tiny_bert(), args, train_dataset=sentences())
    trainer.model.train()
    optimizer = trainer.create_optimizer()
    if hasattr(optimizer, "train"):
        optimizer.train()
    for grads, rate, decay in zip(recorder.gradients, recorder.rates, decays, strict=True):
        for p, grad in zip(trainer.model.parameters(), grads, strict=True):
            p.grad = grad.clone()
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
            group["weight_decay"] = decay if group["weight_decay"] else 0.0
        optimizer.step()
    return weights(trainer)


BASES = [
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "ademamix",
    "ademamix_8bit",
    "grokadamw",
    "schedule_free_adamw",
]


@pytest.mark.parametrize("base", BASES)
def test_weights_are_those_of_the_base_with_the_decay_set_by_hand(tmp_path, base):
    trainer, recorder = train(tmp_path, base)
    beta2 = trainer.optimizer.param_groups[0]["betas"][1]
    decays = scheduled_decays(recorder.gradients, beta2)
    logged = [entry["swd/weight_decay"] for entry in trainer.state.log_history if "swd/weight_decay" in entry]
    assert logged == pytest.approx(decays, rel=1e-6)
    assert abs(decays[-1] / WEIGHT_DECAY - 1) > 1e-3
    torch.testing.assert_close(weights(trainer), by_hand(tmp_path, base, recorder, decays), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("base", [*BASES, "adafactor"])
def test_weights_in_bfloat16(tmp_path, base, caplog):
    """Of what rounding takes from the decay something is said only where that is known."""
    extra = {"adafactor": ",schedule_beta2=0.999"}.get(base, "")
    extra += ",bf16_stochastic_round=true" if base.startswith("adamw_torch_") and base.endswith("bit") else ""
    trainer, _ = train(tmp_path, base, extra, dtype=torch.bfloat16, learning_rate=2e-5)
    assert schedule_of(trainer.optimizer).step_count == STEPS
    assert ("rounding swallows" in caplog.text) == (base in ("adamw_torch", "adamw_torch_fused"))


# GrokAdamW's own resumed run differs.
@pytest.mark.parametrize("base", [base for base in BASES if base != "grokadamw"])
def test_resume_is_the_uninterrupted_run(tmp_path, base):
    saving = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    whole, _ = train(tmp_path / "whole", base, **saving)
    resumed, _ = train(tmp_path / "resumed", base, resume=str(tmp_path / "whole" / "checkpoint-4"), **saving)
    assert schedule_of(resumed.optimizer).step_count == STEPS
    for key in ("swd/weight_decay", "swd/grad_rms"):
        ours, theirs = ([e[key] for e in t.state.log_history if key in e] for t in (resumed, whole))
        assert ours == theirs
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_swd_trainer_shares_the_norm_with_the_base(tmp_path):
    kwargs = {"base": "adamw_torch_fused", "max_grad_norm": 0.1}
    stock, _ = train(tmp_path, **kwargs)
    ours, recorder = train(tmp_path, trainer_class=SWDTrainer, **kwargs)
    assert torch.equal(weights(stock), weights(ours))
    norms = [entry["grad_norm"] for entry in ours.state.log_history if "grad_norm" in entry]
    assert min(norms) > 0.1  # all were clipped
    logged = [entry["swd/weight_decay"] for entry in ours.state.log_history if "swd/weight_decay" in entry]
    assert logged == pytest.approx(scheduled_decays(recorder.gradients, 0.999), rel=1e-5)


def test_adafactor_is_scheduled_by_a_mean_of_the_rate_that_is_given(tmp_path):
    trainer, recorder = train(tmp_path, "adafactor", ",schedule_beta2=0.9")
    logged = [entry["swd/weight_decay"] for entry in trainer.state.log_history if "swd/weight_decay" in entry]
    assert logged == pytest.approx(scheduled_decays(recorder.gradients, 0.9), rel=1e-6)


def test_keys_of_the_base_arrive(tmp_path):
    pytest.importorskip("bitsandbytes")
    args = settings(tmp_path, "ademamix", ",beta3=0.99,alpha=2")
    optimizer = Trainer(tiny_bert(), args, train_dataset=sentences()).create_optimizer()
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999, 0.99)
    assert optimizer.param_groups[0]["alpha"] == 2.0


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("base=sgd", 'base="sgd": its weight_decay is an L2 penalty'),
        ("base=rmsprop_bnb_8bit", 'base="rmsprop_bnb_8bit": its weight_decay is an L2 penalty'),
        ("base=lomo", 'base="lomo": it changes the weights during the backward pass'),
        ("base=galore_adamw_layerwise", "during the backward pass"),
        ("base=galore_adamw", "transformers gives it no weight decay"),
        ("base=adams", 'base="adams": that is the schedule itself'),
        ("base=adamw_torch_4bits", 'no optimizer of that name; did you mean "adamw_torch_4bit"?'),
        ("base=adamw_torch_4bit,refrence_steps=3", 'unknown key "refrence_steps"; did you mean "reference_steps"?'),
        (
            "base=adamw_torch_4bit,blocksize=64",
            'did you mean "block_size"? optim="adams" with base="adamw_torch_4bit"',
        ),
        ("base=adamw_torch,fused=true", 'unknown key "fused"'),
        ("base=lion_8bit,schedule_beta2=1", 'schedule_beta2="1"; expected a decay rate in'),
        ("schedule_beta2=0.9", 'unknown key "schedule_beta2"'),
    ],
)
def test_what_cannot_be_trained_is_refused_when_arguments_are_made(tmp_path, optim_args, message):
    with pytest.raises(ValueError) as caught:
        arguments(tmp_path, optim_args=optim_args)
    assert message in str(caught.value)


def test_base_without_betas_is_refused_with_the_remedy(tmp_path):
    trainer = Trainer(tiny_bert(), settings(tmp_path, "adafactor"), train_dataset=sentences())
    with pytest.raises(ValueError, match='"schedule_beta2=0.999"'):
        trainer.create_optimizer()


class _Other(torch.optim.SGD):
    """An optimizer of another package, by the flag that says what its decay is."""

    __module__ = "elsewhere"

    def __init__(self, attributes: dict | None = None, options: dict | None = None) -> None:
        super().__init__([{"params": [torch.nn.Parameter(torch.ones(2))], **(options or {})}], lr=0.1)
        self.__dict__.update(attributes or {})


@pytest.mark.parametrize(
    ("attributes", "options", "message"),
    [
        ({"is_adamw": False}, {}, "L2 penalty"),  # torchao's Adam8bit
        ({"adam_w_mode": 0}, {}, "L2 penalty"),  # Apex' and DeepSpeed's FusedAdam
        ({"optimizer_name": "rmsprop"}, {}, "L2 penalty"),  # bitsandbytes
        ({}, {"weight_decouple": False}, "L2 penalty"),  # pytorch_optimizer
        ({}, {"decouple_wd": False}, "L2 penalty"),  # optimi
        ({}, {"decouple_lr": True}, "use decouple_lr=False"),
        ({}, {"lr": None}, "relative_step=False"),  # transformers' Adafactor
        ({"optim_dict": {}}, {}, "CPUOffloadOptimizer"),
    ],
)
def test_flags_of_other_packages_are_looked_at(attributes, options, message):
    with pytest.raises(ValueError, match=message):
        ScheduledWeightDecay(_Other(attributes, options), beta2=0.9)
    ScheduledWeightDecay(_Other({"is_adamw": True, "adam_w_mode": 1}, {"weight_decouple": True}), beta2=0.9)


def test_real_optimizers_with_coupled_decay_are_refused():
    params = [torch.nn.Parameter(torch.ones(2))]
    torchao = pytest.importorskip("torchao.optim")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for optimizer in (torchao.Adam8bit(params), bitsandbytes.optim.RMSprop8bit(params)):
        with pytest.raises(ValueError, match="L2 penalty"):
            ScheduledWeightDecay(optimizer, beta2=0.9)


@pytest.mark.parametrize("base", ["adamw_torch", "adamw_bnb_8bit", "schedule_free_adamw"])
def test_checkpoint_of_the_base_alone_leaves_the_decay_that_was_asked_for(tmp_path, base, caplog):
    """bitsandbytes loads without torch's hooks."""
    saving = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    train(tmp_path, base, optim=base, optim_args=None, weight_decay=0.01, max_steps=3, **saving)
    trainer, _ = train(tmp_path, base, resume=str(tmp_path / "checkpoint-3"), **saving)
    assert {group["initial_weight_decay"] for group in trainer.optimizer.param_groups} == {WEIGHT_DECAY, 0.0}
    assert "in every parameter group" not in caplog.text
    optimizer = trainer.optimizer.optimizer
    schedule_of(optimizer).remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not any("schedule_step" in group for group in optimizer.param_groups)


@pytest.mark.parametrize("base", ["adamw_torch", "adamw_bnb_8bit"])
def test_optimizer_of_a_trainer_can_be_saved_whole(tmp_path, base):
    """Without its schedule, as any copy."""
    trainer, _ = train(tmp_path, base)
    optimizer = trainer.optimizer.optimizer
    torch.save(optimizer, tmp_path / "optimizer.pt")
    for copied in (torch.load(tmp_path / "optimizer.pt", weights_only=False), copy.deepcopy(optimizer)):
        assert type(copied).__name__ == type(optimizer).__name__ and schedule_of(copied) is None
        assert len(copied.state) == len(optimizer.state)
