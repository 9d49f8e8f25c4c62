"""Scheduled weight decay in the stock Trainer and in SWDTrainer: logs, warnings, clipping, checkpoints."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hf_utils import arguments, distance, flat, sentences, tiny_bert, train
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainerState

import hf_swd
from hf_swd import AdamS, ScheduledWeightDecay, SWDCallback, SWDTrainer, create_adams
from hf_swd.trainer.watch import _Watch


DECAY, RMS = "swd/weight_decay", "swd/grad_rms"
both_trainers = pytest.mark.parametrize("trainer_class", [Trainer, SWDTrainer])


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return flat(trainer.model)


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "hf_swd.trainer"]


# Logs


@both_trainers
def test_every_training_log_reports_the_schedule(tmp_path, capsys, trainer_class):
    trainer = train(
        tmp_path,
        trainer_class,
        trainer_kwargs={"eval_dataset": sentences(16)},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=6,
        logging_steps=2,
        gradient_accumulation_steps=2,
        optim_args=None,
        weight_decay=5e-4,
    )
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    history = trainer.state.log_history
    assert state["log_history"] == history[: len(state["log_history"])]
    logs = training_logs(trainer)
    assert [entry["step"] for entry in logs] == [2, 4, 6]
    for entry in logs:
        assert {"loss", "grad_norm", "learning_rate", "epoch", DECAY, RMS} <= entry.keys()
        assert all(type(entry[key]) is float and math.isfinite(entry[key]) for key in (DECAY, RMS, "loss"))
        assert entry[DECAY] == pytest.approx(5e-4 / entry[RMS], rel=1e-9)
    for entry in history:
        assert ("loss" in entry) == (DECAY in entry) == (RMS in entry)
    assert capsys.readouterr().out.count(f"'{DECAY}'") == 3

    moments = [state["exp_avg_sq"] for state in trainer.optimizer.state.values()]
    mean = sum(m.double().sum() for m in moments) / sum(m.numel() for m in moments) / (1 - 0.999**6)
    assert logs[-1][RMS] == pytest.approx(mean.sqrt().item(), rel=1e-5)


def test_progress_bar_shows_the_schedule(tmp_path, capsys):
    train(tmp_path, disable_tqdm=False, max_steps=2)
    assert capsys.readouterr().out.count(DECAY) == 2


@pytest.mark.parametrize(
    "logging", [{"logging_steps": 4, "logging_first_step": True}, {"logging_strategy": "epoch", "max_steps": 16}]
)
def test_other_logging_strategies(tmp_path, logging):
    trainer = train(tmp_path, **logging)
    assert len(training_logs(trainer)) == 2
    assert all(DECAY in entry for entry in training_logs(trainer))


def test_tensorboard_gets_both_scalars_from_the_stock_trainer(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))  # older versions write into output_dir by themselves
    trainer = train(tmp_path, report_to="tensorboard")
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent)).Reload()
    for key in (DECAY, RMS):
        scalars = events.Scalars(f"train/{key}")
        assert [scalar.step for scalar in scalars] == [1, 2, 3, 4, 5, 6]
        assert [scalar.value for scalar in scalars] == pytest.approx([entry[key] for entry in training_logs(trainer)])


def test_second_callback_changes_nothing(tmp_path, caplog):
    plain = train(tmp_path, weight_decay=0.0)
    once = messages(caplog)
    doubled = train(tmp_path, weight_decay=0.0, trainer_kwargs={"callbacks": [SWDCallback()]})
    assert len(once) == 1 and messages(caplog) == 2 * once
    keys = {"loss", "grad_norm", "learning_rate", "epoch", "step", DECAY, RMS}
    assert training_logs(doubled) == training_logs(plain) and training_logs(plain)[0].keys() == keys


class Tracker(TrainerCallback):
    """What a tracker sees of each log."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("own", [(), (SWDCallback,)], ids=["joins", "of-the-user"])
@both_trainers
def test_trackers_see_the_schedule_in_every_training(tmp_path, trainer_class, own):
    """The callback acts before them, wherever it stands, and joins once, however often a Trainer trains."""
    tracker = Tracker()
    trainer = train(tmp_path, trainer_class, trainer_kwargs={"callbacks": [tracker, *(cls() for cls in own)]})
    trainer.args.max_steps = 8
    trainer.train()
    assert sum(isinstance(callback, SWDCallback) for callback in trainer.callback_handler.callbacks) == 1
    seen = [entry for entry in tracker.logs if "loss" in entry]
    assert len(seen) == 14 and all({DECAY, RMS} <= entry.keys() for entry in seen)


def test_a_trainer_without_adams_has_the_callbacks_that_transformers_gives_it(tmp_path):
    """As transformers' own test_default_callbacks_are_present has it: before, during and after a training."""

    class Looks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.during = list(trainer.callback_handler.callbacks)

    looks = Looks()
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None)
    trainer = Trainer(tiny_bert(), args, train_dataset=sentences(), callbacks=[looks])
    before = list(trainer.callback_handler.callbacks)
    assert [type(callback).__name__ for callback in before] == ["DefaultFlowCallback", "Looks", "PrinterCallback"]
    trainer.train()
    assert looks.during == trainer.callback_handler.callbacks == before


def test_callback_of_the_user_without_registration(tmp_path):
    """The user's own callback, and the schedule on another optimizer than AdamS."""
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=5e-4)
    schedule = ScheduledWeightDecay(optimizer)
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = Trainer(model, args, train_dataset=sentences(), optimizers=(optimizer, scheduler))
    trainer.add_callback(SWDCallback())
    trainer.train()
    assert schedule.step_count == 6
    for entry in training_logs(trainer):
        assert entry[DECAY] == pytest.approx(5e-4 / entry[RMS], rel=1e-9)


@both_trainers
def test_without_a_schedule_nothing_is_added(tmp_path, caplog, trainer_class):
    trainer = train(tmp_path, trainer_class, optim="adamw_torch", optim_args=None, weight_decay=0.0)
    assert training_logs(trainer)[0].keys() == {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert messages(caplog) == []


def test_optimizer_that_is_its_own_optimizer_trains(tmp_path):
    """The look for a schedule, or for a checkpoint of one, used to go on in it without end."""
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.optimizer = optimizer
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None, max_steps=2)
    trainer = Trainer(model, args, train_dataset=sentences(), optimizers=(optimizer, None))
    trainer.train()
    assert len(training_logs(trainer)) == 2


# Ways to build the optimizer


def test_optimizer_class_or_instance_given_to_the_trainer(tmp_path):
    kwargs = {"lr": 1e-3, "reference_steps": 3}
    named = train(tmp_path)
    if "optimizer_cls_and_kwargs" in inspect.signature(Trainer).parameters:  # since transformers 4.47
        trainer_kwargs = {"optimizer_cls_and_kwargs": (AdamS, kwargs)}
        by_class = train(tmp_path, optim="adamw_torch", optim_args=None, trainer_kwargs=trainer_kwargs)
        assert training_logs(by_class) == training_logs(named)
    model = tiny_bert()
    optimizer = create_adams(model, weight_decay=0.01, **kwargs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 6)
    by_instance = train(
        tmp_path,
        model=model,
        optim="adamw_torch",
        optim_args=None,
        trainer_kwargs={"optimizers": (optimizer, scheduler)},
    )
    for ours, theirs in zip(training_logs(by_instance), training_logs(named), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_seq2seq_trainer(tmp_path):
    trainer = train(tmp_path, Seq2SeqTrainer, cls=Seq2SeqTrainingArguments, max_steps=2)
    assert type(trainer.optimizer.optimizer) is AdamS
    assert all(DECAY in entry for entry in training_logs(trainer))
    assert trainer.optimizer.optimizer.schedule.clip_statistics()[1] == 2


def test_trl_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<eos>", "weight", "decay", "follows", "the", "gradient"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=6, n_positions=16, n_embd=16, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    )
    dataset = Dataset.from_dict(
        {"text": ["weight decay follows the gradient", "the gradient follows weight decay"] * 4}
    )
    args = arguments(tmp_path, trl.SFTConfig, max_steps=2, max_length=16, bf16=False)
    trainer = trl.SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is AdamS and trainer.optimizer.param_groups[0]["reference_steps"] == 3
    assert [entry["step"] for entry in training_logs(trainer) if entry[RMS] > 0] == [1, 2]
    assert trainer.optimizer.optimizer.schedule.clip_statistics()[1] == 2


def test_sentence_transformers_trainer(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from torch import nn

    class Bag(nn.Module):
        """Mean embedding of words, in the form of a sentence-transformers module."""

        def __init__(self):
            super().__init__()
            self.words = nn.EmbeddingBag(100, 8)

        def preprocess(self, texts, *args, **kwargs):
            return {"input_ids": torch.tensor([[ord(letter) % 100 for letter in text[:8]] for text in texts])}

        tokenize = preprocess

        def forward(self, features, **kwargs):
            return {**features, "sentence_embedding": self.words(features["input_ids"])}

    model = library.SentenceTransformer(modules=[Bag()], device="cpu")
    pairs = Dataset.from_dict(
        {"anchor": ["gradient norm", "learning rate"] * 8, "positive": ["norm of it", "its rate"] * 8}
    )
    args = arguments(tmp_path, library.SentenceTransformerTrainingArguments, max_steps=2)
    loss = MultipleNegativesRankingLoss(model)
    trainer = library.SentenceTransformerTrainer(model, args=args, train_dataset=pairs, loss=loss)
    trainer.train()
    assert [entry["step"] for entry in training_logs(trainer) if entry[RMS] > 0] == [1, 2]
    assert trainer.optimizer.optimizer.schedule.clip_statistics()[1] == 2


# Clipping with the norm of the schedule


class CountNorms(TorchDispatchMode):
    """Counts the elements that go into norms."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten._foreach_norm,
            torch.ops.aten.linalg_vector_norm,
            torch.ops.aten.dot,
        ):
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.elements += sum(tensor.numel() for tensor in tensors)
        return func(*args, **(kwargs or {}))


class ClipsByItself(Trainer):
    """As every Trainer did before it shared the norm."""

    def _clip_grad_norm(self, model):
        return torch.nn.utils.clip_grad_norm_(list(model.parameters()), self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        return grad_norm


clipping_inside = pytest.mark.skipif(
    not hasattr(Trainer, "_clip_grad_norm"), reason="before transformers 5.3 the training loop clips inline"
)


@clipping_inside
@both_trainers
@pytest.mark.parametrize(
    ("max_grad_norm", "accumulation"),
    [
        pytest.param(0.1, 2, id="all-clipped"),
        pytest.param(0.4, 1, id="some-clipped"),
        pytest.param(0.0, 2, id="not-clipped"),
    ],
)
def test_every_trainer_reads_gradients_once(tmp_path, trainer_class, max_grad_norm, accumulation):
    """And one that clips by itself does so, with the same weights."""
    settings = {"max_grad_norm": max_grad_norm, "gradient_accumulation_steps": accumulation}
    settings |= {"max_steps": 8, "learning_rate": 3e-3, "weight_decay": 2.0}
    runs, reads = [], []
    for cls in (ClipsByItself, trainer_class):
        with CountNorms() as counter:
            runs.append(train(tmp_path, cls, **settings))
        reads.append(counter.elements / 8 / sum(p.numel() for p in runs[-1].model.parameters()))
    own, shared = runs
    assert 2.0 <= reads[0] < 2.02 and 1.0 <= reads[1] < 1.02
    assert distance(shared, own) < 1e-5
    for mine, theirs in zip(training_logs(shared), training_logs(own), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)

    clipped = sum(entry["grad_norm"] > max_grad_norm > 0 for entry in training_logs(shared))
    assert shared.optimizer.optimizer.schedule.clip_statistics() == (clipped, 8)
    assert {0.1: clipped == 8, 0.4: 0 < clipped < 8, 0.0: clipped == 0}[max_grad_norm]
    assert own.optimizer.optimizer.schedule.clip_statistics() == (0, 0)
    assert "clip_grad_norm_" not in vars(shared.accelerator)


def test_other_optimizers_are_clipped_by_accelerate_itself(tmp_path, monkeypatch):
    calls = []
    clip = Accelerator.clip_grad_norm_

    def spied(self, parameters, max_norm, norm_type=2):
        calls.append((type(parameters).__name__, max_norm, norm_type))
        return clip(self, parameters, max_norm, norm_type)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", spied)
    train(tmp_path, optim="adamw_torch", optim_args=None, max_grad_norm=0.1)
    assert calls == [("generator", 0.1, 2)] * 6


def test_accelerator_with_its_own_clipping_keeps_it(tmp_path):
    seen = []

    class Own(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.clip_grad_norm_ = lambda parameters, max_norm: seen.append(max_norm) or torch.tensor(1.0)

    trainer = train(tmp_path, Own, max_grad_norm=0.1)
    assert seen == [0.1] * 6 and trainer.optimizer.optimizer.schedule.clip_statistics() == (0, 0)


@clipping_inside
def test_accelerate_clips_when_the_optimizer_has_only_part_of_the_model(tmp_path):
    def run(trainer_class):
        model = tiny_bert()
        optimizer = AdamS(model.bert.encoder.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        return train(
            tmp_path,
            trainer_class,
            model=model,
            max_grad_norm=0.1,
            trainer_kwargs={"optimizers": (optimizer, scheduler)},
        )

    own, ours = run(ClipsByItself), run(Trainer)
    assert torch.equal(weights(ours), weights(own))
    assert ours.optimizer.optimizer.schedule.clip_statistics() == (0, 0)


@clipping_inside
def test_norm_is_shared_with_frozen_parameters(tmp_path):
    def run(trainer_class):
        model = tiny_bert()
        model.bert.embeddings.requires_grad_(False)
        return train(tmp_path, trainer_class, model=model, max_grad_norm=0.1)

    own, ours = run(ClipsByItself), run(Trainer)
    assert distance(ours, own) < 1e-5
    assert ours.optimizer.optimizer.schedule.clip_statistics()[1] == 6


@clipping_inside
@pytest.mark.slow
def test_norm_is_shared_with_two_processes(tmp_path):
    """DDP on CPU: the weights of a Trainer that clips by itself."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from hf_utils import arguments, sentences, tiny_bert\n"
        "from transformers import Trainer\n"
        "import hf_swd\n"
        "class ClipsByItself(Trainer):\n"
        "    def _clip_grad_norm(self, model):\n"
        "        return torch.nn.utils.clip_grad_norm_(list(model.parameters()), 0.1)\n"
        "result = []\n"
        "for cls in (ClipsByItself, Trainer):\n"
        "    args = arguments(sys.argv[1], max_grad_norm=0.1, ddp_backend='gloo', per_device_train_batch_size=4)\n"
        "    trainer = cls(tiny_bert(), args, train_dataset=sentences())\n"
        "    trainer.train()\n"
        "    assert trainer.accelerator.distributed_type == 'MULTI_CPU', trainer.accelerator.distributed_type\n"
        "    assert type(trainer.model_wrapped).__name__ == 'DistributedDataParallel'\n"
        "    seen = trainer.optimizer.optimizer.schedule.clip_statistics()[1]\n"
        "    assert seen == (6 if cls is Trainer else 0), seen\n"
        "    result.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))\n"
        "torch.save(result, f'{sys.argv[1]}/{trainer.args.process_index}.pt')\n"
    )
    path = os.pathsep.join(
        [
            str(Path(__file__).parents[1] / "support"),
            str(Path(hf_swd.__file__).parents[1]),
            os.environ.get("PYTHONPATH", ""),
        ]
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
        str(tmp_path),
    ]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (stock, ours), other_rank = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(stock, other_rank[0]) and torch.equal(ours, other_rank[1])
    assert (ours - stock).norm() / (stock - flat(tiny_bert())).norm() < 1e-5


# Checkpoints


@both_trainers
@pytest.mark.parametrize(
    "optim_args", [None, "reference_steps=3", "reference_steps=9"], ids=["paper", "calibrated", "calibrates-later"]
)
def test_resume_is_the_uninterrupted_run(tmp_path, trainer_class, optim_args):
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "learning_rate": 1e-2}
    settings |= {"optim_args": optim_args, "weight_decay": 0.5 if optim_args else 5e-3, "max_grad_norm": 0.3}
    whole = train(tmp_path / "whole", trainer_class, **settings)
    resumed = train(
        tmp_path / "resumed",
        trainer_class,
        model=tiny_bert(seed=3),
        resume=str(tmp_path / "whole" / "checkpoint-6"),
        **settings,
    )
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-6, atol=1e-9)
    assert len(training_logs(resumed)) == 12
    for mine, theirs in zip(training_logs(resumed), training_logs(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


def test_run_goes_over_from_adamw_at_a_checkpoint(tmp_path):
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "optim_args": None, "weight_decay": 5e-4}
    before = train(tmp_path / "adamw", optim="adamw_torch", **settings)
    checkpoint = tmp_path / "adamw" / "checkpoint-6"
    after = train(tmp_path / "adams", optim="adams", model=tiny_bert(seed=3), resume=str(checkpoint), **settings)
    new = training_logs(after)[6:]
    assert [DECAY in entry for entry in training_logs(after)] == 6 * [False] + 6 * [True]
    assert new[0]["loss"] == pytest.approx(training_logs(before)[6]["loss"], rel=1e-6)
    assert all(entry[DECAY] == pytest.approx(5e-4 / entry[RMS], rel=1e-9) for entry in new)

    # The second moment of step 7 is made of AdamW's moment of step 6 and one more gradient.
    moments = torch.load(checkpoint / "optimizer.pt")["state"].values()
    elements = sum(state["exp_avg_sq"].numel() for state in moments)
    old = sum(state["exp_avg_sq"].double().sum().item() for state in moments)
    norm = min(new[0]["grad_norm"], 1.0)
    expected = math.sqrt((0.999 * old + 0.001 * norm**2) / elements / (1 - 0.999**7))
    assert new[0][RMS] == pytest.approx(expected, rel=1e-5)


# Warnings


@both_trainers
def test_reasonable_settings_warn_of_nothing(tmp_path, caplog, trainer_class):
    train(tmp_path, trainer_class, max_steps=25, max_grad_norm=10.0)
    assert messages(caplog) == []


@both_trainers
def test_no_decay_warns_that_this_is_adam(tmp_path, caplog, trainer_class):
    trainer = train(tmp_path, trainer_class, weight_decay=0.0)
    (message,) = messages(caplog)
    assert (
        "weight_decay=0" in message
        and "plain Adam" in message
        and "5e-4" in message
        and 'optim_args="reference_steps=2"' in message  # a third of the training
    )
    adam = train(tmp_path, optim="adamw_torch_fused", optim_args=None, weight_decay=0.0)
    assert distance(trainer, adam) < 1e-6


def test_large_decay_warns_with_numbers(tmp_path, caplog):
    trainer = train(tmp_path, optim_args=None, weight_decay=0.1, logging_steps=1, lr_scheduler_type="constant")
    (message,) = messages(caplog)
    first = training_logs(trainer)[0]
    percent = 100 * 1e-3 * first[DECAY]
    assert percent > 1
    assert (
        f"takes {percent:.3g} % of the weights at step 1: learning rate 0.001 * effective decay {first[DECAY]:.3g}"
        in message
    )
    assert f"weight_decay=0.1 at a gradient rms of {first[RMS]:.3g}" in message
    assert 'optim_args="reference_steps=2"' in message
    assert f"({0.01 * first[RMS]:.2g} gives an effective decay of 0.01 here)" in message


def test_large_decay_is_noticed_without_logs_and_with_a_reference(tmp_path, caplog):
    train(tmp_path, weight_decay=20.0, logging_strategy="no", max_steps=8, warmup_steps=4)
    (message,) = messages(caplog)
    assert "at step 4" in message and "10 would take 1 %" not in message and "would take 1 %" in message
    assert "reference_steps=" not in message


@both_trainers
@pytest.mark.parametrize(("steps", "logging_steps"), [(30, 5), (30, 500), (4, 500)])
def test_clipping_of_nearly_all_steps_is_counted(tmp_path, caplog, trainer_class, steps, logging_steps):
    """From 20 steps on, or at the end of a shorter training."""
    settings = {"max_steps": steps, "logging_steps": logging_steps, "max_grad_norm": 0.05}
    trainer = train(tmp_path, trainer_class, optim_args=None, weight_decay=5e-4, **settings)
    (message,) = messages(caplog)
    assert trainer.optimizer.optimizer.schedule.clip_statistics() == (steps, steps)
    known = 20 if logging_steps == 5 else steps
    assert f"{known} of {known} steps were clipped to max_grad_norm=0.05" in message
    elements = sum(p.numel() for p in trainer.model.parameters())
    constant = 5e-4 * math.sqrt(elements) / 0.05
    assert f"about {constant:.3g} (weight_decay=0.0005 * sqrt({elements}) / 0.05)" in message
    assert f"AdamW with weight_decay={constant:.3g}" in message and "raise max_grad_norm" in message
    if logging_steps == 5:
        assert training_logs(trainer)[-1][DECAY] == pytest.approx(constant, rel=1e-3)


@clipping_inside
@pytest.mark.parametrize(("logging_steps", "counted"), [(1, "20 of 20"), (10, "3 of 3")])
def test_clipping_that_the_schedule_does_not_see_is_judged_by_logs(tmp_path, caplog, logging_steps, counted):
    train(tmp_path, ClipsByItself, max_steps=30, logging_steps=logging_steps, max_grad_norm=0.05)
    (message,) = messages(caplog)
    assert f"{counted} logged steps were clipped to max_grad_norm=0.05" in message
    assert "AdamW with weight_decay=0.01" in message  # calibrated at step 3, and constant ever since


@clipping_inside
def test_unclipped_norm_in_a_trainer_that_clips_by_itself_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="unclipped_norm=True: .* max_grad_norm"):
        train(tmp_path, ClipsByItself, optim_args="unclipped_norm=true", max_grad_norm=0.1)


@both_trainers
@pytest.mark.parametrize("changes", [{"max_grad_norm": 0.0}, {"logging_steps": 15, "max_grad_norm": 10.0}])
def test_unclipped_steps_warn_of_nothing(tmp_path, caplog, trainer_class, changes):
    train(tmp_path, trainer_class, **{"max_steps": 30, **changes})
    assert messages(caplog) == []


@pytest.mark.parametrize(
    ("optim_args", "shown"),
    [
        (None, "unclipped_norm=true"),
        ("reference_steps=3", "reference_steps=3,unclipped_norm=true"),
        ("amsgrad=true, reference_steps=3", "amsgrad=true,reference_steps=3,unclipped_norm=true"),
        ("unclipped_norm=false,foreach=true,fused=none", "foreach=true,fused=none,unclipped_norm=true"),
        (
            "base=adamw_torch,schedule_beta2=0.9,reference_steps=3",
            "base=adamw_torch,schedule_beta2=0.9,reference_steps=3,unclipped_norm=true",
        ),
    ],
)
def test_remedy_against_clipping_shows_all_of_optim_args(tmp_path, caplog, optim_args, shown):
    """Pasted as it stands, it must not drop reference_steps: the decay would be another by orders of magnitude."""
    train(tmp_path, optim_args=optim_args, weight_decay=5e-4, max_steps=4, max_grad_norm=0.05)
    (message,) = messages(caplog)
    assert f'optim_args="{shown}"' in message
    caplog.clear()
    train(tmp_path, optim_args=shown, weight_decay=5e-4, max_steps=4, max_grad_norm=0.05)
    assert messages(caplog) == []


def test_remedies_of_two_warnings_are_one(tmp_path, caplog):
    """The second to be pasted does not take back what the first has mended."""
    changes = {"weight_decay": 0.01, "max_steps": 24, "max_grad_norm": 1e-3}
    train(tmp_path, optim_args=None, **changes)
    decay, clipping = messages(caplog)
    assert 'set optim_args="reference_steps=8", with which' in decay
    assert 'optim_args="reference_steps=8,unclipped_norm=true"' in clipping
    caplog.clear()
    train(tmp_path, optim_args="reference_steps=8,unclipped_norm=true", **changes)
    assert messages(caplog) == []


@pytest.mark.parametrize(("max_steps", "steps"), [(1200, 100), (60, 20), (2, 1)])
def test_reference_steps_that_are_proposed_leave_most_of_the_training_to_the_schedule(max_steps, steps):
    assert _Watch(TrainerState(max_steps=max_steps), 0, (0, 0)).like_adamw == {"reference_steps": steps}


@both_trainers
def test_training_that_ends_before_reference_steps(tmp_path, caplog, trainer_class):
    train(tmp_path, trainer_class, optim_args="amsgrad=true,reference_steps=6", max_steps=6)
    (message,) = messages(caplog)
    assert message.startswith("reference_steps=6, and the training has 6 steps")
    assert 'set optim_args="amsgrad=true,reference_steps=2".' in message
    caplog.clear()
    train(tmp_path, trainer_class, optim_args="reference_steps=5", max_steps=6)
    assert messages(caplog) == []


def test_remedy_against_clipping_for_an_optimizer_of_ones_own(tmp_path, caplog):
    """`optim_args` would be ignored there."""
    model = tiny_bert()
    optimizer = create_adams(model, lr=1e-3, weight_decay=5e-4)
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None, max_steps=4, max_grad_norm=0.05)
    Trainer(model, args, train_dataset=sentences(), optimizers=(optimizer, None)).train()
    (message,) = messages(caplog)
    assert "unclipped_norm=True where the optimizer" in message and "optim_args" not in message


def test_a_warning_does_not_stand_behind_a_progress_bar(tmp_path, capsys):
    logger, handler = logging.getLogger("hf_swd.trainer"), logging.StreamHandler()
    logger.addHandler(handler)
    try:
        train(tmp_path, optim_args=None, weight_decay=0.1, lr_scheduler_type="constant", disable_tqdm=False)
    finally:
        logger.removeHandler(handler)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    (line,) = [line for line in lines if "weight decay takes" in line]
    assert line.startswith("weight decay takes") and any("6/6" in line for line in lines)


@pytest.mark.parametrize(
    ("optim_args", "weight_decay", "said"),
    [
        pytest.param(None, 0.01, "without reference_steps it is divided by the gradient rms", id="a-value-of-adamw"),
        pytest.param(None, 5e-4, None, id="the-papers"),
        pytest.param("reference_steps=3", 0.01, None, id="calibrated"),
    ],
)
def test_a_decay_of_many_times_weight_decay_is_said(tmp_path, caplog, optim_args, weight_decay, said):
    settings = {"optim_args": optim_args, "weight_decay": weight_decay, "learning_rate": 1e-6, "max_grad_norm": 10.0}
    trainer = train(tmp_path, max_steps=4, logging_steps=1, model=small_gradients(), **settings)
    found = messages(caplog)
    assert len(found) == (said is not None)
    if said:
        first = training_logs(trainer)[0]
        assert first[DECAY] > 100 * weight_decay
        times = f"{first[DECAY]:.3g}, {first[DECAY] / weight_decay:.0f} times weight_decay=0.01"
        assert f"the effective decay at step 1 is {times}" in found[0] and said in found[0]


def after_step(change):
    """A callback that changes the optimizer between a step and its log."""

    class Changes(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            change(optimizer, state.global_step)

    return Changes()


def assign(value):
    def change(optimizer, step):
        optimizer.param_groups[0]["weight_decay"] = value(step)

    return change


def add_group(optimizer, step):
    if step == 2:
        optimizer.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "weight_decay": 1.0})


@pytest.mark.parametrize(
    ("change", "weight_decay"),
    [
        pytest.param(assign(lambda step: 0.01 * step), 0.0, id="decay-begins-later"),
        pytest.param(assign(lambda step: 0.05), 1e-4, id="raised"),
        pytest.param(add_group, 0.01, id="new-group"),
    ],
)
def test_log_and_warnings_speak_of_the_step_that_was_made(tmp_path, caplog, change, weight_decay):
    used = []
    handle = register_optimizer_step_post_hook(
        lambda optimizer, *_: used.append(max(float(group["weight_decay"]) for group in optimizer.param_groups))
    )
    model = tiny_bert()
    args = arguments(tmp_path, weight_decay=weight_decay, max_steps=5, logging_steps=1)
    optimizer = create_adams(model, lr=1e-3, weight_decay=weight_decay, reference_steps=2)
    constant = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), 1.0)
    kwargs = {"train_dataset": sentences(), "optimizers": (optimizer, constant), "callbacks": [after_step(change)]}
    trainer = Trainer(model, args, **kwargs)
    try:
        trainer.train()
    finally:
        handle.remove()
    assert [log[DECAY] for log in training_logs(trainer)] == pytest.approx(used)
    assert not [message for message in messages(caplog) if "times weight_decay" in message]


def small_gradients():
    """Of an rms far below 0.01."""
    model = tiny_bert()
    model.classifier.weight.data.mul_(1e-2)
    return model


def test_each_training_warns_anew_and_only_on_the_main_process(tmp_path, caplog):
    trainer = train(tmp_path, SWDTrainer, max_steps=20, logging_steps=10, max_grad_norm=0.05)
    assert len(messages(caplog)) == 1
    trainer.args.max_steps = 40
    trainer.train()
    assert len(messages(caplog)) == 2
    assert "20 of 20 steps" in messages(caplog)[1]

    args = arguments(tmp_path, weight_decay=0.0, max_steps=2)
    trainer = Trainer(tiny_bert(), args, train_dataset=sentences())
    trainer.is_world_process_zero = lambda: False
    trainer.train()
    assert len(messages(caplog)) == 2


SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}


def resume(trainer_class, output_dir, *, callbacks=(), on_main_process=True, **changes):
    """A training with other settings from the checkpoint that there is."""
    args = arguments(output_dir, **SAVING, **changes)
    trainer = trainer_class(tiny_bert(), args, train_dataset=sentences(), callbacks=list(callbacks))
    trainer.is_world_process_zero = lambda: on_main_process
    trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-3"))
    assert trainer.state.global_step == 6
    return trainer


@both_trainers
def test_adamw_that_goes_on_from_a_checkpoint_of_adams_says_so_once(tmp_path, caplog, trainer_class):
    train(tmp_path, **SAVING)
    assert messages(caplog) == []
    settings = {"optim": "adamw_torch", "optim_args": None, "weight_decay": 0.25}
    resumed = resume(trainer_class, tmp_path, callbacks=[SWDCallback()], **settings)
    (message,) = messages(caplog)
    decay = max(group["weight_decay"] for group in resumed.optimizer.param_groups)
    assert decay > 0
    assert "checkpoint was written with scheduled weight decay (3 steps of it), but AdamW has no schedule" in message
    assert f"goes on with the constant weight_decay={decay:g}." in message and 'optim="adams"' in message
    assert all(DECAY not in entry for entry in training_logs(resumed)[3:])
    resume(trainer_class, tmp_path, on_main_process=False, **settings)
    assert len(messages(caplog)) == 1


@both_trainers
def test_checkpoint_without_the_state_of_the_optimizer_says_where_the_schedule_begins(tmp_path, caplog, trainer_class):
    """DeepSpeed's checkpoint under DDP looks like this to a Trainer."""
    train(tmp_path, **SAVING)
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    resumed = resume(trainer_class, tmp_path)
    (message,) = messages(caplog)
    assert "goes on at step 3, but its checkpoint has no state for this optimizer" in message
    assert resumed.optimizer.optimizer.schedule.step_count == 3
    resume(trainer_class, tmp_path, on_main_process=False)
    assert len(messages(caplog)) == 1


@both_trainers
def test_checkpoint_of_adamw_is_taken_over_without_a_word(tmp_path, caplog, trainer_class):
    train(tmp_path, **SAVING, optim="adamw_torch", optim_args=None)
    resumed = resume(trainer_class, tmp_path)
    assert resumed.optimizer.optimizer.schedule.step_count == 6
    assert messages(caplog) == []


@both_trainers
def test_checkpoint_with_the_same_options_warns_of_nothing(tmp_path, caplog, trainer_class):
    settings = {"optim_args": "reference_steps=2,amsgrad=true"}
    train(tmp_path, trainer_class, **SAVING, **settings)
    resume(trainer_class, tmp_path, **settings)
    resume(trainer_class, tmp_path, **settings, weight_decay=0.02, learning_rate=1e-4)
    assert messages(caplog) == []


@pytest.mark.parametrize(("saved", "asked"), [("false", "true"), ("true", "false")])
def test_checkpoint_with_another_amsgrad_says_that_it_wins(tmp_path, caplog, saved, asked):
    train(tmp_path, **SAVING, optim_args=f"reference_steps=3,amsgrad={saved}")
    assert messages(caplog) == []
    resumed = resume(Trainer, tmp_path, callbacks=[SWDCallback()], optim_args=f"reference_steps=3,amsgrad={asked}")
    assert all(group["amsgrad"] == (saved == "true") for group in resumed.optimizer.param_groups)
    (message,) = messages(caplog)
    assert f"the checkpoint has amsgrad={saved.title()}, and AdamS was built with amsgrad={asked.title()}" in message
    assert "without resume_from_checkpoint" in message
    # Without the maxima in Adam's state, it cannot be turned on in place.
    assert ('assign group["amsgrad"] in every group' in message) == (asked == "false")


def test_checkpoint_with_other_options_names_all_of_them_in_one_warning(tmp_path, caplog):
    train(tmp_path, SWDTrainer, **SAVING, optim_args="reference_steps=2,unclipped_norm=true,amsgrad=true")
    resumed = resume(SWDTrainer, tmp_path, optim_args="reference_steps=50", callbacks=[SWDCallback()])
    for group in resumed.optimizer.param_groups:
        assert (group["reference_steps"], group["unclipped_norm"], group["amsgrad"]) == (2, True, True)
    (message,) = messages(caplog)
    assert (
        "the checkpoint has reference_steps=2, unclipped_norm=True, amsgrad=True, and AdamS was built with" in message
    )
    assert "built with reference_steps=50, unclipped_norm=False, amsgrad=False: the checkpoint's are used" in message
    assert 'assign group["reference_steps"], group["unclipped_norm"], group["amsgrad"] in every group' in message
    resume(SWDTrainer, tmp_path, optim_args="reference_steps=50", on_main_process=False)
    assert len(messages(caplog)) == 1
