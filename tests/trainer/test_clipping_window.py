"""Whoever reads or changes gradients around a Trainer's clipping: he sees what AdamW's run would show him, and the
schedule follows what Adam gets.

Each run is judged twice. With `weight_decay=0` its weights are those of the same Trainer with torch's AdamW; and after
every step the schedule's rms is what Adam's moments tell.
"""

from __future__ import annotations

import contextlib
import math

import numpy
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from hf_utils import arguments, distance, sentences, tiny_bert, train
from reference_adams import rms_of_moments
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from hf_swd import ScheduledWeightDecay, SWDTrainer, create_adams
from hf_swd.core.schedule import WeightDecaySchedule


WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


class Judge(TrainerCallback):
    """After every optimizer step: what the schedule says, and what the moments tell."""

    def __init__(self):
        self.found, self.expected = [], []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        mean = optimizer.param_groups[0].get("second_moment_mean")
        if mean is not None:
            self.found.append(math.sqrt(mean))
            self.expected.append(rms_of_moments(optimizer))


def judged(tmp_path, trainer_class=Trainer, callbacks=lambda: [], steps=6, model=tiny_bert, **changes):
    """Train with AdamS and with AdamW, and compare; the two Trainers."""
    settings = {"optim_args": None, "weight_decay": 0.0, "max_steps": steps, "max_grad_norm": 0.1, **changes}
    judge = Judge()
    swd = train(
        tmp_path, trainer_class, model=model(), trainer_kwargs={"callbacks": [*callbacks(), judge]}, **settings
    )
    assert len(judge.found) == steps and judge.found == pytest.approx(judge.expected, rel=1e-4)
    usual = train(
        tmp_path,
        Trainer if trainer_class is SWDTrainer else trainer_class,
        model=model(),
        trainer_kwargs={"callbacks": callbacks()},
        **{**settings, "optim": "adamw_torch"},
    )
    assert distance(swd, usual) < 1e-5
    return swd, usual


def norm_of(params) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in params if p.grad is not None))


# Changes between clipping and the step


def set_rows_to_zero(model):
    """As for the tokens of a vocabulary that are not to be trained."""
    model.get_parameter(WORD_EMBEDDINGS).grad.data[4:] = 0


def put_other_data(model):
    grad = model.get_parameter(WORD_EMBEDDINGS).grad
    grad.data = grad.data * (torch.arange(len(grad)) < 50)[:, None]


def write_through_numpy(model):
    model.get_parameter(WORD_EMBEDDINGS).grad.numpy()[:] = 0


def shrink_the_smallest(model):
    """The one gradient by which it was told whether a GradScaler has divided all of them."""
    smallest = min((p for p in model.parameters() if p.grad is not None), key=torch.Tensor.numel)
    smallest.grad.data.mul_(0.01)


def multiply_in_place(model):
    model.get_parameter(WORD_EMBEDDINGS).grad.mul_(0.01)


CHANGES = [set_rows_to_zero, put_other_data, write_through_numpy, shrink_the_smallest, multiply_in_place]


class OnPreOptimizerStep(TrainerCallback):
    def __init__(self, act):
        self.act = act

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.act(model)


class InstanceAttribute(TrainerCallback):
    """As a mock, or a callback that composes others, has it."""

    def __init__(self, act):
        self.on_pre_optimizer_step = lambda args, state, control, model=None, **kwargs: act(model)


class DuckTyped:
    """A callback that inherits from nothing, and forwards every event."""

    def __init__(self, act):
        self.act = act

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)

        def event(args, state, control, model=None, **kwargs):
            if name == "on_pre_optimizer_step":
                self.act(model)

        return event


class GlobalHook(TrainerCallback):
    """A hook on every optimizer of the process."""

    def __init__(self, act):
        self.act = act

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.handle = register_optimizer_step_pre_hook(lambda *_: self.act(model))

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()


class OptimizersHook(TrainerCallback):
    def __init__(self, act):
        self.act = act

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        optimizer.optimizer.register_step_pre_hook(lambda *_: self.act(model))


class HookOfLateStep(OptimizersHook):
    """Registered in mid-training, when the Trainer has already clipped some steps."""

    def on_train_begin(self, *args, **kwargs):
        pass

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 2:
            optimizer.optimizer.register_step_pre_hook(lambda *_: self.act(model))


class WrappedAcceleratedStep(TrainerCallback):
    """As a profiler or a logger wraps it."""

    def __init__(self, act):
        self.act = act

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        step = optimizer.step

        def wrapped(*args, **kwargs):
            self.act(model)
            return step(*args, **kwargs)

        optimizer.step = wrapped


class WrappedStep(WrappedAcceleratedStep):
    """That of the optimizer inside."""

    def on_train_begin(self, *args, optimizer=None, **kwargs):
        super().on_train_begin(*args, optimizer=optimizer.optimizer, **kwargs)


def subclass_that_clips(act):
    class Clips(Trainer):
        def _clip_grad_norm(self, model):
            norm = super()._clip_grad_norm(model)
            act(self.model)
            return norm

    return Clips


def patched_on_the_instance(act):
    class Patched(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            clip = self._clip_grad_norm

            def patched(model):
                norm = clip(model)
                act(self.model)
                return norm

            self._clip_grad_norm = patched

    return Patched


WAYS = [
    OnPreOptimizerStep,
    InstanceAttribute,
    DuckTyped,
    GlobalHook,
    OptimizersHook,
    HookOfLateStep,
    WrappedStep,
    WrappedAcceleratedStep,
    subclass_that_clips,
    patched_on_the_instance,
]
clipping_inside = pytest.mark.skipif(
    not hasattr(Trainer, "_clip_grad_norm"), reason="before transformers 5.3 the training loop clips inline"
)


def placed(way, act) -> dict:
    """Arguments of [`judged`] that let `act` happen between clipping and step."""
    if isinstance(way, type):
        return {"callbacks": lambda: [way(act)]}
    return {"trainer_class": way(act)}


@clipping_inside
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_whoever_looks_sees_the_clipped_gradients(tmp_path, way):
    seen = []
    judged(tmp_path, max_grad_norm=0.01, **placed(way, lambda model: seen.append(norm_of(model.parameters()))))
    steps = 4 if way is HookOfLateStep else 6
    assert seen == [pytest.approx(0.01, rel=1e-3)] * 2 * steps


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_gradients_changed_in_a_callback_are_what_counts(tmp_path, change):
    judged(tmp_path, callbacks=lambda: [OnPreOptimizerStep(change)])


@clipping_inside
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_changed_in_any_way_are_what_counts(tmp_path, way):
    judged(tmp_path, steps=4, **placed(way, set_rows_to_zero))


class Passes(TorchDispatchMode):
    """Names of the operators inside the block."""

    names = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += (func.overloadpacket.__name__,)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trainer_class", [Trainer, SWDTrainer])
@pytest.mark.parametrize("looks", [False, True])
def test_clipping_is_left_to_the_kernel_where_nobody_looks(tmp_path, trainer_class, looks):
    callbacks = [OnPreOptimizerStep(lambda model: None)] if looks else []
    with Passes() as passes:
        train(tmp_path, trainer_class, max_grad_norm=0.01, trainer_kwargs={"callbacks": callbacks})
    assert ("_foreach_mul_" in passes.names) == looks


@pytest.mark.parametrize("trainer_class", [Trainer, SWDTrainer])
def test_wrapper_that_a_learning_rate_scheduler_puts_around_the_step_is_nobody(tmp_path, trainer_class):
    judged(tmp_path, trainer_class, lr_scheduler_type="cosine")


# Clipping inside training_step


class ClipsInside(Trainer):
    """Differential privacy, in small: clip, then add noise."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), 0.05))
        generator = torch.Generator().manual_seed(self.state.global_step)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.add_(torch.randn(p.shape, generator=generator), alpha=1e-4)
        return loss


@pytest.mark.parametrize(
    "changes",
    [{"max_grad_norm": 1.0}, {"max_grad_norm": 0.01}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}],
    ids=["above", "below", "no-clipping-of-the-trainer", "accumulation"],
)
def test_clipping_inside_training_step(tmp_path, changes):
    swd, usual = judged(tmp_path, ClipsInside, **changes)
    assert swd.norm == pytest.approx(usual.norm, rel=1e-4)


# The window closes


def check_own_loop(trainer):
    optimizer = trainer.optimizer.optimizer
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in trainer.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        assert optimizer.grad_rms == pytest.approx(rms_of_moments(optimizer), rel=1e-5)


def test_gradients_after_training_are_not_the_trainers(tmp_path):
    """The same optimizer goes on in an own loop, which does not clip."""
    trainer, _ = judged(tmp_path)
    check_own_loop(trainer)


def test_step_that_never_comes_leaves_nothing_behind(tmp_path, monkeypatch):
    """Training is interrupted between clipping and step, where nobody looks, and an own loop goes on."""
    begin_step = WeightDecaySchedule.begin_step

    def interrupted(self):
        monkeypatch.setattr(WeightDecaySchedule, "begin_step", begin_step)
        raise KeyboardInterrupt

    class Interrupts(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                monkeypatch.setattr(WeightDecaySchedule, "begin_step", interrupted)

    judge = Judge()
    args = arguments(tmp_path, optim_args=None, max_grad_norm=0.1)
    trainer = Trainer(tiny_bert(), args, train_dataset=sentences(), callbacks=[judge, Interrupts()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(judge.found) == 2
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    check_own_loop(trainer)


def with_grad_scaler(trainer_class):
    """fp16 training as accelerate arranges it, but not on a CPU: float32 arithmetic, and a real GradScaler."""

    class WithGradScaler(trainer_class):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.state._mixed_precision = "fp16"
            self.accelerator.native_amp = True
            self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)

        def compute_loss(self, *args, **kwargs):
            return 16 * super().compute_loss(*args, **kwargs)

    return WithGradScaler


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}],
    ids=["clipped", "not-clipped", "accumulation"],
)
@pytest.mark.parametrize("looks", [False, True], ids=["nobody-looks", "changed"])
def test_with_a_grad_scaler_that_skips_steps(tmp_path, looks, changes):
    try:
        callbacks = (lambda: [OnPreOptimizerStep(shrink_the_smallest)]) if looks else (lambda: [])
        swd, _ = judged(tmp_path, with_grad_scaler(Trainer), callbacks, steps=9, **changes)
        assert swd.accelerator.scaler.get_scale() < 2.0**127
        assert 0 < swd.optimizer.param_groups[0]["schedule_step"] < 9
    finally:
        AcceleratorState._reset_state(True)


def test_what_was_measured_for_a_last_step_that_is_skipped_is_of_no_other(tmp_path):
    try:
        trainer = train(tmp_path, with_grad_scaler(Trainer), optim_args=None, max_steps=2, max_grad_norm=0.1)
        assert float(trainer.optimizer.param_groups[0]["schedule_step"]) == 0
        check_own_loop(trainer)
    finally:
        AcceleratorState._reset_state(True)


class LooksAfterSkippedSteps(HookOfLateStep):
    """From then on clipping measures nothing for the step that comes."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        super().on_step_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)
        assert state.global_step != 2 or optimizer.param_groups[0].get("schedule_step", 0) == 0


def test_what_was_measured_for_a_skipped_step_is_of_no_other(tmp_path):
    try:
        judged(tmp_path, with_grad_scaler(Trainer), lambda: [LooksAfterSkippedSteps(set_rows_to_zero)], steps=9)
    finally:
        AcceleratorState._reset_state(True)


# The norm before clipping


@pytest.mark.parametrize("trainer_class", [Trainer, SWDTrainer])
@pytest.mark.parametrize(
    "changes",
    [{"max_grad_norm": 0.01}, {"max_grad_norm": 0.0}, {"max_grad_norm": 0.01, "gradient_accumulation_steps": 2}],
    ids=["clipped", "not-clipped", "accumulation"],
)
def test_unclipped_norm(tmp_path, trainer_class, changes):
    if changes["max_grad_norm"] == 0 and not hasattr(Trainer, "_get_grad_norm"):
        pytest.skip("before transformers 5.3 a Trainer measures only what it clips")
    judge = Judge()
    trainer = train(
        tmp_path,
        trainer_class,
        optim_args="unclipped_norm=true",
        trainer_kwargs={"callbacks": [judge]},
        **changes,
    )
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    elements = sum(p.numel() for p in trainer.model.parameters())
    mean = 0.0
    for step, (found, norm) in enumerate(zip(judge.found, norms, strict=True), start=1):
        mean = 0.999 * mean + 0.001 * norm**2 / elements
        assert found == pytest.approx(math.sqrt(mean / (1 - 0.999**step)), rel=1e-4)


@clipping_inside
@pytest.mark.parametrize("way", [OnPreOptimizerStep, GlobalHook, subclass_that_clips], ids=lambda way: way.__name__)
def test_unclipped_norm_where_someone_can_change_gradients_stops_before_a_weight_changes(tmp_path, way):
    arrangement = placed(way, multiply_in_place)
    kwargs = {"callbacks": arrangement["callbacks"]()} if "callbacks" in arrangement else {}
    model = tiny_bert()
    with contextlib.ExitStack() as stack:
        for callback in kwargs.get("callbacks", ()):
            if way is GlobalHook:
                stack.callback(lambda callback=callback: callback.handle.remove())
        with pytest.raises(RuntimeError, match="max_grad_norm"):
            train(
                tmp_path,
                arrangement.get("trainer_class", Trainer),
                model=model,
                optim_args="unclipped_norm=true",
                trainer_kwargs=kwargs,
            )
    assert all(map(torch.equal, model.parameters(), tiny_bert().parameters()))


@pytest.mark.parametrize("unclipped", ["false", "true"])
def test_layers_frozen_at_the_begin_of_training(tmp_path, unclipped):
    """The optimizer holds them, the model's trainable parameters are fewer."""

    class Freezes(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.bert.embeddings.requires_grad_(False)

    judge = Judge()
    trainer = train(
        tmp_path, optim_args=f"unclipped_norm={unclipped}", trainer_kwargs={"callbacks": [Freezes(), judge]}
    )
    assert trainer.state.global_step == 6
    if unclipped == "false":
        assert judge.found == pytest.approx(judge.expected, rel=1e-4)
    else:
        first = next(entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry)
        elements = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        assert judge.found[0] == pytest.approx(first / math.sqrt(elements), rel=1e-4)


class MovesMoments(TrainerCallback):
    """Between the steps they are somewhere else."""

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        for values in optimizer.state.values():
            values.update({key: values[key].clone() for key in ("exp_avg", "exp_avg_sq")})


@pytest.mark.parametrize("unclipped", ["false", "true"])
def test_moments_that_are_offloaded_between_steps(tmp_path, unclipped):
    settings = {"optim_args": f"unclipped_norm={unclipped}", "max_grad_norm": 0.01}
    plain = train(tmp_path, **settings)
    moved = train(tmp_path, trainer_kwargs={"callbacks": [MovesMoments()]}, **settings)
    logs = ([entry for entry in each.state.log_history if "loss" in entry] for each in (moved, plain))
    for mine, theirs in zip(*logs, strict=True):
        for key in ("swd/weight_decay", "swd/grad_rms", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5)


@pytest.mark.parametrize("max_grad_norm", [numpy.float32(0.5), numpy.float64(0.5), numpy.int64(1), 1], ids=repr)
def test_max_grad_norm_of_any_type_of_number(tmp_path, max_grad_norm):
    judged(tmp_path, steps=2, max_grad_norm=max_grad_norm)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1])
@pytest.mark.parametrize("hook", [None, OptimizersHook], ids=["nobody-looks", "looks"])
@pytest.mark.parametrize("kind", ["adams", "scheduled"])
def test_optimizers_own_clipping_holds_in_a_trainer(tmp_path, kind, hook, max_grad_norm):
    """Beside one that clips to more, or only measures."""
    model = tiny_bert()
    if kind == "adams":
        optimizer = create_adams(model, lr=1e-3, weight_decay=0.01, max_grad_norm=0.01)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        ScheduledWeightDecay(optimizer, max_grad_norm=0.01)
    callbacks = [] if hook is None else [hook(lambda model: None)]
    settings = arguments(tmp_path, max_grad_norm=max_grad_norm, max_steps=1)
    kwargs = {"train_dataset": sentences(), "optimizers": (optimizer, None), "callbacks": callbacks}
    Trainer(model, settings, **kwargs).train()
    first = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
    assert first.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
